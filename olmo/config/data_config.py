"""The `data` section of a training config: token files, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from olmo.config.enums import PaddingDirection, TokenType
from olmo.config.strict import BaseConfig, extension


@dataclass
class InstanceFilterConfig(BaseConfig):
    """Exclude instances from the loss if an n-gram of a period in this range repeats too often."""

    repetition_max_period: int = 13  # tokens
    repetition_min_period: int = 1  # tokens
    repetition_max_count: int = 32  # repetitions from which an instance is left out


@dataclass
class CustomDatasetCollatorConfig(BaseConfig):
    """The field names of a custom dataset's items."""

    input_id_field: str = "input_ids"  # token ids
    attention_mask_field: str | None = None  # which tokens are no padding
    attention_bias_field: str | None = None  # added to attention scores
    label_mask_field: str | None = None  # which tokens are learned
    index_field: str | None = None  # the number of the item
    instance_mask_field: str | None = None  # whether the item is learned
    doc_lens_field: str | None = None  # tokens of each document
    metadata_field: str | None = None  # anything, for evaluators


@dataclass
class CustomDatasetConfig(BaseConfig):
    """A map-style dataset of one's own, instead of token files."""

    name: str  # class or function, in `module` or dotted
    module: str | None = None  # the module of the dataset's class
    args: dict[str, Any] | None = None  # arguments of the class
    collate_fn: str | None = None  # a function that makes a batch of items
    token_field: str | None = None  # of an item
    collate_config: CustomDatasetCollatorConfig | None = field(
        default_factory=CustomDatasetCollatorConfig
    )


@dataclass
class DataConfig(BaseConfig):
    """The token files, and how they are read."""

    paths: list[str] | None = None  # raw token files, in this order
    memmap_dtype: TokenType = TokenType.uint16  # of the token files
    datasets: dict[str, list[str]] | None = None  # label → paths, instead of `paths`
    label_mask_paths: list[str] | None = None  # raw bool files, one per token file
    pad_direction: PaddingDirection = PaddingDirection.right  # where an instance is padded
    generate_attention_mask: bool = False  # of tokens that are not padding
    generate_doc_lengths: bool = False  # mask attention between documents
    num_workers: int = 0  # processes or threads that read data
    drop_last: bool = False  # of an epoch: instances that fill no batch
    pin_memory: bool = False  # on a GPU batches are pinned either way
    prefetch_factor: int | None = None  # batches that each worker reads ahead
    persistent_workers: bool = False  # keep workers from epoch to epoch
    timeout: int = 0  # s that a worker may take for a batch; 0: any
    seed: int | None = None  # of the data order; None: the run's seed
    instance_filter: InstanceFilterConfig | None = None  # null: none is left out
    custom_dataset: CustomDatasetConfig | None = extension()  # noqa: RUF009 (newer than its release)
    # File with the precomputed order: raw little-endian uint32, one per instance, no padding.
    order_path: str | None = extension()
    # Whether that order is a mixture's: of any length, and an instance may repeat or be left out.
    mixture: bool | None = extension()
    # File with tokens that are read but not learned (olmo.data.holes).
    holes_path: str | None = extension()
    # Of evaluators: raw int32 files, one per token file: the bytes of each token's text, -1: none.
    token_bytes_paths: list[str] | None = extension()  # noqa: RUF009

    @property
    def effective_memmap_dtype(self) -> Any:
        """The numpy type of the token files. Raises TypeError for an unknown name."""
        import numpy as np

        try:
            return getattr(np, TokenType(self.memmap_dtype))
        except ValueError:
            raise TypeError(
                f"data.memmap_dtype: expected one of {', '.join(TokenType)}, found "
                f"{self.memmap_dtype!r}"
            ) from None
