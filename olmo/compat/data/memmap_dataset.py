"""OLMo's module path for a class of `olmo.data.memmap`."""

from olmo.data.memmap import MemMapDataset as MemMapDataset
