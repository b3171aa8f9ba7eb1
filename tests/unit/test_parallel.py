"""Several processes: the same numbers as one, the same data at any number, and none left over."""

import os
import resource
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, train_on
from small_run import metrics, read_until, run, same, settings, start, state
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import olmo.distributed.reduce
from olmo.checkpoint.read import find_newest, load_optimizer_state, load_weights, open_checkpoint
from olmo.config import TrainConfig
from olmo.distributed.parallelize import parallelize
from olmo.distributed.reduce import GradientReducer
from olmo.distributed.world import join_world, leave_world
from olmo.model import OLMo
from olmo.optim.build import build_optimizer
from olmo.pipeline.convert import convert
from olmo.train.loop import train
from olmo.train.saver import _copy_to_host

# What is computed, and how it is spread.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw-ratio": {"max_grad_norm": None, "max_grad_norm_ratio": 1.1},
    "lionw": {"optimizer": {"name": "lionw", "learning_rate": 1e-3}},
    "lionw-ratio": {"optimizer": {"name": "lionw", "learning_rate": 1e-3},
                    "max_grad_norm_ratio": 1.1},
    "muon": {"optimizer": {"name": "muon"}, "max_grad_norm": 0.5},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2": {"wrapping_strategy": None},
    "FSDP2-blocks": {"wrapping_strategy": "by_block", "sharding_strategy": "SHARD_GRAD_OP"},
    "HSDP": {"wrapping_strategy": "by_block", "sharding_strategy": "HYBRID_SHARD",
             "hybrid_sharding_num_model_replicas": 2},
}  # fmt: skip
CASES = {
    2: [("DDP", "muon"), ("FSDP2", "adamw"), *(("FSDP2-blocks", name) for name in OPTIMIZERS)],
    4: [("DDP", "adamw"), *(("FSDP2", name) for name in OPTIMIZERS),
        *(("HSDP", name) for name in ("adamw-ratio", "lionw", "muon"))],
}  # fmt: skip
LONG: dict[str, Any] = {"max_duration": 20, "eval_interval": 10}


def spread(way: str) -> dict[str, Any]:
    """The settings of a way."""
    if way == "DDP":
        return {}
    return {"distributed_strategy": "fsdp", "fsdp": WAYS[way]}


def log(folder: Path) -> Path:
    return folder / "said.txt"


def rows(run_folder: Path) -> dict[int, set[int]]:
    """Step → the instances that all processes together computed."""
    found: dict[int, set[int]] = {}
    for lines in state(run_folder)["indices"]:
        for line in lines.decode().splitlines():
            step, *instances = map(int, line.split("\t"))
            found.setdefault(step, set()).update(instances)
    return found


def agree(one: Path, many: Path) -> None:
    """Two runs have the same steps, and the same numbers but for rounding."""
    a, b = metrics(one), metrics(many)
    first = b[0]["step"]
    a = [line for line in a if line["step"] >= first]
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for name in ("train/CrossEntropyLoss", "optim/total_grad_norm", "eval/heldout/Perplexity"):
        x, y = ([line[name] for line in lines if name in line] for lines in (a, b))
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    assert run(tmp_path, save_folder=str(tmp_path / "one"), **LONG) == 0
    case = settings(tmp_path, save_folder=str(tmp_path / "two"), **LONG)
    assert train_on(2, [case], log(tmp_path)) == [0]
    assert "2 replicas, gradients averaged" in log(tmp_path).read_text()
    agree(tmp_path / "one", tmp_path / "two")
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one process for each optimizer."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, changes in OPTIMIZERS.items():
        assert run(folder, save_folder=str(folder / name), **LONG, **changes) == 0
    return folder


@pytest.fixture(scope="module", params=CASES)
def many(one: Path, request: pytest.FixtureRequest) -> tuple[int, Path]:
    """The same on several processes, in every way; a sharded checkpoint at step 7."""
    size: int = request.param
    cases = []
    for way, name in CASES[size]:
        folder = str(one / f"{size}-{way}-{name}")
        changes = LONG | spread(way) | OPTIMIZERS[name] | {"save_folder": folder}
        if way != "DDP":
            changes |= {"save_interval": 7, "save_interval_unsharded": None}
            changes |= {"activation_checkpointing": "one_in_two"}
        cases.append(settings(one, **changes))
    assert train_on(size, cases, log(one)) == [0] * len(cases)
    return size, one


@pytest.mark.slow
def test_many_compute_what_one_does(many: tuple[int, Path]) -> None:
    size, folder = many
    for way, name in CASES[size]:
        agree(folder / name, folder / f"{size}-{way}-{name}")


