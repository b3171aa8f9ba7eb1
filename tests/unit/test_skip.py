"""What a run leaves out: orders and holes beside a naive computation, and what is refused."""

import functools
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
import yaml

from olmo.commands import parse_section
from olmo.config import TrainConfig
from olmo.config.identity import identity
from olmo.corpus.listing import Entry, write_listing
from olmo.corpus.skip import (
    Skip,
    check_skipped,
    find_spans,
    keep_instances,
    merge_spans,
    parse_step_range,
    skipped,
)
from olmo.data.holes import learned_tokens, make_holes, read_holes, write_holes
from olmo.data.memmap import MemMapDataset
from olmo.data.order import read_order, write_order
from olmo.io import sealed
from olmo.pipeline.fork import known_states
from olmo.pipeline.new import add_run
from olmo.pipeline.parts import holes_path, order_until, override_flags, skip_after
from olmo.pipeline.plan import Plan
from olmo.pipeline.recipe import json_text
from olmo.store.action import Action
from olmo.store.record import content
from olmo.store.stage import current_store
from olmo.train.chain import STATE, identity_until

LENGTH, BATCH = 8, 4


def build(folder: Path, order: np.ndarray, **settings: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """Remaining order, holes and facts."""
    write_order(order, folder / "order.npy")
    given: dict[str, Any] = {"spans": [], "steps": [], "sequence_length": LENGTH}
    facts = skipped.build(
        order=folder / "order.npy",
        remaining=folder / "remaining.npy",
        holes=folder / "holes.npy",
        batch_size=BATCH,
        **{**given, **settings},
    )
    return read_order(folder / "remaining.npy"), read_holes(folder / "holes.npy"), facts


def naive_tokens(spans: list[list[int]], instances: int) -> np.ndarray:
    """(instances, LENGTH) bool: which tokens are left out."""
    out = np.zeros(instances * LENGTH, bool)
    for first, end in spans:
        out[first:end] = True
    return out.reshape(instances, LENGTH)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("by", ["mask", "next"])
def test_as_a_naive_computation(tmp_path: Path, seed: int, by: str) -> None:
    random = np.random.default_rng(seed)
    instances = int(random.integers(1, 40))
    order = random.integers(0, instances, 48).astype(np.uint32)  # a mixture's: some twice
    cuts = np.sort(random.integers(0, instances * LENGTH + 1, 6)).reshape(3, 2)
    spans = [list(span) for span in merge_spans(map(tuple, cuts[: random.integers(0, 4)].tolist()))]
    steps = [[3, 4], [7, 7]] if random.random() < 0.5 else []
    remaining, holes, facts = build(tmp_path, order, spans=spans, steps=steps, by=by)

    out = naive_tokens(spans, instances)
    expected, first, masked = [], None, 0
    for position, instance in enumerate(order.tolist()):
        step = position // BATCH + 1
        is_skipped = any(begin <= step <= last for begin, last in steps)
        if is_skipped or out[instance].any():
            first = step if first is None else first
        if not is_skipped and not (by == "next" and out[instance].any()):
            expected.append(instance)
            masked += int(out[instance].sum())
    assert remaining.tolist() == expected
    assert facts["first_step"] == first and facts["masked_tokens"] == (by == "mask") * masked
    assert facts["instances"] == len(expected) == len(order) - facts["removed"]
    learned = learned_tokens(holes, np.arange(instances), LENGTH)
    assert np.array_equal(learned, ~out) if by == "mask" else learned.all()


def test_a_data_set_masks_the_holes(tmp_path: Path) -> None:
    """Also where OLMo's own masks are, and for an index that counts from the end."""
    np.arange(40, dtype=np.uint16).tofile(tmp_path / "tokens.npy")
    mask = np.ones(40, bool)
    mask[0:3] = False
    mask.tofile(tmp_path / "mask.npy")
    write_holes(make_holes([(6, 10), (35, 37)], LENGTH), tmp_path / "holes.npy")
    settings: dict[str, Any] = {"chunk_size": LENGTH, "holes_path": tmp_path / "holes.npy"}
    plain = MemMapDataset(tmp_path / "tokens.npy", **settings)
    both = MemMapDataset(
        tmp_path / "tokens.npy", label_mask_paths=[tmp_path / "mask.npy"], **settings
    )
    expected = torch.ones(40, dtype=torch.bool)
    expected[6:10] = expected[35:37] = False
    rows = expected.view(5, LENGTH)
    assert torch.equal(plain.batch(range(5))["label_mask"], rows)
    assert torch.equal(plain[-1]["label_mask"], rows[4])
    expected[0:3] = False
    assert torch.equal(both.batch([4, 0])["label_mask"], expected.view(5, LENGTH)[[4, 0]])
    with pytest.raises(ValueError, match="cannot join data sets that have holes"):
        plain + plain


def test_a_damaged_file_of_holes(tmp_path: Path) -> None:
    np.arange(4, dtype=np.uint32).tofile(tmp_path / "holes.npy")
    with pytest.raises(ValueError, match="rows of 3 uint32 numbers, found 4"):
        read_holes(tmp_path / "holes.npy")


def test_no_spans_and_no_steps_change_nothing(tmp_path: Path) -> None:
    order = np.arange(12, dtype=np.uint32)
    remaining, holes, facts = build(tmp_path, order)
    assert np.array_equal(remaining, order) and not len(holes)
    assert facts["first_step"] is None
    assert facts["instances"] == 12 and facts["removed"] == 0 == facts["masked_tokens"]


def test_instances_of_steps() -> None:
    keep, first = keep_instances(np.arange(10), [[2, 2], [3, 9]], 4)
    assert keep.tolist() == [True] * 4 + [False] * 6 and first == 2
    assert keep_instances(np.arange(3), [], 4)[1] is None


@pytest.mark.parametrize("text", ["", "a", "1..", "..5", "5..4", "0", "0..3", "-1", "1..2..3"])
def test_text_that_is_no_range_of_steps(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_step_range(text)


def test_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    everything = {"spans": [[0, 12 * LENGTH]]}
    _, _, facts = build(tmp_path, np.arange(12), **everything)
    with pytest.raises(ValueError, match="expected a token that the run learns"):
        check_skipped(facts, Skip(sources=["*"]), 0, BATCH, 3, LENGTH)
    _, _, facts = build(tmp_path, np.arange(12), spans=[[0, 12 * LENGTH - 1]])
    check_skipped(facts, Skip(sources=["*"]), 0, BATCH, 3, LENGTH)


def test_many_ids_are_no_argument_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux has 128 KiB for one."""
    skip = Skip(documents=[f"document-{number}" for number in range(20_000)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json_text(skip)))
    assert parse_section(Skip, "-") == skip == parse_section(Skip, json_text(skip))


def test_an_id_of_two_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Both documents are left out, and the user is told."""
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    entries = []
    for shard, ids in (("a", ["1", "2"]), ("b", ["2", "3"])):
        polars.DataFrame({"start": [0, 9], "end": [9, 20], "id": ids}).write_parquet(
            tmp_path / shard
        )
        np.arange(20, dtype=np.uint16).tofile(tmp_path / f"{shard}.npy")
        for output, path in (("tokens", tmp_path / f"{shard}.npy"), ("index", tmp_path / shard)):
            file = current_store().put(path)
            entries.append(Entry(shard, output, path.name, file["sha256"], file["size"]))
    write_listing(tmp_path / "000.tsv", entries)
    find = functools.partial(find_spans, [tmp_path / "000.tsv"], length=LENGTH, width=2)
    assert list(find(config=Skip(documents=["1"]))) == [(0, 9)] and not caplog.messages
    assert list(find(config=Skip(documents=["2"]))) == [(9, 16), (16, 25)]
    assert "the first '2' of a, b" in caplog.text


def test_which_way() -> None:
    assert not Skip() and not Skip().masks and not Skip().shortens
    assert Skip(documents=["a"]).masks and not Skip(documents=["a"]).shortens
    assert Skip(sources=["a"], by="next").shortens and not Skip(sources=["a"], by="next").masks
    assert Skip(steps=["3"]).shortens and Skip(steps=["3"], documents=["a"]).masks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip_steps": ["200..300"]}, "expected steps up to 240"),
        ({"skip_steps": ["9..3"]}, "expected the earlier step first"),
        ({"skip_after": 3}, "skip_after: expected skip_documents"),
        ({"skip_steps": ["5"], "skip_after": 5}, "skip_after: expected from 0 to 4, found 5"),
        ({"skip_documents": ["a"], "skip_after": 240}, "skip_after: expected from 0 to 239"),
        ({"skip_steps": ["5"], "overrides": ["max_duration=2ep"]}, "found a max_duration in ep"),
        ({"skip_steps": ["5"], "overrides": ["epoch=1"]}, "found epoch 1"),
        ({"skip_steps": ["5"], "mixture": [{"weights": ["*=1"]}]}, "found a mixture"),
        ({"skip_documents": [8]}, "expected text, found 8"),
        ({"skip_by": "others", "skip_sources": ["a"]}, "skip_by"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    run = {"train": "config/train/olmo-tiny.yaml", "dataset": "stdlib", **settings}
    with pytest.raises(ValueError, match=message):
        skip_after(Plan({"runs": {"a": run}}), "a")


@pytest.mark.parametrize(
    ("settings", "step", "order", "overrides"),
    [
        ({"skip_steps": ["5"]}, "4", "global_indices.npy", ""),
        ({"skip_steps": ["5"]}, None, "global_indices-remaining.npy", "data.mixture=true"),
        ({"skip_sources": ["a"]}, None, "global_indices-remaining.npy", "--holes"),
        ({"skip_sources": ["a"], "skip_after": 9}, "9", "global_indices.npy", ""),
        ({}, None, "global_indices.npy", ""),
    ],
)
def test_a_link_before_the_difference_is_that_of_a_run_that_skips_nothing(
    settings: dict[str, Any], step: str | None, order: str, overrides: str
) -> None:
    run = {"train": "config/train/olmo-tiny.yaml", "dataset": "stdlib", **settings}
    plan = Plan({"runs": {"a": run}})
    assert order_until(plan, "a", step) == f"checkpoints/a/{order}"
    holes = "--holes" * bool(holes_path(plan, "a", step))
    assert overrides in override_flags(plan, "a", step) + holes
    assert overrides or not override_flags(plan, "a", step) + holes


def test_a_run_is_added_as_deep_as_the_others() -> None:
    text = "runs:  # ours\n\n   # the first\n   a:\n      train: a.yaml\nstore: b"
    assert yaml.safe_load(add_run(text, "c", {"train": "c.yaml"})) == {
        "runs": {"c": {"train": "c.yaml"}, "a": {"train": "a.yaml"}},
        "store": "b",
    }
    assert yaml.safe_load(add_run("runs:\n", "c", {})) == {"runs": {"c": {}}}


def test_a_link_whose_objects_are_lost_shares_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    settings = identity(TrainConfig(max_duration=24))
    inputs = {"tokens": ["a" * 64], "order": "b" * 64}
    folder = tmp_path / "checkpoints/run/step-16"
    folder.mkdir(parents=True)
    files = {name: folder / name for name in STATE}
    for path in files.values():
        path.write_text("bytes")
    action = Action(
        "training",
        3,
        {"settings": identity_until(TrainConfig(max_duration=24), 16), "until": 16},
        inputs,
    )
    made = {"final": {"files": {}, "aside": {}}}
    record: Any = {
        "key": action.key,
        "action": action.as_dict(),
        "content": content(made),
        "outputs": made,
        "facts": {},
        "conditions": {},
    }
    (folder / "record.json").write_text(sealed.dumps(record, 1))
    whole: Any = {"key": "c" * 64, "action": {"params": {"settings": settings}, "inputs": inputs}}
    assert known_states("run", whole) == {16: "checkpoints/run/step-16"}
    files["optim.safetensors"].unlink()
    assert known_states("run", whole) == {}
