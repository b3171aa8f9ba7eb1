"""What the trainer reads: token files, their instances in the run's order, and batches of them."""

from pathlib import Path

from olmo.runtime.lazy import lazy_exports

# OLMo's module paths that our trainer does not use: `olmo.data.util` is compat/data/util.py.
__path__.append(str(Path(__file__).parents[1] / "compat/data"))

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "memmap": ["MemMapDataset", "build_memmap_dataset"],
        "collator": ["DataCollator", "build_collator"],
        "batches": ["build_train_dataloader"],
        "iterable_dataset": ["IterableDataset"],
    },
)