@pytest.mark.slow
def test_sharded_ones_load_at_any_number(many: tuple[int, Path]) -> None:
    """What 2 or 4 processes saved, 1 and the other number go on from."""
    size, folder = many
    names = [name for way, name in CASES[size] if way in ("FSDP2", "FSDP2-blocks")][-3:]
    way = CASES[size][2][0]
    for other in (1, 6 - size):
        cases = []
        for name in names:
            place = f"{size}-{way}-{name}"
            changes = LONG | OPTIMIZERS[name] | spread(way if other > 1 else "DDP")
            changes |= {"load_path": str(folder / place / "step7")}
            changes |= {"save_folder": str(folder / f"{other}-after-{place}")}
            cases.append(settings(folder, **changes))
        if other == 1:
            assert [run(folder, **case) for case in cases] == [0] * len(cases)
        else:
            assert train_on(other, cases, log(folder)) == [0] * len(cases)
        for name in names:
            agree(folder / name, folder / f"{other}-after-{size}-{way}-{name}")


@pytest.mark.slow
def test_resumed_equals_straight_on_two(tmp_path: Path) -> None:
    ways: list[tuple[str, dict[str, Any]]] = [
        ("ddp", {}),
        ("fsdp", {"distributed_strategy": "fsdp", "precision": "amp_bf16"}),
        ("kept", {"distributed_strategy": "fsdp", "save_interval": 3,
                  "save_interval_unsharded": None, "optimizer": {"name": "muon"}}),
    ]  # fmt: skip
    cases = []
    for name, changes in ways:
        straight = {"save_folder": str(tmp_path / f"{name}-straight")}
        resumed = {"save_folder": str(tmp_path / f"{name}-resumed")}
        cases += [
            settings(tmp_path, **changes, **straight),
            settings(tmp_path, **changes, **resumed, stop_after=7),
            settings(tmp_path, **changes, **resumed, try_load_latest_save=True),
        ]
    assert train_on(2, cases, log(tmp_path)) == [0, 75, 0] * len(ways)
    for name, _ in ways:
        folders = [tmp_path / f"{name}-straight", tmp_path / f"{name}-resumed"]
        kept = [everything(folder) for folder in folders]
        assert same(kept[0], kept[1]), name


def everything(run_folder: Path) -> dict[str, Any]:
    """`state` of a run, of whichever kind its last checkpoint is."""
    from olmo import checkpoint

    if (run_folder / "latest-unsharded").exists():
        return state(run_folder)
    last = checkpoint.load_checkpoint(run_folder / "latest")
    return {"model": last.model, "optim": last.optim, "train": last.train,
            "metrics": metrics(run_folder)}  # fmt: skip


@pytest.mark.slow
def test_the_data_goes_on_at_another_number_of_processes(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"evaluators": [], "save_folder": str(tmp_path / "changing")}
    assert run(tmp_path, evaluators=[]) == 0
    stopping = settings(tmp_path, stop_after=3, **changes)
    resuming = settings(tmp_path, try_load_latest_save=True, **changes)
    assert train_on(2, [stopping], log(tmp_path)) == [75]
    assert run(tmp_path, stop_after=3, try_load_latest_save=True, **changes) == 75
    assert train_on(2, [resuming], log(tmp_path)) == [0]
    losses = [
        [m["train/CrossEntropyLoss"] for m in metrics(tmp_path / name)[1:]]
        for name in ("run", "changing")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert rows(tmp_path / "run") == rows(tmp_path / "changing")


def train_with_little_disk(case: dict[str, Any]) -> str:
    """What a rank says whose run cannot save: the second's disk is full."""
    if os.environ["RANK"] == "1":
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))
    try:
        train(TrainConfig.new(**case))
    except OSError as error:
        return str(error)
    return "finished"


@pytest.mark.slow
def test_a_full_disk_of_one_process_is_said_by_all(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"save_interval": 4, "save_interval_unsharded": None}
    changes |= spread("FSDP2") | {"evaluators": [], "no_pre_train_checkpoint": True}
    case = settings(tmp_path, **changes)
    found = on_ranks(2, [(train_with_little_disk, (case,))], log(tmp_path))
    assert "could not write the checkpoint" in found[0][0] and "step4 (File too" in found[0][0]
    assert "File too large" in found[1][0]
    assert find_newest(tmp_path / "run") is None
    assert train_on(2, [case | {"save_overwrite": True}], log(tmp_path)) == [0]


