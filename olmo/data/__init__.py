"""Text to batches: sources, documents, tokens, their order, and what training reads."""

from olmo.runtime.lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "memmap": ["MemMapDataset", "build_memmap_dataset"],
        "collator": ["DataCollator", "build_collator"],
        "batches": ["IterableDataset", "build_train_dataloader"],
    },
)
