"""OLMo's name for `olmo.data.memmap`."""

from olmo.data.memmap import MemMapDataset as MemMapDataset
