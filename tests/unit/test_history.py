"""What a run's steps saw is told as it was, whatever the run was later continued with."""

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import train_on
from safetensors.torch import save_file
from servers import web_server
from small_run import LENGTH, config, metrics, run, settings

from olmo.config import DataConfig, TrainConfig
from olmo.data import order
from olmo.data.batches import OrderedDataset, TrainLoader
from olmo.inspect import history
from olmo.inspect.commands import inspect
from olmo.inspect.history import OrderSource, RecordedBatches, build_step_ranges, collect_segments
from olmo.inspect.replay import replay
from olmo.inspect.run import TrainedRun
from olmo.io import sealed
from olmo.runtime.process import EXIT_PAUSED
from olmo.train.segments import read_segments, training_conditions
from olmo.train.setup import describe_microbatches
from olmo.train.state import TrainState, duration

N = 45  # instances: 5 steps of 8, 3 of 12


@pytest.fixture
def place(tmp_path: Path) -> Path:
    ids = np.arange(N * LENGTH, dtype=np.uint16) % 58 + 2
    ids.tofile(tmp_path / "train.npy")
    return tmp_path


def small(place: Path, **changes: Any) -> dict[str, Any]:
    data = {"drop_last": False} | changes.pop("data", {})
    changes = {"evaluators": [], "save_interval_unsharded": 2, **changes}
    return settings(place, data=data, **changes)


def train(place: Path, **changes: Any) -> int:
    small_ = small(place, **changes)
    return run(place, **{k: v for k, v in small_.items() if k not in ("model", "optimizer")})


def written(folder: Path) -> dict[int, list[int]]:
    """A step's batch by data-indices, whose shares are dealt to the ranks in turn."""
    shares: dict[int, list[list[int]]] = {}
    count = len(list((folder / "data-indices").glob("*")))
    for rank in range(count):
        path = folder / f"data-indices/rank{rank}.tsv.gz"
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            step, *row = map(int, line.split("\t"))
            shares.setdefault(step, []).append(row)
    return {step: [i for dealt in zip(*rows, strict=True) for i in dealt]
            for step, rows in sorted(shares.items())}  # fmt: skip


