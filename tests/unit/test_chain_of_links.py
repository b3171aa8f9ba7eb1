"""A chain of links ends with the bytes of a run in one piece; runs that begin alike share links."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import config, run

import olmo.pipeline.train
from olmo.cluster.launch import Geometry
from olmo.config import TrainConfig
from olmo.config.identity import identity
from olmo.data import order
from olmo.pipeline.fork import known_states
from olmo.pipeline.reuse import find_saved
from olmo.pipeline.train import training
from olmo.store.stage import current_store
from olmo.train.chain import STATE, depends_on_end, identity_until, list_link_steps
from olmo.train.loop import train

WSD = {"name": "warmup_stable_decay", "t_warmup": 3, "t_decay": 4}


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train a piece of a run through the store, in this process; its record, and who trained."""
    run(tmp_path, dry_run=True)  # makes the data, and puts this process's settings back
    order.write_order(order.global_indices(203, 6198), tmp_path / "order.npy")
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    ran: list[str] = []

    def here(path: Path, geometry: Geometry, threads: int | None) -> None:
        ran.append(path.parent.parent.name)
        assert train(TrainConfig.load(path)) == 0

    monkeypatch.setattr(olmo.pipeline.train, "launch", here)

    def piece(
        name: str,
        after: Path | None = None,
        until: int | None = None,
        start: Path | None = None,
        **changes: Any,
    ) -> tuple[Path, dict[str, Any], bool]:
        cfg = config(tmp_path, evaluators=[], save_interval_unsharded=3, **changes)
        before = len(ran)
        record = training(
            tokens=[tmp_path / "train.npy"],
            order=tmp_path / "order.npy",
            settings=identity(cfg) if until is None else identity_until(cfg, until),
            final=tmp_path / "checkpoints" / name,
            attempt=tmp_path / "checkpoints" / "run",
            cfg=cfg,
            heldout=[],
            geometry=Geometry(),
            start=None if start is None else [start / STATE[0]],
            after=None if after is None else [after / part for part in STATE],
            until=until,
        )
        return tmp_path / "checkpoints" / name, record, len(ran) > before

    return piece


@pytest.mark.parametrize("scheduler", [{}, WSD], ids=["cosine", "wsd"])
def test_a_chain_ends_as_the_whole(trained: Any, scheduler: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"max_duration": 30, "scheduler": scheduler, "max_grad_norm_ratio": 1}
    _, whole, _ = trained("whole", **changes)
    first, _, _ = trained("step-7", until=7, **changes)
    second, link, _ = trained("step-26", after=first, until=26, **changes)  # in the second epoch
    chained, last, ran = trained("final", after=second, **changes)
    assert ran and last["content"] == whole["content"]
    assert last["key"] != whole["key"] and link["facts"]["steps"] == 26
    steps = [json.loads(line)["step"] for line in (chained / "metrics.jsonl").open()]
    assert steps == list(range(1, 31))
    assert last["facts"]["segments"][0]["after"] == 26


def test_runs_that_begin_alike_share_their_links(trained: Any) -> None:
    short, long = ({"max_duration": n, "scheduler": WSD} for n in (12, 20))
    first, one, ran = trained("short/step-6", until=6, **short)
    assert ran
    shared, two, ran = trained("long/step-6", until=6, **long)
    assert not ran and two["key"] == one["key"]
    assert not trained("other/step-6", until=6, **long | {"scheduler": WSD | {"t_decay": 9}})[2]
    # In the decay they part: it begins at step 8 of the short run.
    key = trained("short/step-10", after=first, until=10, **short)[1]["key"]
    assert trained("long/step-10", after=shared, until=10, **long)[1]["key"] != key
    assert trained("third/step-6", until=6, **long | {"seed": 7})[2]


def test_what_is_felt_of_the_end(tmp_path: Path) -> None:
    def until(**scheduler: Any) -> list[bool]:
        cfg = config(tmp_path, max_duration=20, scheduler=scheduler)
        return [depends_on_end(cfg, step) for step in (2, 10, 16, 17)]

    assert until(name="cosine_with_warmup", t_warmup=3) == [False, True, True, True]
    assert until(name="cosine_with_warmup", t_warmup=3, t_max=20) == [False] * 4
    assert until(name="constant") == until(name="inverse_sqrt_with_warmup") == [False] * 4
    assert until(**WSD) == [False, False, False, True]


