"""Token files as OLMo reads them: raw arrays without a header, cut into instances of one length.

Shapes: B instances, T = chunk_size tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olmo.config import DataConfig, InstanceFilterConfig, TrainConfig
from olmo.data.holes import learned_tokens, read_holes
from olmo.data.instance_files import InstanceFiles, list_token_files


class MemMapDataset(InstanceFiles, torch.utils.data.Dataset[dict[str, Any]]):
    """Instances of token files as tensors.

    An item has input_ids, (T,) int64, and by option: label_mask, (T,) bool, from raw bool files
    and a file of holes; token_bytes, (T,) int32, from raw files (olmo.corpus.token_bytes);
    attention_mask, (T,) int64, 0 at padding; doc_lens, (documents,) int32, the tokens of each
    document, its end token included; instance_mask, False where the instance repeats more than
    `instance_filter_config` allows; metadata of the file.
    """

    def __init__(
        self,
        *paths: str | Path,
        chunk_size: int = 1024,
        memmap_dtype: type[np.integer[Any]] = np.uint16,
        metadata: list[dict[str, Any]] | dict[str, Any] | None = None,
        include_instance_metadata: bool = True,
        generate_attention_mask: bool = False,
        generate_doc_lengths: bool = False,
        pad_token_id: int | None = None,
        eos_token_id: int | None = None,
        label_mask_paths: Sequence[str | Path] | None = None,
        instance_filter_config: InstanceFilterConfig | None = None,
        holes_path: str | Path | None = None,
        token_bytes_paths: Sequence[str | Path] | None = None,
    ) -> None:
        super().__init__(
            *paths,
            chunk_size=chunk_size,
            memmap_dtype=memmap_dtype,
            label_mask_paths=label_mask_paths,
        )
        if generate_attention_mask and pad_token_id is None:
            raise ValueError("'pad_token_id' is required for 'generate_attention_mask'")
        if generate_doc_lengths and eos_token_id is None:
            raise ValueError("'eos_token_id' is required for 'generate_cu_doc_lengths'")
        if isinstance(metadata, list) and len(metadata) != len(paths):
            raise ValueError("'metadata' should have the same length as the number of file paths")
        self.metadata = metadata if isinstance(metadata, list) else [metadata or {}] * len(paths)
        self.include_instance_metadata = include_instance_metadata
        self.generate_attention_mask = generate_attention_mask
        self.generate_doc_lengths = generate_doc_lengths
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id
        self.instance_filter_config = instance_filter_config
        self._holes = None if holes_path is None else read_holes(holes_path)
        self.token_bytes_paths = list(token_bytes_paths or ())
        self._token_bytes = None
        if token_bytes_paths:
            self._token_bytes = InstanceFiles(
                *token_bytes_paths, chunk_size=chunk_size, memmap_dtype=np.int32
            )

    @property
    def max_seq_len(self) -> int:
        return self.chunk_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.batch([int(index)])
        batch.pop("max_doc_lens", None)
        item = {name: values[0] for name, values in batch.items()}
        if "instance_mask" in item:
            item["instance_mask"] = bool(item["instance_mask"])
        if "attention_mask" in item:
            item["attention_mask"] = item["attention_mask"].long()
        return item

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Some instances as one batch: what `DataCollator` makes of them, without `index`.

        input_ids (B, T) int64, attention_mask (B, T) float32, label_mask (B, T) bool,
        token_bytes (B, T) int32, instance_mask (B,) bool, doc_lens (B, most documents) int32
        padded with 0.
        """
        places = [self.locate(int(i)) for i in indices]
        ids = self.read_ids(places)
        out: dict[str, Any] = {"input_ids": torch.from_numpy(ids)}
        if self.generate_attention_mask:
            out["attention_mask"] = (out["input_ids"] != self.pad_token_id).float()
        if self.label_mask_paths is not None:
            masks = np.stack([self._tokens(file, row, mask=True) for file, row in places])
            # A numpy bool of another byte than 0 or 1 is undefined.
            out["label_mask"] = torch.from_numpy(masks.view(np.uint8) != 0)
        if self._holes is not None:
            numbers = np.asarray(indices) % len(self)  # -1 is the last
            learned = torch.from_numpy(learned_tokens(self._holes, numbers, self.chunk_size))
            out["label_mask"] = learned & out.get("label_mask", torch.tensor(True))
        if self._token_bytes is not None:
            out["token_bytes"] = torch.from_numpy(self._token_bytes.read_ids(places)).int()
        if self.instance_filter_config is not None:
            mask = [not is_repetitive(row, self.instance_filter_config) for row in ids]
            out["instance_mask"] = torch.tensor(mask)
        if self.generate_doc_lengths:
            assert self.eos_token_id is not None
            lengths = [get_document_lengths(row, self.eos_token_id) for row in out["input_ids"]]
            out["doc_lens"] = torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True)
            out["max_doc_lens"] = [int(row.max()) for row in lengths]
        if self.include_instance_metadata:
            out["metadata"] = [copy.deepcopy(self.metadata[file]) for file, _ in places]
        return out

    def __add__(self, other: Any) -> MemMapDataset:  # type: ignore[override]
        if not isinstance(other, MemMapDataset):
            raise NotImplementedError(f"Expected another MemMapDataset but got {type(other)}")
        if (self.label_mask_paths is None) != (other.label_mask_paths is None):
            raise ValueError("cannot join a data set that has label masks with one that has none")
        if self._holes is not None or other._holes is not None:
            raise ValueError("cannot join data sets that have holes: their instances are numbered")
        if self._token_bytes is not None or other._token_bytes is not None:
            raise ValueError("cannot join data sets that have token_bytes_paths")
        masks = (self.label_mask_paths or []) + (other.label_mask_paths or [])
        return MemMapDataset(
            *self.paths,
            *other.paths,
            chunk_size=self.chunk_size,
            memmap_dtype=self.dtype,
            metadata=self.metadata + other.metadata,
            include_instance_metadata=self.include_instance_metadata,
            generate_attention_mask=self.generate_attention_mask,
            generate_doc_lengths=self.generate_doc_lengths,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_id,
            label_mask_paths=masks or None,
            instance_filter_config=self.instance_filter_config,
        )