def changed_while_saved() -> list[list[float]]:
    """Copies for a save, of a tensor that changes afterwards, as one process spreads it."""
    dist.init_process_group("gloo")
    copies = []
    for places in ([Shard(0)], [Replicate(), Shard(0)]):
        mesh = init_device_mesh("cpu", (1,) * len(places))
        spread = distribute_tensor(torch.zeros(2), mesh, places)
        copies += [_copy_to_host(spread, whole=True), _copy_to_host(spread, whole=False).to_local()]
        spread.to_local().add_(1)
    dist.destroy_process_group()
    return [copy.tolist() for copy in copies]


@pytest.mark.slow
def test_what_is_being_saved_does_not_change(tmp_path: Path) -> None:
    found = on_ranks(1, [(changed_while_saved, ())], log(tmp_path))
    assert found == {0: [[[0.0, 0.0]] * 4]}


def bytes_loaded(case: dict[str, Any], folder: Path) -> int:
    """How many bytes this rank reads to take its share of a checkpoint."""
    cfg = TrainConfig.new(**case)
    world = join_world()
    model = OLMo(cfg.model)
    parallelize(cfg, model, world)
    optimizer = build_optimizer(cfg, model)
    before = bytes_read()
    checkpoint = open_checkpoint(folder)
    load_weights(model, checkpoint)
    load_optimizer_state(model, optimizer, checkpoint)
    read = bytes_read() - before
    leave_world(world)
    return read


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.slow
def test_each_process_reads_its_own_share(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": {"d_model": 256}, "evaluators": [], "max_duration": 1}
    changes |= spread("FSDP2-blocks") | {"save_interval": 1, "save_interval_unsharded": None}
    case = settings(tmp_path, **changes)
    assert train_on(4, [case], log(tmp_path)) == [0]
    folder = tmp_path / "run/step1"
    size = sum(path.stat().st_size for path in (folder / "model_and_optim").iterdir())
    whole = convert(folder, tmp_path, "unsharded")
    work = [(bytes_loaded, (case, place)) for place in (folder, whole)]
    for sharded, unsharded in on_ranks(4, work, log(tmp_path)).values():
        assert size / 5 < sharded < size / 3, (sharded, size)
        assert unsharded < size / 10, "it lies in the file, and is in memory once for all"


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["a rank", "the launcher"])
def test_when_one_dies_all_are_gone(tmp_path: Path, victim: str) -> None:
    process = start(tmp_path, 2, max_duration=100_000, save_interval_unsharded=None)
    read_until(process, lambda line: line.startswith("step") and " 10/" in line)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1] if victim == "a rank" else process.pid, 9)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/status").exists() for pid in ranks):
        assert time.monotonic() < deadline, "a process of the run is left after ten seconds"
        time.sleep(0.1)
    process.communicate(timeout=30)
    assert process.returncode != 0


def sums_twice() -> list[float]:
    """A tensor's sum over processes, asked for twice, and the tensor."""
    world = join_world()
    own = torch.tensor(world.rank + 1.0)
    found = [float(world.sum(own)), float(world.sum(own)), float(own)]
    leave_world(world)
    return found


@pytest.mark.slow
def test_sum_does_not_change_its_argument(tmp_path: Path) -> None:
    found = on_ranks(2, [(sums_twice, ())], log(tmp_path))
    assert found == {0: [[3.0, 3.0, 1.0]], 1: [[3.0, 3.0, 2.0]]}


def means(overlapped: bool) -> list[Any]:
    """Gradients' means over processes: sums begun while backward computes, or all at its end."""
    olmo.distributed.reduce.BUCKET_BYTES = 4 * 20  # a few parameters a bucket
    world = join_world()
    torch.manual_seed(0)
    sizes = [5, 7, 3, 11, 2, 6]
    layers = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    frozen, unused = layers[2].bias.requires_grad_(False), nn.Parameter(torch.zeros(9))
    parameters = [*layers[:2].parameters(), unused, *layers[2:].parameters()]
    reducer = GradientReducer(parameters, world)
    for part in range(2):  # microbatches, other ones on each process
        if overlapped and part == 1:
            reducer.prepare_for_backward()
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(2 * world.rank + part))
        layers(inputs).square().sum().backward()
    under_way = len(reducer._in_flight)
    reducer.finish()
    leave_world(world)
    assert bool(under_way) == overlapped and len(reducer._buckets) > 3
    assert frozen.grad is None and unused.grad is None
    return [p.grad.tolist() for p in layers.parameters() if p.grad is not None]


@pytest.mark.slow
def test_overlapped_sums_equal_sums_after_backward(tmp_path: Path) -> None:
    found = on_ranks(3, [(means, (True,)), (means, (False,))], log(tmp_path))
    for early, late in found.values():
        assert len(early) == 9 and early == late == found[0][0]
