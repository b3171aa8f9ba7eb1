"""OLMo's name for what is in `olmo.data.memmap`."""

from olmo.data.memmap import get_document_lengths as get_document_lengths
