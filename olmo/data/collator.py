"""Collators: items of a custom dataset to one batch, padded. Token files need none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F

from olmo.config import CustomDatasetCollatorConfig, PaddingDirection, TrainConfig
from olmo.data.custom_datasets import extract_module_and_class, import_object


@dataclass
class DataCollator:
    """Pads items to the longest and stacks them."""

    pad_direction: PaddingDirection
    pad_token_id: int

    @classmethod
    def from_train_config(cls, config: TrainConfig) -> Self:
        return cls(config.data.pad_direction, config.model.pad_token_id)

    def __call__(
        self, items: Sequence[dict[str, Any] | torch.Tensor | list[int]]
    ) -> dict[str, Any]:
        """Collate items, each a dictionary with input_ids or the ids alone.

        Returns input_ids (B, T) int64 and, where items have them, attention_mask (B, T) float,
        attention_bias (B, 1, T, T), label_mask (B, T) bool, index (B,), instance_mask (B,),
        doc_lens (B, documents) with max_doc_lens, and metadata.
        """
        assert items
        rows: list[dict[str, Any]] = [
            item if isinstance(item, dict) else {"input_ids": item} for item in items
        ]
        longest = max(len(row["input_ids"]) for row in rows)

        def padding(row: dict[str, Any]) -> tuple[int, int]:
            missing = longest - len(row["input_ids"])
            return (missing, 0) if self.pad_direction == PaddingDirection.left else (0, missing)

        def stack(name: str, dtype: torch.dtype, value: float) -> None:
            padded = [
                F.pad(torch.as_tensor(row[name]).to(dtype), padding(row), value=value)
                for row in rows
                if row.get(name) is not None
            ]
            if padded:
                out[name] = torch.stack(padded)

        out: dict[str, Any] = {}
        stack("input_ids", torch.long, self.pad_token_id)
        stack("attention_mask", torch.float, 0.0)
        biases = []
        for row in rows:
            if (bias := row.get("attention_bias")) is not None:
                bias = torch.as_tensor(bias)
                bias = bias.reshape((1,) * (3 - bias.dim()) + bias.shape)  # (1, T, T)
                masked = False if bias.dtype == torch.bool else float("-inf")
                biases.append(F.pad(bias, padding(row) * 2, value=masked))
        if biases:
            out["attention_bias"] = torch.stack(biases)
        stack("label_mask", torch.bool, False)
        for name in ("index", "instance_mask"):
            values = [torch.as_tensor(row[name]) for row in rows if row.get(name) is not None]
            if values:
                out[name] = torch.stack(values)
        lengths = [row["doc_lens"] for row in rows if row.get("doc_lens") is not None]
        if lengths:
            out["doc_lens"] = torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True)
            out["max_doc_lens"] = [int(row.max()) for row in lengths]
        metadata = [row["metadata"] for row in rows if row.get("metadata") is not None]
        if metadata:
            out["metadata"] = metadata
        return out


@dataclass
class CustomDatasetDataCollator(DataCollator):
    """As `DataCollator`, for items whose fields have the names of CustomDatasetCollatorConfig."""

    input_id_field: str = "input_ids"
    attention_mask_field: str | None = None
    attention_bias_field: str | None = None
    label_mask_field: str | None = None
    index_field: str | None = None
    instance_mask_field: str | None = None
    doc_lens_field: str | None = None
    metadata_field: str | None = None

    @classmethod
    def from_train_config(cls, config: TrainConfig) -> Self:
        custom = config.data.custom_dataset
        assert custom is not None
        names = (custom.collate_config or CustomDatasetCollatorConfig()).asdict()
        if custom.token_field is not None:
            names["input_id_field"] = custom.token_field
        return cls(config.data.pad_direction, config.model.pad_token_id, **names)

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        return super().__call__([self._renamed(i) if isinstance(i, dict) else i for i in items])

    def _renamed(self, item: dict[str, Any]) -> dict[str, Any]:
        out = {"input_ids": item[self.input_id_field]}
        for name in ("attention_mask", "attention_bias", "label_mask", "index",
                     "instance_mask", "doc_lens", "metadata"):  # fmt: skip
            if (field := getattr(self, f"{name}_field")) is not None:
                out[name] = item[field]
        return out


def build_collator(train_config: TrainConfig) -> Callable[[Any], dict[str, Any]]:
    """The collator of a config: a custom dataset's own function, or one of the classes above.

    A function name without a module is imported from the dataset's module.
    """

    custom = train_config.data.custom_dataset
    if custom is None:
        return DataCollator.from_train_config(train_config)
    if custom.collate_fn is None:
        return CustomDatasetDataCollator.from_train_config(train_config)
    module, name = extract_module_and_class(custom.collate_fn)
    return import_object(name, module or custom.module or extract_module_and_class(custom.name)[0])
