"""Token files and label masks of another kind are refused by their true cause, before training."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run

from olmo.config import InstanceFilterConfig
from olmo.corpus.sources import check_token_file
from olmo.data import checks
from olmo.data.checks import check_labels, check_token_files
from olmo.data.memmap import MemMapDataset
from olmo.train import setup

VOCABULARY = 50_304


def ids(count: int = 4000, highest: int = VOCABULARY) -> np.ndarray:
    """As frequent as words are: many small ones, and the end of a text (0) here and there."""
    generator = np.random.default_rng(0)
    found = np.minimum(generator.zipf(1.3, count), highest - 1)
    found[generator.random(count) < 0.01] = 0
    return found


def check(path: Path, dtype: Any = np.uint16, vocabulary: int = VOCABULARY) -> int:
    return check_token_files(MemMapDataset(path, chunk_size=8, memmap_dtype=dtype), vocabulary)


@pytest.mark.parametrize(
    ("stored", "read", "vocabulary"),
    [
        ("int64", "uint16", VOCABULARY),
        ("int64", "uint32", VOCABULARY),
        ("int64", "uint32", 100_278),
        ("uint32", "uint16", VOCABULARY),
        ("int32", "uint16", 100_278),
        ("uint16", "uint8", 50_304),
        ("uint16", "uint32", VOCABULARY),
        ("uint32", "int64", 100_278),
    ],
)
def test_another_type_is_named_and_then_fits(
    tmp_path: Path, stored: str, read: str, vocabulary: int
) -> None:
    path = tmp_path / "t.npy"
    ids(highest=vocabulary).astype(stored).tofile(path)
    with pytest.raises(ValueError, match=r"^data: .*t\.npy.* set --data\.memmap_dtype=") as error:
        check(path, np.dtype(read).type, vocabulary)
    named = re.findall(r"memmap_dtype=(\w+)", str(error.value))[-1]
    assert np.dtype(named).itemsize == np.dtype(stored).itemsize
    assert check(path, np.dtype(named).type, vocabulary) == 4000


PLAUSIBLE = {
    "zeros": np.zeros(4000),
    "padding": np.ones(4000),
    "text": ids(),
    "small": ids() % 4,
    "few": np.array([7, 0] * 10),
    "two kinds": np.array([5, 0] * 2000),
    "mostly padding": np.where(np.arange(4000) < 300, ids(), 0),
    "padding, then text": np.where(np.arange(4000) < 3800, 0, ids()),
    "sparse": np.where(np.random.default_rng(1).random(4000) < 0.05, ids(highest=900) + 9, 0),
    "pairs": np.stack([ids(2000) % 900 + 5, np.arange(2000) % 2], axis=1).reshape(-1),
    "begins as gzip does": np.array([0x8B1F, 9, 8, 7] * 50),
    "begins as a zip file does": np.array([0x4B50, 9, 8, 7] * 50),
}


@pytest.mark.parametrize("name", PLAUSIBLE)
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_what_may_be_tokens_is_taken(
    tmp_path: Path, name: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.npy"
    values = PLAUSIBLE[name].astype(dtype)
    values.tofile(path)
    assert check(path, np.dtype(dtype).type) == len(values)
    assert check_token_file(path, "t.npy", dtype) == len(values)
    said = capsys.readouterr().err
    assert "looks like" not in said or name == "two kinds", said


def test_padding_at_the_beginning_hides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    np.concatenate([np.zeros(3_000_001), ids()]).astype(np.int64).tofile(path)
    with pytest.raises(ValueError, match="looks like int64"):
        check(path)


def test_what_is_not_certain_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.npy"
    np.where(np.arange(4000) < 300, ids(highest=900) + 1, 0).astype(np.int64).tofile(path)
    check(path)
    said = capsys.readouterr().err
    assert "WARNING: data: " in said and "looks like int64" in said and "is padding" in said


@pytest.mark.parametrize("stored", ["uint16", "int64", "uint8"])
def test_a_numpy_header_is_told_with_what_then_works(tmp_path: Path, stored: str) -> None:
    path = tmp_path / "t.npy"
    np.save(path, (ids() % 200)[:3999].astype(stored))
    with pytest.raises(ValueError, match="found a numpy file with a header; ") as error:
        check(path)
    with pytest.raises(ValueError, match="found a numpy file with a header; "):
        check_token_file(path, str(path), "uint16")
    remedy = re.search(r"numpy\.load.*tofile\('raw.npy'\)", str(error.value))
    assert remedy
    written = remedy[0].replace("'raw.npy'", f"'{tmp_path}/raw.npy'")
    eval(written, {"numpy": np})  # as the sentence says
    assert check(tmp_path / "raw.npy") == 3999


def test_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    for start, kind in (
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"PK\x03\x04", "a zip file"),
        (b"PAR1", "parquet"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"<!DOCTYPE html>", "a web page"),
    ):
        for length in (4000, 4001, 5):
            path.write_bytes(start.ljust(length, b"\0")[: max(length, len(start))])
            with pytest.raises(ValueError, match=rf"expected raw numbers .* found {kind}"):
                check(path)


def test_ids_below_zero(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    np.array([3, -100, 4, 5] * 8, np.int64).tofile(path)
    with pytest.raises(ValueError, match=r"token 1 of .*t\.npy is -100"):
        check(path, np.int64)


def labelled(folder: Path, labels: np.ndarray, **options: Any) -> MemMapDataset:
    """40 instances of 8 tokens."""
    ids(320).astype(np.uint16).tofile(folder / "t.npy")
    labels.tofile(folder / "m.npy")
    return MemMapDataset(
        folder / "t.npy", chunk_size=8, label_mask_paths=[folder / "m.npy"], **options
    )


@pytest.mark.parametrize("largest", [2, 254, 255])
def test_labels_are_bytes_of_0_and_1(tmp_path: Path, largest: int) -> None:
    labels = (np.arange(320) % (largest + 1)).astype(np.uint8)
    data = labelled(tmp_path, labels)
    found = labels.max()
    with pytest.raises(ValueError, match=rf"m\.npy: expected a byte for each .* found {found};"):
        check_token_files(data, VOCABULARY)
    assert data[0]["label_mask"].tolist() == (labels[:8] != 0).tolist(), "and no other bytes"
    data = labelled(tmp_path, labels != 0)
    assert check_token_files(data, VOCABULARY) == 320


def test_labels_with_a_header_or_of_another_type(tmp_path: Path) -> None:
    data = labelled(tmp_path, np.ones(320, np.int64))
    with pytest.raises(ValueError, match=r"each of 320 tokens, found 2560 in .*, one byte each"):
        check_token_files(data, VOCABULARY)
    np.save(tmp_path / "m.npy", np.ones(320, np.bool_))
    with pytest.raises(ValueError, match=r"m\.npy: expected raw .* a numpy file .*'bool'"):
        check_token_files(data, VOCABULARY)


def test_data_of_which_nothing_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing, first, last = (np.zeros((40, 8), np.bool_) for _ in range(3))
    first[:, 0] = True  # which no position before it predicts
    last[-1, -1] = True
    check_labels(labelled(tmp_path, last))
    for labels in (nothing, first):
        with pytest.raises(ValueError, match=r"none in 40 of 40 .* change data.label_mask_paths$"):
            check_labels(labelled(tmp_path, labels))
    check_labels(labelled(tmp_path, nothing), "evaluators.x.data", required=False)
    assert "change evaluators.x.data.label_mask_paths" in capsys.readouterr().err
    monkeypatch.setattr(checks, "MAX_INSTANCES_CHECKED", 4)
    check_labels(labelled(tmp_path, nothing))
    assert "WARNING: data: expected tokens to learn, found none in 4 of 40" in (
        capsys.readouterr().err
    )


def test_a_filter_or_padding_that_leaves_nothing(tmp_path: Path) -> None:
    np.ones(320, np.uint16).tofile(tmp_path / "t.npy")
    limits = InstanceFilterConfig(repetition_max_count=3)
    data = MemMapDataset(tmp_path / "t.npy", chunk_size=80, instance_filter_config=limits)
    with pytest.raises(ValueError, match=r"change data.instance_filter$"):
        check_labels(data)
    padded: dict[str, Any] = {"generate_attention_mask": True, "pad_token_id": 1}
    with pytest.raises(ValueError, match=r"change data.generate_attention_mask$"):
        check_labels(MemMapDataset(tmp_path / "t.npy", chunk_size=8, **padded))
    check_labels(MemMapDataset(tmp_path / "t.npy", chunk_size=8))


def test_the_trainer_tells_of_it_before_a_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built first")

    monkeypatch.setattr(setup, "OLMo", built)
    (ids(4000) % 60).astype(np.int64).tofile(tmp_path / "wide.npy")
    with pytest.raises(ValueError, match=r"looks like int64.*memmap_dtype=int64"):
        small_run.run(tmp_path, data={"paths": [str(tmp_path / "wide.npy")]})
    (ids(4000) % 60).astype(np.uint16).tofile(tmp_path / "t.npy")
    np.zeros(4000, np.bool_).tofile(tmp_path / "m.npy")
    data = {"paths": [str(tmp_path / "t.npy")], "label_mask_paths": [str(tmp_path / "m.npy")]}
    with pytest.raises(ValueError, match="expected tokens to learn, found none"):
        small_run.run(tmp_path, save_overwrite=True, data=data)


@pytest.mark.parametrize("stored", ["int64", "int32"])
def test_the_pipeline_refuses_wider_numbers_too(tmp_path: Path, stored: str) -> None:
    path = tmp_path / "t.npy"
    ids().astype(stored).tofile(path)
    with pytest.raises(ValueError, match=r"^given: expected uint16, found u?int(64|32); set"):
        check_token_file(path, "given", "uint16")
    assert check_token_file(path, "given", stored) == 4000