def told(folder: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> list[dict[int, list[int]]]:
    """A step's batch by inspect, with data-indices and without."""

    def steps() -> dict[int, list[int]]:
        opened = TrainedRun(str(folder), **flags)
        assert opened.steps is not None
        found = {}
        for step in range(1, opened.steps + 1):
            batch = list(opened.instances(step))
            found[step] = [instance.index for instance in batch]
            for one in batch:
                first = one.index * LENGTH
                assert one.tokens.tolist() == [(first + i) % 58 + 2 for i in range(LENGTH)]
        return found

    both = [steps()]
    with monkeypatch.context() as patch:
        patch.setattr(RecordedBatches, "batch", lambda *_: None)
        both.append(steps())
    return both


def positions(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "latest-unsharded/train.pt", weights_only=True)


@pytest.mark.slow
def test_epochs_another_batch_size_and_other_numbers_of_processes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 → 12 → 6 instances a step, 1 → 2 → 1 processes, in the midst of epochs."""
    n, log = 41, place / "log"
    (np.arange(n * LENGTH, dtype=np.uint16) % 58 + 2).tofile(place / "train.npy")
    cases = {name: {"save_folder": str(place / name), "data": {"drop_last": name == "cut"}}
             for name in ("whole", "cut")}  # fmt: skip
    resumed: dict[str, Any] = {"try_load_latest_save": True, "max_duration": "3ep"}
    for changes in cases.values():
        assert train(place, stop_after=4, **changes) == EXIT_PAUSED
    second = {**resumed, "global_train_batch_size": 12, "stop_after": 2}
    assert train_on(2, [small(place, **second, **c) for c in cases.values()], log) == [75, 75]
    for name, changes in cases.items():
        assert train(place, global_train_batch_size=6, **resumed, **changes) == 0
        saw = written(place / name)
        sizes = [len(batch) for batch in saw.values()]
        # The 9 that are left of the first epoch after 32 are no batch of 12: on both processes the
        # second epoch begins. Its 17 after two batches are two of 6, the third epoch is six.
        assert sizes == [8] * 4 + [12] * 2 + [6] * (2 + 6)
        at = positions(place / name)
        assert at["global_train_tokens_seen"] == sum(sizes) * LENGTH
        assert (at["epoch"], at["global_train_examples_seen_this_epoch"]) == (2, 36)
        orders = [order.global_indices(n, 6198, epoch).tolist() for epoch in range(3)]
        flat = [index for batch in saw.values() for index in batch]
        assert flat == orders[0][:32] + orders[1][:36] + orders[2][:36]
        assert told(place / name, monkeypatch) == [saw, saw]
        opened = TrainedRun(str(place / name))
        assert [opened.batch(step)[1] for step in (4, 5, 6, 7)] == [1, 2, 2, 1]
        shares = [(i.position, i.rank, i.index) for i in opened.instances(5, rank=1)]
        assert shares == [(p, 1, saw[5][p]) for p in range(1, 12, 2)]
        for instance in (0, 7, 40):
            times = [(s, b.index(instance), instance) for s, b in saw.items() if instance in b]
            assert list(opened.find_instances(np.array([instance]))) == times


def test_what_is_trained_twice_counts_the_last_time(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "run"
    assert train(place, stop_after=8) == EXIT_PAUSED
    first = written(folder)
    again = {"load_path": str(folder / "step4-unsharded"), "save_overwrite": True, "seed": 7}
    assert train(place, stop_after=2, **again) == EXIT_PAUSED
    said = capsys.readouterr()
    assert "steps 5 to 8 are trained again" in said.out
    assert "WARNING: the seed of their order changed" in said.err
    saw = written(folder)
    assert list(saw) == [1, 2, 3, 4, 5, 6] and saw[4] == first[4] and saw[5] != first[5]
    assert saw[5] == order.global_indices(N, 7, 0)[32:40].tolist(), "another seed's order"
    assert told(folder, monkeypatch) == [saw, saw]
    inspect(str(folder), 5)
    assert "step 5 was trained more than once" in capsys.readouterr().err
    inspect(str(folder), 4)
    assert "more than once" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a step from 1 to 6, found 7"):
        inspect(str(folder), 7)


def test_steps_of_which_no_indices_are_kept_are_not_those_of_before(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place / "run"
    assert train(place, stop_after=6) == EXIT_PAUSED
    saw = written(folder)
    again = {"load_path": str(folder / "step4-unsharded"), "save_overwrite": True}
    assert train(place, stop_after=2, global_train_batch_size=4, save_data_indices=False, **again)
    kept = {step: saw[step] for step in (1, 2, 3, 4)}
    assert written(folder) == kept
    ids = order.global_indices(N, 6198, 0).tolist()
    kept |= {5: ids[32:36], 6: ids[36:40]}
    assert told(folder, monkeypatch) == [kept, kept]


def test_steps_before_the_other_run_that_goes_on_here(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(place, stop_after=4) == EXIT_PAUSED
    here: dict[str, Any] = {"save_folder": str(place / "here")}
    given = str(place / "run/step4-unsharded")
    assert train(place, load_path=given, global_train_batch_size=4, **here) == 0
    saw = written(place / "here")
    assert list(saw) == list(range(5, 11))
    opened = TrainedRun(str(place / "here"))
    with pytest.raises(ValueError, match=r"step 4 was not trained here: .* from step 4 of .*/run"):
        opened.batch(4)
    assert {step: opened.batch(step)[0].tolist() for step in saw} == saw
    monkeypatch.setattr(RecordedBatches, "batch", lambda *_: None)
    assert {step: TrainedRun(str(place / "here")).batch(step)[0].tolist() for step in saw} == saw


def test_other_token_files_are_not_read_as_those_of_then(place: Path, capsys: Any) -> None:
    folder = place / "run"
    assert train(place, stop_after=4) == EXIT_PAUSED
    (np.arange(50 * LENGTH, dtype=np.uint16) % 58 + 2).tofile(place / "more.npy")
    data = {"paths": [str(place / "more.npy")]}
    assert train(place, stop_after=2, try_load_latest_save=True, data=data) == EXIT_PAUSED
    assert "WARNING: the token files changed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="step 4 was trained on other token files"):
        TrainedRun(str(folder)).batch(4)
    saw = written(folder)
    assert TrainedRun(str(folder)).batch(5)[0].tolist() == saw[5]
    assert TrainedRun(str(folder / "step4-unsharded")).batch(4)[0].tolist() == saw[4]


def test_an_order_that_was_given_is_that_of_its_epoch(place: Path, monkeypatch: Any) -> None:
    given = np.arange(N)[::-1]
    order.write_order(given, place / "reversed")
    changes = {"epoch": 1, "data": {"order_path": str(place / "reversed")}, "max_duration": 7}
    assert train(place, **changes) == 0
    saw = written(place / "run")
    ids = given.tolist()[:40] + order.global_indices(N, 6198, 2).tolist()
    assert [i for batch in saw.values() for i in batch] == ids[: 7 * 8]
    assert told(place / "run", monkeypatch) == [saw, saw]
    # Gone on with, without naming it.
    again = {"epoch": 1, "try_load_latest_save": True, "max_duration": 8}
    assert train(place, **again) == 0
    assert TrainedRun(str(place / "run")).batch(1)[0].tolist() == saw[1]
    monkeypatch.setattr(RecordedBatches, "batch", lambda *_: None)
    with pytest.raises(ValueError, match=r"expected the order reversed of .* --order reversed"):
        TrainedRun(str(place / "run")).batch(1)
    assert TrainedRun(str(place / "run"), str(place / "reversed")).batch(1)[0].tolist() == saw[1]


def test_a_run_that_nobody_wrote_of(place: Path, monkeypatch: Any) -> None:
    """OLMo's own: its order's file is of the newest epoch."""
    assert train(place, max_duration=7) == 0
    folder, saw = place / "run", written(place / "run")
    by_hand = TrainedRun(str(folder / "config.yaml"), str(folder / "train_data/global_indices.npy"))
    assert by_hand.batch(1)[0].tolist() == saw[1], "what is written down is asked first"
    (folder / "segments.jsonl").unlink()
    newest = order.read_order(folder / "train_data/global_indices.npy")
    assert newest.tolist() == order.global_indices(N, 6198, 1).tolist()
    for _ in "ab":
        assert {step: TrainedRun(str(folder)).batch(step)[0].tolist() for step in saw} == saw
        monkeypatch.setattr(RecordedBatches, "batch", lambda *_: None)
    with pytest.raises(ValueError, match=r"global_indices.npy is the order of epoch 1, which has"):
        TrainedRun(str(folder), str(folder / "train_data/global_indices.npy")).batch(1)
    cfg = TrainConfig.load(folder / "config.yaml")
    cfg.update_with(seed=8).save(folder / "config.yaml")
    with pytest.raises(ValueError, match=r"global_indices.npy is not the order of 45 instances by"):
        TrainedRun(str(folder)).batch(1)


def test_a_run_by_url(place: Path) -> None:
    assert train(place, stop_after=4) == EXIT_PAUSED
    again: dict[str, Any] = {"try_load_latest_save": True, "global_train_batch_size": 12}
    assert train(place, max_duration="2ep", **again) == 0
    saw = written(place / "run")
    with web_server(place) as web:
        for folder in ("run", "run/step4-unsharded"):
            opened = TrainedRun(f"{web}/{folder}")
            assert {step: opened.batch(step)[0].tolist() for step in saw} == saw


def test_a_dry_run_leaves_what_is_written_of_a_run(place: Path) -> None:
    assert train(place, stop_after=4) == EXIT_PAUSED
    folder = place / "run"
    names = ("config.yaml", "metrics.jsonl", "segments.jsonl", "data-indices/rank0.tsv.gz")
    before = [(folder / name).read_bytes() for name in names]
    again: dict[str, Any] = {"save_overwrite": True, "no_pre_train_checkpoint": True}
    assert train(place, dry_run=True, global_train_batch_size=4, **again) == 0
    assert [(folder / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("start", [0, 7, 9])
@pytest.mark.parametrize("drop_last", [True, False])
def test_all_processes_have_the_same_number_of_whole_batches(start: int, drop_last: bool) -> None:
    """At any place, also one whose rest the processes cannot share evenly."""
    lengths = set()
    for rank in range(2):
        dataset = OrderedDataset(
            list(range(16)), 4, world_size=2, rank=rank, start_index=start, drop_last=drop_last
        )
        loader = TrainLoader(dataset, lambda items: {}, drop_last, pin_memory=False)
        lengths.add(len(loader) if drop_last else len(dataset.rank_indices()) // 2)
    whole = (16 - start) // 4
    assert lengths == {whole} if drop_last else min(lengths) == whole


@pytest.mark.parametrize(
    ("epoch", "examples", "steps"), [(0, 0, 10), (0, 40, 5), (0, 20, 8), (1, 44, 0), (2, 8, 0)]
)
def test_epochs_end_where_the_data_does(place: Path, epoch: int, examples: int, steps: int) -> None:
    """Of 45 instances, in steps of 8, wherever another batch size led to."""
    cfg = config(place, max_duration="2ep")
    position = TrainState(11, epoch, examples, 700)
    assert duration(cfg, position, 8 * LENGTH, N) == (11 + steps, 700 + steps * 8 * LENGTH)
    later = TrainState(11, epoch + 1, examples, 700)
    assert duration(cfg.update_with(epoch=1), later, 8 * LENGTH, N)[0] == 11 + steps


def test_the_duration_that_is_told_counts_what_was_seen(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place, stop_after=4) == EXIT_PAUSED
    capsys.readouterr()
    again: dict[str, Any] = {"try_load_latest_save": True, "global_train_batch_size": 12}
    assert train(place, max_duration="1ep", **again) == 0
    assert "duration: steps 5 to 5 (704 tokens" in capsys.readouterr().out
    assert train(place, max_duration="1ep", **again) == 0
    assert "duration: nothing to do, all 5 steps are done" in capsys.readouterr().out
    assert metrics(place / "run")[-1]["throughput/total_tokens"] == (4 * 8 + 12) * LENGTH


def test_microbatches_are_told_as_they_are() -> None:
    assert describe_microbatches(8, 4) == "in 2 microbatches of 4"
    assert describe_microbatches(8, 3) == "in 3 microbatches, of 3, 3 and 2"
    assert describe_microbatches(8, 16) == "in 1 microbatch of 8"
    assert describe_microbatches(1000, 3) == "in 334 microbatches, of 333 of 3 and 1"


def test_what_is_written_of_a_segment(place: Path) -> None:
    assert train(place, stop_after=2) == EXIT_PAUSED
    (segment,) = map(json.loads, (place / "run/segments.jsonl").read_text().splitlines())
    known = {"after": 0, "batch": 8, "epoch": 0, "examples": 0, "seed": 6198, "instances": N}
    assert known.items() <= segment.items() and segment["drop_last"] is False


@pytest.mark.slow
def test_a_replay_has_as_many_processes_as_each_step_had(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("OLMO_STORE", str(place / "store"))
    folder, final = place / "checkpoints/r/run", place / "checkpoints/r/final"
    changes: dict[str, Any] = {"save_folder": str(folder), "max_duration": 7}
    folder.parent.mkdir(parents=True)
    assert train(place, stop_after=4, **changes) == EXIT_PAUSED
    assert train_on(2, [small(place, try_load_latest_save=True, **changes)], place / "log") == [0]
    final.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(folder / name, final)
    weights = torch.load(folder / "latest-unsharded/model.pt", weights_only=True)
    save_file(weights, final / "model.safetensors")
    known = read_segments(folder)
    facts = {"facts": {"steps": 7, "segments": known}, "conditions": training_conditions(known)}
    (final / "record.json").write_text(sealed.dumps(facts | {"action": {"inputs": {}}}))
    saw = written(folder)
    assert {step: TrainedRun("r").batch(step)[0].tolist() for step in saw} == saw
    assert [TrainedRun("r").batch(step)[1] for step in (4, 5)] == [1, 2]
    less = [{name: segment[name] for name in ("after", "processes")} for segment in known]
    older = {**facts, "facts": {"steps": 7, "segments": less}, "action": {"inputs": {}}}
    (final / "record.json").write_text(sealed.dumps(older))  # by a version that wrote down less
    assert {step: TrainedRun("r").batch(step)[0].tolist() for step in saw} == saw
    (final / "record.json").write_text(sealed.dumps(facts | {"action": {"inputs": {}}}))
    capsys.readouterr()
    replay("r", steps="3..7")
    said = capsys.readouterr().out
    assert "steps 3 to 4: world size 1, as in the run" in said
    assert "steps 5 to 7: world size 2, as in the run" in said
    assert "5 steps, equal to the bit" in said and "weights: largest difference 0" in said


def test_a_chain_is_told_link_by_link() -> None:
    def record(sha256: str, segments: list[dict[str, Any]], **inputs: Any) -> dict[str, Any]:
        outputs = {"final": {"files": {"model": {"sha256": sha256, "size": 1}}, "aside": {}}}
        action = {"stage": "training", "inputs": inputs}
        facts = {"steps": 9, "segments": segments}
        return {"key": sha256, "action": action, "outputs": outputs, "facts": facts}

    first = record("a", [{"after": 0, "processes": 1}, {"after": 2, "processes": 2}])
    second = record("b", [{"after": 4, "processes": 4}], after=["a"])
    last = record("c", [{"after": 6, "processes": 8}], after=["b"])
    store: Any = SimpleNamespace(records=lambda: [first, second, last])
    found = collect_segments(store, last)
    assert [(s["after"], s["processes"]) for s in found] == [(0, 1), (2, 2), (4, 4), (6, 8)]
    cfg = TrainConfig(global_train_batch_size=8, data=DataConfig(drop_last=True))
    told = build_step_ranges(found, OrderSource(cfg, N, None, is_fixed=True))
    assert [history.find_step_range(step, told).world_size for step in (2, 3, 5, 9)] == [1, 2, 4, 8]
    ids = [order.global_indices(N, 6198, epoch).tolist() for epoch in range(2)]
    for step in range(1, 10):
        epoch, place = divmod(step - 1, 5)
        batch = history.find_step_range(step, told).seen.instances(step).tolist()
        assert batch == ids[epoch][place * 8 : place * 8 + 8]
    store = SimpleNamespace(records=lambda: [last])  # the others were removed
    told = build_step_ranges(
        collect_segments(store, last), OrderSource(cfg, N, None, is_fixed=True)
    )
    with pytest.raises(ValueError, match="step 6 was not trained here: this run continues from"):
        history.find_step_range(6, told)
    with pytest.raises(ValueError, match="the instances of the steps after 6 were not recorded"):
        _ = history.find_step_range(7, told).seen


def test_steps_whose_segments_were_damaged_are_refused_and_later_ones_told() -> None:
    settings = {"batch": 8, "epoch": 0, "examples": 16, "seed": 6198, "drop_last": True}
    later = {"after": 2, "processes": 1, "instances": N, **settings}
    cfg = TrainConfig(global_train_batch_size=8, data=DataConfig(drop_last=True))
    told = build_step_ranges([{"after": 0, "damaged": True}, later], OrderSource(cfg, N, None))
    with pytest.raises(
        ValueError, match=r"segments.jsonl was damaged, so the settings of the steps after 0"
    ):
        _ = history.find_step_range(2, told).seen
    expected = order.global_indices(N, 6198, 0).tolist()[16:24]
    assert history.find_step_range(3, told).seen.instances(3).tolist() == expected
