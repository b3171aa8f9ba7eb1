"""OLMo's name for what is in `olmo.data.batches`."""

from olmo.data.batches import IterableDataset as IterableDataset
