"""Token files as OLMo reads them: raw arrays without a header, cut into instances of one length.

A file has bytes // (bytes per token * chunk_size) instances. The remainder of each file is dropped:
an instance never spans two files.

Shapes: B instances, T = chunk_size tokens.
"""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olmo.config import DataConfig, InstanceFilterConfig, TrainConfig
from olmo.config.checks import check_data
from olmo.data.files import TokenFile, file_sizes, is_url


class MemMapDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Instances of `chunk_size` tokens from raw token files, in the order of `paths`.

    An item has input_ids, (T,) int64, and by option: label_mask, (T,) bool, from raw bool files;
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
    ) -> None:
        if not paths:
            raise ValueError("At least one path is required")
        if generate_attention_mask and pad_token_id is None:
            raise ValueError("'pad_token_id' is required for 'generate_attention_mask'")
        if generate_doc_lengths and eos_token_id is None:
            raise ValueError("'eos_token_id' is required for 'generate_cu_doc_lengths'")
        if label_mask_paths and len(label_mask_paths) != len(paths):
            raise ValueError(
                "There must be the same number of 'label_mask_paths' as there are 'paths'"
            )
        if isinstance(metadata, list) and len(metadata) != len(paths):
            raise ValueError("'metadata' should have the same length as the number of file paths")
        self.paths = paths
        self.chunk_size = chunk_size
        self.dtype = memmap_dtype
        self.metadata = metadata if isinstance(metadata, list) else [metadata or {}] * len(paths)
        self.include_instance_metadata = include_instance_metadata
        self.generate_attention_mask = generate_attention_mask
        self.generate_doc_lengths = generate_doc_lengths
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id
        self.label_mask_paths = list(label_mask_paths) if label_mask_paths else None
        self.instance_filter_config = instance_filter_config
        self._remote = any(is_url(path) for path in paths)
        self._ends: list[int] | None = None  # of each file, in instances
        self._files: dict[tuple[int, bool], TokenFile] = {}  # by (file, is a mask)

    @property
    def max_seq_len(self) -> int:
        return self.chunk_size

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """(first instance, one past the last) of each file."""
        if self._ends is None:
            width = np.dtype(self.dtype).itemsize * self.chunk_size
            lengths = [size // width for size in file_sizes(self.paths)]
            if self.label_mask_paths is not None:
                masks = [size // self.chunk_size for size in file_sizes(self.label_mask_paths)]
                for path, length, mask_path, mask in zip(
                    self.paths, lengths, self.label_mask_paths, masks, strict=True
                ):
                    if mask != length:
                        raise ValueError(
                            f"masking file '{mask_path}' should be the same size as '{path}'"
                        )
            self._ends = list(itertools.accumulate(lengths))
        return list(zip([0, *self._ends[:-1]], self._ends, strict=True))

    def __len__(self) -> int:
        return self.offsets[-1][1] if self._ends is None else self._ends[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        """The file of an instance, and its row in that file."""
        n = len(self)
        position = index if index >= 0 else n + index
        if not 0 <= position < n:
            raise IndexError(f"{index} is out of bounds for dataset of size {n}")
        assert self._ends is not None
        file = bisect.bisect_right(self._ends, position)
        return file, position - (self._ends[file - 1] if file else 0)

    def _tokens(self, file: int, row: int, mask: bool = False) -> np.ndarray:
        """An instance's tokens, or its label mask, as stored: (T,)."""
        tokens = self._files.get((file, mask))
        if tokens is None:
            path = (
                self.label_mask_paths[file] if mask and self.label_mask_paths else self.paths[file]
            )
            tokens = self._files[file, mask] = TokenFile(path, np.bool_ if mask else self.dtype)
        return tokens.read(row * self.chunk_size, (row + 1) * self.chunk_size)

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
        instance_mask (B,) bool, doc_lens (B, most documents) int32 padded with 0.
        """
        places = [self._locate(int(i)) for i in indices]
        ids = np.empty((len(places), self.chunk_size), np.int64)
        if self._remote:
            # Each request waits for the network: send them together.
            with ThreadPoolExecutor(min(len(places), 32)) as threads:
                ids[:] = list(threads.map(lambda place: self._tokens(*place), places))
        else:
            for b, (file, row) in enumerate(places):
                ids[b] = self._tokens(file, row)
        out: dict[str, Any] = {"input_ids": torch.from_numpy(ids)}
        if self.generate_attention_mask:
            out["attention_mask"] = (out["input_ids"] != self.pad_token_id).float()
        if self.label_mask_paths is not None:
            masks = np.stack([self._tokens(file, row, mask=True) for file, row in places])
            # A numpy bool of another byte than 0 or 1 is undefined.
            out["label_mask"] = torch.from_numpy(masks.view(np.uint8) != 0)
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
    metadata: list[dict[str, Any]]
    check_data(data_config)
    if data_config.paths:
        paths = data_config.paths
        metadata = [{"path": path} for path in paths]
    elif data_config.datasets:
        labelled = [(k, p) for k in sorted(data_config.datasets) for p in data_config.datasets[k]]
        paths = [path for _, path in labelled]
        metadata = [{"label": label} for label, _ in labelled]
    else:
        raise ValueError(
            "data.paths: expected token files, or data.datasets with some, found neither; set "
            "--data.paths=[tokens.npy], or train with the pipeline, which fills them in"
        )

    return MemMapDataset(
        *paths,
        chunk_size=train_config.model.max_sequence_length,
        memmap_dtype=data_config.effective_memmap_dtype,
        metadata=metadata,
        include_instance_metadata=include_instance_metadata,
        pad_token_id=train_config.model.pad_token_id,
        eos_token_id=train_config.model.eos_token_id,
        generate_attention_mask=data_config.generate_attention_mask,
        generate_doc_lengths=data_config.generate_doc_lengths,
        label_mask_paths=data_config.label_mask_paths,
        instance_filter_config=data_config.instance_filter,
    )
