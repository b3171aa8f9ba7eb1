"""A run that hangs ends by itself, and the log says where each of its processes was."""

import ctypes
import os
import re
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import forked, on_ranks
from small_run import given, metrics, run, settings, state, until

import olmo.train.loop
from olmo.cluster.launch import Geometry, launch
from olmo.config import TrainConfig
from olmo.distributed import watchdog
from olmo.distributed.world import World
from olmo.train.loop import train
from olmo.train.segments import read_segments

# Loading torch's parts in a first step takes seconds on a busy machine.
LIMIT = 12.0
LONG: dict[str, Any] = {"max_duration": 100_000, "save_interval_unsharded": None}


def test_each_step_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[None] = []
    monkeypatch.setattr(olmo.train.loop, "report_progress", lambda: seen.append(None))
    assert run(tmp_path, max_duration=7) == 0
    assert len(seen) >= 7


@pytest.mark.slow
@pytest.mark.parametrize(
    "doing, status", [("steps", 0), ("saving", 0), ("nothing", 1), ("inside a library", 1)]
)
def test_what_is_a_hang(doing: str, status: int, tmp_path: Path) -> None:
    child = forked(be_watched, doing, 3.0, tmp_path / "said.txt")
    child.join(60)
    assert child.exitcode == status
    assert ("in be_watched" in (tmp_path / "said.txt").read_text()) == bool(status)


def be_watched(doing: str, limit: float, said: Path) -> None:
    """Do something for three times the limit, in seconds."""
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    watchdog.LINGER_S = 0.5
    watch = watchdog.Watchdog(World(0, 0, 1, torch.device("cpu"), ""), limit)
    watch.start()
    with watch.paused() if doing == "saving" else nullcontext():
        if doing == "inside a library":  # which lets no thread of Python run
            time.sleep(1)  # by then it watches
            ctypes.PyDLL(None).sleep(int(3 * limit))
            return
        end = time.monotonic() + 3 * limit
        while time.monotonic() < end:
            time.sleep(0.05)
            if doing == "steps":
                watchdog.report_progress()


def asleep_in_the_data() -> None:
    time.sleep(600)


def hanging(case: dict[str, Any]) -> None:
    """A rank whose run hangs at step 5, since the second process does not compute it."""
    compute = olmo.train.loop.forward_backward

    def forward_backward(*arguments: Any) -> Any:
        if arguments[4] == 5 and os.environ["RANK"] == "1":
            asleep_in_the_data()
        return compute(*arguments)

    olmo.train.loop.forward_backward = forward_backward
    train(TrainConfig.new(**case))


@pytest.mark.slow
def test_stacks_of_all_are_in_the_log(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    case = settings(tmp_path, hang_timeout=LIMIT, **LONG)
    with pytest.raises(AssertionError):  # both ended, of themselves, and not with 0
        on_ranks(2, [(hanging, (case,))], said)
    text = said.read_text()
    for rank, where in ((0, "in finish"), (1, "asleep_in_the_data")):
        mine = [line for line in text.splitlines() if line.startswith(f"rank {rank}: ")]
        assert "no progress for 1" in mine[0] and "(hang_timeout)" in mine[0]
        assert any(where in line for line in mine), text
        assert f"neighbour rank {1 - rank} (pid " in mine[-1]
    assert " 4/100000" in text and " 5/100000" not in text


def ranks_of(run_folder: Path) -> dict[int, int]:
    """Rank → pid of the processes that train in a folder."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            environment = (folder / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        rank = [word.removeprefix("RANK=") for word in environment if word.startswith("RANK=")]
        if rank and str(run_folder / "given.yaml") in words:
            found[int(rank[0])] = int(folder.name)
    return found


@pytest.mark.slow
def test_a_stopped_process_ends_the_run_and_the_next_attempt_goes_on_with_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"max_duration": 200, "save_interval_unsharded": 20}
    changes |= {"evaluators": [], "save_num_unsharded_checkpoints_to_keep": 2}
    assert run(tmp_path, save_folder=str(tmp_path / "straight"), **changes) == 0
    config = given(tmp_path, hang_timeout=LIMIT, **changes)
    folder, log = config.parent, tmp_path / "said.txt"
    monkeypatch.setenv("OLMO_LOG", str(log))

    def stop_one() -> None:
        until(lambda: (folder / "step40-unsharded").exists())
        stopped.update(ranks_of(folder))
        os.kill(stopped[1], signal.SIGSTOP)

    stopped: dict[int, int] = {}
    threading.Thread(target=stop_one).start()
    with pytest.raises(ChildProcessError, match="the same command continues from the last"):
        launch(config, Geometry(2), threads=1)
    said = log.read_text()
    assert f"rank 0: neighbour rank 1 (pid {stopped[1]}): T (stopped)" in said
    assert re.search("in (finish|all_reduce|barrier)$", said, re.M) and not ranks_of(folder)

    launch(config, Geometry(1), threads=1)
    first, second = read_segments(folder)
    assert (first["processes"], second["processes"]) == (2, 1) and second["after"] >= 40
    losses = [
        [row["train/CrossEntropyLoss"] for row in metrics(tmp_path / name) if row["step"]]
        for name in ("straight", "run")
    ]
    assert len(losses[0]) == 200
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert data_seen(folder) == data_seen(tmp_path / "straight")


def data_seen(run_folder: Path) -> dict[int, set[str]]:
    """Step → the instances that all processes together computed."""
    found: dict[int, set[str]] = {}
    for lines in state(run_folder)["indices"]:
        for line in lines.decode().splitlines():
            step, *instances = line.split("\t")
            found.setdefault(int(step), set()).update(instances)
    return found
