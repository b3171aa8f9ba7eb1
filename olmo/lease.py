"""Leases: one holder of a name at a time, among processes of one machine or of several.

A lease is a file `<name>.<n>` made by a hard link, which fails where the name is taken; network
file systems keep to that, where flock is not to be trusted. Its holder touches it every few
seconds. A holder on this machine whose process is gone has lost it at once; one elsewhere when
the touches stop coming, measured with the clock of whoever waits, so that the clocks of two
machines need not agree.

Whoever finds only dead holders makes the next number. The link decides between two who do so at
once; a look around afterwards finds the one whose view was old.
"""

import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BEAT_S = 5.0  # the holder touches its lease this often
PATIENCE_S = 60.0  # without a touch for this long it is dead


@contextlib.contextmanager
def lease(
    folder: Path, name: str, waiting: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[None]:
    """Hold `name` for the block, waiting for whoever holds it now.

    Args:
        waiting: called once with the holder ({"host", "pid", …}) if there is one to wait for.
    """
    mine = _acquire(folder, name, waiting)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(mine)

    threading.Thread(target=beat, daemon=True, name="lease").start()
    try:
        yield
    finally:
        done.set()
        mine.unlink(missing_ok=True)


def held(folder: Path) -> list[str]:
    """The names whose leases somebody may still hold (as far as one look can tell)."""
    leases = [path for path in folder.glob("[!.]*") if not _dead(path, _holder(path), {})]
    return sorted({path.name.rsplit(".", 1)[0] for path in leases})


def _acquire(folder: Path, name: str, waiting: Callable[[dict[str, Any]], None] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[Path, tuple[int, float]] = {}  # lease → its last touch, and when we saw that
    while True:
        leases = {path: _holder(path) for path in folder.glob(f"{name}.*")}
        living = [path for path, holder in leases.items() if not _dead(path, holder, seen)]
        if living:
            if waiting is not None and leases[living[0]]:
                waiting(leases[living[0]])
                waiting = None
            time.sleep(0.2)
            continue
        numbers = [int(path.suffix[1:]) for path in leases]
        mine = folder / f"{name}.{max(numbers, default=-1) + 1}"
        draft = folder / f".{name}-{uuid.uuid4().hex}"
        draft.write_text(json.dumps(_me()))
        try:
            os.link(draft, mine)  # whole from its first moment, and refused if it exists
        except FileExistsError:
            continue
        finally:
            draft.unlink()
        if set(folder.glob(f"{name}.*")) - set(leases) - {mine}:
            mine.unlink(missing_ok=True)  # someone else got through: both step back
            time.sleep(random.uniform(0.05, 0.5))
            continue
        for path in leases:
            path.unlink(missing_ok=True)
        return mine


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "start": _start(pid)}


def _holder(path: Path) -> dict[str, Any]:
    """Who holds a lease; {} when it has just gone."""
    try:
        holder: dict[str, Any] = json.loads(path.read_text())
        return holder
    except FileNotFoundError:
        return {}


def _dead(path: Path, holder: dict[str, Any], seen: dict[Path, tuple[int, float]]) -> bool:
    if holder and (holder["host"], holder["boot"]) == (socket.gethostname(), _boot()):
        return _start(holder["pid"]) != holder["start"]
    try:
        touched = path.stat().st_mtime_ns
    except FileNotFoundError:
        return False  # released this moment: look again
    now = time.monotonic()
    if seen.get(path, (None, 0.0))[0] != touched:
        seen[path] = (touched, now)
    return now - seen[path][1] > PATIENCE_S


def _boot() -> str:
    """Names this boot of this machine: process numbers mean something only within it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start(pid: int) -> str | None:
    """When a process started, which tells it from a later one of the same number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
        try:  # no /proc here: the number alone has to do
            os.kill(pid, 0)
            return "running"
        except ProcessLookupError:
            return None
        except PermissionError:
            return "running"
    state, started = stat.rsplit(")", 1)[1].split()[0], stat.rsplit(")", 1)[1].split()[19]
    return None if state in "ZX" else started