def test_where_a_run_is_cut(tmp_path: Path) -> None:
    cfg = config(tmp_path, max_duration=10)
    assert list_link_steps(cfg, [], None) == [] and list_link_steps(cfg, [3, 9], None) == [3, 9]
    assert list_link_steps(cfg, [], 4) == [4, 8] and list_link_steps(cfg, [], 5) == [5]
    assert list_link_steps(config(tmp_path, max_duration=f"{8 * 16 * 9 + 1}T"), [], 4) == [4, 8]
    epochs = config(tmp_path, max_duration="2ep")
    assert list_link_steps(epochs, [30], None) == [30]
    for wrong, at, every, said in (
        (cfg, [10], None, "links: expected rising steps from 1 to below 10, found"),
        (cfg, [5, 3], None, "rising"),
        (cfg, [5], 3, "expected one of them"),
        (cfg, [], 0, "link_every: expected at least 1"),
        (epochs, [], 5, "max_duration in steps or tokens, found 2ep"),
        (config(tmp_path, max_duration="many"), [], 5, "max_duration: expected steps .*many"),
    ):
        with pytest.raises(ValueError, match=said):
            list_link_steps(wrong, at, every)


def test_an_interrupted_run_passes_over_nothing(tmp_path: Path) -> None:
    cfg = config(tmp_path, fast_forward_batches=2)
    filled = olmo.pipeline.train.fill_in_paths(cfg, [], tmp_path / "order", [], tmp_path)
    assert filled.try_load_latest_save and filled.fast_forward_batches is None


def test_a_link_is_found_in_a_run_that_began_elsewhere(trained: Any, tmp_path: Path) -> None:
    """From another run's weights, or after a link: where it began is an input, not a setting."""
    changes: dict[str, Any] = {"max_duration": 12}
    fresh = {"reset_optimizer_state": True, "reset_trainer_state": True}
    first, _, _ = trained("first", until=3, **changes)
    _, after, _ = trained("after", after=first, **changes)
    _, started, _ = trained("started", start=first, **changes, **fresh)
    for record, more in ((after, {}), (started, fresh)):
        cfg, inputs = config(tmp_path, **changes, **more), record["action"]["inputs"]
        saved = find_saved(current_store(), inputs, identity_until(cfg, 6), 6)
        assert saved and saved.parent.parent.name == record["key"]
        other = identity_until(cfg.update_with(seed=7), 6)
        assert find_saved(current_store(), inputs, other, 6) is None


def test_a_fork_begins_at_no_link_of_other_settings(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained("a/step-3", until=3, max_duration=9)
    trained("a/step-6", until=6, max_duration=9, seed=7)  # of before a change of the config
    trained("a/step-7", until=7, max_duration=9, seed=7)
    _, record, _ = trained("a/final", max_duration=9)
    states = known_states("a", record)
    assert states[3] == "checkpoints/a/step-3"
    assert states[6] == "checkpoints/a/run/step6-unsharded" and 7 not in states


def test_a_link_is_found_in_a_run_that_was_cut_elsewhere(trained: Any) -> None:
    """A trunk with other branches: the state of a step is the same, whatever lies before it."""
    changes: dict[str, Any] = {"max_duration": 12, "scheduler": WSD}
    three, _, _ = trained("a/step-3", until=3, **changes)
    _, known, ran = trained("a/step-8", after=three, until=8, **changes)
    assert ran
    two, _, ran = trained("b/step-2", until=2, **changes)
    assert ran
    found, record, ran = trained("b/step-8", after=two, until=8, **changes)
    assert record["key"] != known["key"] and record["content"] == known["content"]
    steps = [json.loads(line)["step"] for line in (found / "metrics.jsonl").open()]
    assert steps == list(range(1, 9))
    assert record["facts"]["steps"] == 8 and taken_over(record)
    # Not where the link before has other settings, though the last one's are the same.
    other, _, _ = trained("c/step-2", until=2, **changes | {"seed": 7})
    _, record, _ = trained("c/step-8", after=other, until=8, **changes)
    assert record["content"] != known["content"] and not taken_over(record)


def taken_over(record: dict[str, Any]) -> bool:
    """Whether a training's attempt has nothing but segments of before its link."""
    return record["facts"]["segments"][0]["after"] == 3
