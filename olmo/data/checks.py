"""Checks of training data before a run starts: a wrong file costs seconds here, and days later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from olmo.data import raw
from olmo.data.batches import get_labels
from olmo.data.files import ArrayFile, file_sizes, is_url
from olmo.data.memmap import MemMapDataset
from olmo.runtime.log import log

MAX_TOKENS_CHECKED = 64_000_000  # in all files together, though at least MIN_TOKENS of each
MIN_TOKENS = 4096  # and no more of a remote file
MAX_INSTANCES_CHECKED = 4096  # where none has a label, reading so many takes seconds


def check_token_files(dataset: MemMapDataset, vocab_size: int, section: str = "data") -> int:
    """Check sizes, format and ids of token files and label masks; returns the number of ids read.

    Reads all of small data, and the beginning of each file of large data. `vocab_size` is the
    number of embeddings. `section` is the config's section, for the messages. Raises ValueError or
    FileNotFoundError.
    """
    sizes = _find_sizes(dataset.paths, f"{section}.paths", section)
    masks = dataset.label_mask_paths or []
    mask_sizes = _find_sizes(masks, f"{section}.label_mask_paths", section)
    _check_sizes(dataset, sizes, mask_sizes, section)
    budget = max(MAX_TOKENS_CHECKED // len(sizes), MIN_TOKENS)
    checked = 0
    for path, size in zip(dataset.paths, sizes, strict=True):
        if size:
            length = size // np.dtype(dataset.dtype).itemsize
            limit = min(length, MIN_TOKENS if is_url(path) else budget)
            tokens = ArrayFile(path, dataset.dtype).read(0, limit)
            _check_ids(path, tokens, vocab_size, section)
            checked += len(tokens)
    for path, size in zip(masks, mask_sizes, strict=True):
        limit = min(size, MIN_TOKENS if is_url(path) else budget)
        labels = ArrayFile(path, np.uint8).read(0, limit)
        if size and (largest := labels.max()) > 1:
            raw.check_is_raw(str(path), labels[:64].tobytes(), "bool", f"{section}: ")
            raise ValueError(
                f"{section}: {path}: expected a byte for each token, 1 where it is learned and 0 "
                f"elsewhere (numpy's bool), found {largest}; rewrite it: (labels != 0).tofile(…)"
            )
    return checked


def _find_sizes(paths: Sequence[str | Path], key: str, section: str) -> list[int]:
    try:
        return file_sizes(paths)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{section}: {error}; correct --{key}=[…]") from None


def _check_sizes(
    dataset: MemMapDataset, sizes: list[int], mask_sizes: list[int], section: str
) -> None:
    """Each file has whole tokens, each mask a byte for each token, all together an instance.

    Before an error about a size it checks the format, which is the likely cause.
    """
    dtype, itemsize = np.dtype(dataset.dtype).name, np.dtype(dataset.dtype).itemsize

    def check_is_raw(path: str | Path, size: int, expected: str) -> None:
        start = ArrayFile(path, np.uint8).read(0, min(size, 64)).tobytes() if size else b""
        raw.check_is_raw(str(path), start, expected, f"{section}: ")

    for path, size in zip(dataset.paths, sizes, strict=True):
        if size % itemsize:
            check_is_raw(path, size, dtype)
            raise ValueError(
                f"{section}: {path} has {size} bytes, not a whole number of {dtype} tokens: it is "
                f"truncated, or {section}.memmap_dtype is wrong"
            )
    for path, size, labels in zip(dataset.label_mask_paths or (), sizes, mask_sizes, strict=False):
        if labels != size // itemsize:
            check_is_raw(path, labels, "bool")
            raise ValueError(
                f"{section}: expected a label for each of {size // itemsize} tokens, found "
                f"{labels} in {path}, one byte each (numpy's bool); correct "
                f"--{section}.label_mask_paths=[…]"
            )
    beside = _find_sizes(dataset.token_bytes_paths, f"{section}.token_bytes_paths", section)
    if [4 * (size // itemsize) for size in sizes] != beside and beside:
        raise ValueError(
            f"{section}: expected 4 bytes (int32) for each token of {section}.paths, file by file, "
            f"found files of {', '.join(map(str, beside[:4]))}{' …' * (len(beside) > 4)} bytes for "
            f"{', '.join(str(size // itemsize) for size in sizes[:4])}{' …' * (len(sizes) > 4)} "
            f"tokens; correct --{section}.token_bytes_paths=[…]"
        )
    if len(dataset) == 0:
        for path, size in zip(dataset.paths, sizes, strict=True):
            check_is_raw(path, size, dtype)
        raise ValueError(
            f"{section}: {sum(sizes) // itemsize} tokens in {len(sizes)} files give no instance of "
            f"{dataset.chunk_size}; give more data, or a smaller model.max_sequence_length"
        )


def _check_ids(path: str | Path, tokens: np.ndarray, vocab_size: int, section: str) -> None:
    """The beginning of a file is raw, in the config's dtype, and all ids have an embedding."""
    dtype = tokens.dtype.name
    raw.check_is_raw(str(path), tokens[:64].tobytes(), dtype, f"{section}: ")
    if (wider := raw.guess_wider_dtype(tokens, vocab_size)) is not None:
        name, is_certain = wider
        message = (
            f"{section}: {path} is read as {dtype}, but it looks like {name} token ids; set "
            f"--{section}.memmap_dtype={name}"
        )
        if is_certain:
            raise ValueError(message)
        log.warning(f"{message}, unless most of it is padding")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        at = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        remedy = f"the file is another tokenizer's, or {section}.memmap_dtype is wrong"
        if (fitting := raw.find_fitting_dtype(tokens, vocab_size)) is not None:
            remedy = f"as {fitting} all ids fit: set --{section}.memmap_dtype={fitting}"
        raise ValueError(
            f"{section}: token {at} of {path} is {tokens[at]} and the largest {tokens.max()}, "
            f"but the model has {vocab_size} embeddings; {remedy}"
        )


def check_labels(dataset: MemMapDataset, section: str = "data", required: bool = True) -> None:
    """Check that label masks, padding and the instance filter leave something to learn.

    Reads up to MAX_INSTANCES_CHECKED instances, spread over the dataset, until one has a label.
    If none has, it warns, or raises ValueError where that was all of them and labels are
    `required`. `section` is the config's section, for the message.
    """
    options = {
        "label_mask_paths": dataset.label_mask_paths,
        "instance_filter": dataset.instance_filter_config,
        "generate_attention_mask": dataset.generate_attention_mask,
    }
    keys = [f"{section}.{name}" for name, value in options.items() if value]
    if not keys:
        return
    n, batch_size = len(dataset), 8
    sample = np.unique(np.linspace(0, n - 1, min(n, MAX_INSTANCES_CHECKED)).astype(np.int64))
    for start in range(0, len(sample), batch_size):
        if (get_labels(dataset.batch(sample[start : start + batch_size])) != -100).any():
            return
    message = (
        f"{section}: expected tokens to learn, found none in {len(sample)} of {n} instances: all "
        f"are masked; change {' or '.join(keys)}"
    )
    if required and len(sample) == n:
        raise ValueError(message)
    log.warning(message)