def get_document_lengths(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Lengths of the documents in one instance, (documents,) int32, each with its closing token.

    >>> get_document_lengths(torch.tensor([3, 4, 0, 5]), 0)
    tensor([3, 1], dtype=torch.int32)
    """
    ends = (input_ids == eos_token_id).nonzero(as_tuple=True)[0] + 1
    if len(input_ids) and (len(ends) == 0 or ends[-1] != len(input_ids)):
        ends = torch.cat([ends, ends.new_tensor([len(input_ids)])])
    return torch.diff(ends, prepend=ends.new_zeros(1)).int()


def is_repetitive(ids: np.ndarray, limits: InstanceFilterConfig) -> bool:
    """Whether an n-gram with a period within `limits` repeats `repetition_max_count` times or more.

    Where ids[i] == ids[i - period] holds L times in a row, the n-gram occurs (L + period) // period
    times. Fewer than three occurrences are no repetition.
    """
    longest = min(limits.repetition_max_period, len(ids) // 3)
    least = max(limits.repetition_max_count, 3)
    for period in range(limits.repetition_min_period, longest + 1):
        breaks = np.flatnonzero(ids[period:] != ids[:-period])
        edges = np.concatenate([[-1], breaks, [len(ids) - period]])
        run = int(np.diff(edges).max()) - 1
        if (run + period) // period >= least:
            return True
    return False


def build_memmap_dataset(
    train_config: TrainConfig, data_config: DataConfig, include_instance_metadata: bool = True
) -> MemMapDataset:
    """The token files of a DataConfig, as instances of the model's max_sequence_length.

    `data.paths` keep their order; `data.datasets` are sorted by label. Raises ValueError if both
    are set, or neither.
    """
    files = list_token_files(data_config)
    return MemMapDataset(
        *(path for path, _ in files),
        chunk_size=train_config.model.max_sequence_length,
        memmap_dtype=data_config.effective_memmap_dtype,
        metadata=[metadata for _, metadata in files],
        include_instance_metadata=include_instance_metadata,
        pad_token_id=train_config.model.pad_token_id,
        eos_token_id=train_config.model.eos_token_id,
        generate_attention_mask=data_config.generate_attention_mask,
        generate_doc_lengths=data_config.generate_doc_lengths,
        label_mask_paths=data_config.label_mask_paths,
        instance_filter_config=data_config.instance_filter,
        holes_path=data_config.holes_path,
        token_bytes_paths=data_config.token_bytes_paths,
    )
