"""A save that is interrupted anywhere, by death or a full disk, loses nothing.

Each attempt is a child process that dies, or whose disk is full, at one place of the save. Its
parent is not pytest, which has threads: in its fork a lock may stay locked, and the test hangs.
"""

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from small_run import run, same, state

from olmo import checkpoint
from olmo.checkpoint import layout
from olmo.checkpoint.read import find_newest
from olmo.checkpoint.save import save_unsharded
from olmo.checkpoint.sharded import save_sharded
from olmo.runtime.process import SEGMENTS_FILE
from olmo.train.segments import read_segments, training_conditions

DIED = 9
# What changes names, and what brings bytes to disk. Writes themselves are cut off by size.
CALLS = ("mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "fsync")


def saved(kind: str, folder: Path, step: int, **changes: Any) -> Path:
    """A checkpoint of a small model whose weights are the step."""
    model = torch.nn.Linear(100, 200)
    torch.nn.init.constant_(model.weight, step)
    names = ["weight", "bias"]
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "param_names": names}])
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    parts: dict[str, Any] = {"model": {"weight": torch.full((200, 100), float(step))}}
    parts |= {
        "optim": optimizer.state_dict(),
        "train": {"global_step": step},
        "config_yaml": "a: 1",
    }
    save = save_unsharded if kind == "unsharded" else save_sharded
    return save(folder, step, **parts, **changes)


def in_child(work: Callable[[], Any], prepare: Callable[[], Any]) -> int:
    """The exit code of a child that prepares its fate and then works; a signal counts negative."""
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            work()
        except OSError as error:
            os._exit(0 if error.errno is None else error.errno)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(place: int) -> None:
    """Let this process end just before the n-th of the CALLS."""
    left = count(place, -1)

    def fatal(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if next(left) == 0:
            os._exit(DIED)
        return call(*args, **options)

    for name in CALLS:
        setattr(os, name, partial(fatal, getattr(os, name)))


def limit_files(size: int, deadly: bool) -> None:
    """Let no file grow beyond `size` bytes: death there, or an error as of a full disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)


def check(folder: Path, allowed: set[int]) -> None:
    whole = find_newest(folder)
    assert whole is not None
    found = checkpoint.load_checkpoint(whole)
    assert found.train is not None
    step = found.train["global_step"]
    assert step in allowed and layout.parse_step(whole) == step
    assert found.model["weight"].unique().tolist() == [step]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unsharded", "sharded"])
@pytest.mark.parametrize("replaces", [False, True], ids=["the next", "the same again"])
def test_death_between_any_two_calls(tmp_path: Path, kind: str, replaces: bool) -> None:
    arguments = (tmp_path / "saved", kind, replaces)
    on_ranks(1, [(die_between_any_two_calls, arguments)], tmp_path / "said.txt")


def die_between_any_two_calls(folder: Path, kind: str, replaces: bool) -> None:
    step = 4 if replaces else 8
    for place in count():
        names = [path.name for path in layout.list_checkpoints(folder)]
        if not names or names[-1].startswith("step8"):
            shutil.rmtree(folder, ignore_errors=True)
            saved(kind, folder, 4)
        # What is left of one death does not stand in the way of the next attempt.
        if in_child(partial(saved, kind, folder, step, keep=1), partial(die_at, place)) != DIED:
            break
        check(folder, {4, step})
    assert place > 10, "the places were found"
    check(folder, {step})
    layout.remove_leftovers(folder)
    names = {path.name for path in folder.glob("step*")}
    assert names == {layout.folder_name(step, kind == "unsharded")}


@pytest.mark.slow
@pytest.mark.parametrize("deadly", [True, False], ids=["death", "a full disk"])
@pytest.mark.parametrize("kind", ["unsharded", "sharded"])
def test_an_end_at_any_byte(tmp_path: Path, kind: str, deadly: bool) -> None:
    on_ranks(1, [(end_at_any_byte, (tmp_path / "saved", kind, deadly))], tmp_path / "said.txt")


def end_at_any_byte(folder: Path, kind: str, deadly: bool) -> None:
    first = saved(kind, folder, 4)
    sizes = sorted({p.stat().st_size for p in first.rglob("*") if p.is_file()})
    # Beginning and end of each file, and places within the long ones.
    places = {
        0,
        *(s - 1 for s in sizes),
        *(s // 2 for s in sizes),
        *range(64, sizes[-1], sizes[-1] // 12),
    }
    expected = -signal.SIGXFSZ if deadly else 27  # EFBIG
    for place in sorted(places):
        prepare = partial(limit_files, place, deadly)
        assert in_child(partial(saved, kind, folder, 8, keep=1), prepare) == expected, place
        check(folder, {4})
        assert deadly or not list(folder.glob("*.partial")), "a full disk is not left full"
    saved(kind, folder, 8, keep=1)
    check(folder, {8})


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """No file of this process grows beyond some kilobytes, from when `name` is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writing = layout.atomic_checkpoint

    def filling(folder: Path) -> Any:
        if folder.name == name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
        return writing(folder)

    monkeypatch.setattr(layout, "atomic_checkpoint", filling)
    try:
        yield
    finally:
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "step4-unsharded"),
        ({"save_interval": 4, "save_interval_unsharded": None}, "step4"),
    ],
    ids=["unsharded", "sharded"],
)
def test_a_full_disk_pauses_a_run(
    tmp_path: Path, changes: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, save_folder=str(tmp_path / "straight"), **changes) == 0
    said = rf"could not write the checkpoint .*{name} \(File too large\); earlier .* are unchanged"
    with full_disk(monkeypatch, name), pytest.raises(OSError, match=said):
        run(tmp_path, **changes)
    assert find_newest(tmp_path / "run") == tmp_path / "run/step0-unsharded"
    assert run(tmp_path, try_load_latest_save=True, **changes) == 0
    assert same(state(tmp_path / "straight"), state(tmp_path / "run"))


def test_a_run_goes_on_although_its_segments_are_damaged(tmp_path: Path) -> None:
    assert run(tmp_path, save_folder=str(tmp_path / "straight")) == 0
    run(tmp_path, stop_after=6)
    told = tmp_path / "run" / SEGMENTS_FILE
    told.write_bytes(told.read_bytes()[:-30])
    assert run(tmp_path, try_load_latest_save=True) == 0
    assert same(state(tmp_path / "straight"), state(tmp_path / "run"))
    lost, rest = read_segments(tmp_path / "run")
    assert lost == {"after": 0, "damaged": True} and rest["after"] == 6
    assert training_conditions([lost, rest])["earlier"] == [{"damaged": True, "after": 0}]
