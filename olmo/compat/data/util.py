"""OLMo's module path for a function of `olmo.data.memmap`."""

from olmo.data.memmap import get_document_lengths as get_document_lengths
