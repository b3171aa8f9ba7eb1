"""Leases: one holder of a name at a time, among processes of one machine or of several.

A lease is a file `<name>.<n>` made by a hard link, which fails where the name is taken; network
file systems keep to that, where flock is not to be trusted. Its holder touches it every few
seconds. A holder on this machine whose process is gone has lost it at once; one elsewhere when
the touches stop coming, measured with the clock of whoever waits, so that the clocks of two
machines need not agree.

Whoever finds only dead holders makes the next number. The link decides between two who do so at
once; a look around afterwards finds the one whose view was old. A holder that was away for so
long that another took its place (a suspended machine, a file server out of reach) ends itself as
soon as it finds out: two would write into one folder.

What a network file system shows may be old: names in a folder for up to a minute. Before it
counts that a name is not there, we change the folder ourselves, which makes them look again.
"""

import contextlib
import errno
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HEARTBEAT_S = 5.0  # the holder touches its lease this often
PROBE_PREFIX = ".look-"  # begins the names of files that are there for a moment, to be seen
LEASE_TIMEOUT_S = 60.0  # without a touch for this long it is dead

Holder = dict[str, Any]  # {"host", "boot", "pids", "pid", "start"}


@contextlib.contextmanager
def lease(
    folder: Path,
    name: str,
    waiting: Callable[[Holder], None] | None = None,
    alive: Callable[[Holder], None] | None = None,
) -> Iterator[None]:
    """Hold `name` for the block, waiting for whoever holds it now.

    Args:
        waiting: called once with the holder if there is one to wait for.
        alive: called when that holder is known to live: for who would rather not wait.

    Raises:
        ValueError: the file system has no hard links.
    """
    mine = _acquire(folder, name, waiting, alive)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            try:
                os.utime(mine)
            except OSError as error:
                # `done` is set before the lease is given back: then it is no loss.
                if error.errno in (errno.ENOENT, errno.ESTALE) and not done.is_set():
                    _exit_after_loss(name)

    threading.Thread(target=beat, daemon=True, name="lease").start()
    try:
        yield
    finally:
        done.set()
        mine.unlink(missing_ok=True)


def held_names(folder: Path) -> list[str]:
    """The names whose leases somebody may still hold (as far as one look can tell)."""
    leases = [
        path for path in folder.glob("[!.]*") if _state(_read_lease(path), {}, path) != "dead"
    ]
    return sorted({path.name.rsplit(".", 1)[0] for path in leases})


def refresh_listing(folder: Path) -> None:
    """Make a network file system forget what it remembers of the names in a folder.

    It keeps them, and that a name is not there, for as long as it believes the folder unchanged.
    """
    with contextlib.suppress(FileNotFoundError):
        handle, path = tempfile.mkstemp(prefix=PROBE_PREFIX, dir=folder)
        os.close(handle)
        os.unlink(path)


def _acquire(
    folder: Path,
    name: str,
    waiting: Callable[[Holder], None] | None,
    alive: Callable[[Holder], None] | None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[Path, tuple[int, float]] = {}  # lease → its last touch, and when we saw that
    fresh = False  # whether what we know of the folder is of this moment
    while True:
        looks = {path: _read_lease(path) for path in folder.glob(f"{name}.*")}
        states = {path: _state(look, seen, path) for path, look in looks.items()}
        if set(states.values()) - {"dead"}:
            for path, state in states.items():
                if state == "gone":
                    refresh_listing(folder)
                if state == "alive" and alive is not None:
                    alive(looks[path][0])
                if state in ("alive", "silent") and waiting is not None:
                    waiting(looks[path][0])
                    waiting = None
            time.sleep(0.2)
            fresh = False
            continue
        if not fresh:
            refresh_listing(folder)
            fresh = True
            continue
        numbers = [int(path.suffix[1:]) for path in looks]
        mine = folder / f"{name}.{max(numbers, default=-1) + 1}"
        if not _create(mine, folder / f".{name}-{uuid.uuid4().hex}"):
            fresh = False
            time.sleep(random.uniform(0.01, 0.1))
            continue
        # Making it has changed the folder: what is seen now is of this moment.
        if set(folder.glob(f"{name}.*")) - set(looks) - {mine}:
            mine.unlink(missing_ok=True)  # someone else got through: both step back
            time.sleep(random.uniform(0.05, 0.5))
            fresh = False
            continue
        for path in looks:
            path.unlink(missing_ok=True)
        return mine


def _create(path: Path, draft: Path) -> bool:
    """Make a lease, whole from its first moment; False where it exists."""
    draft.write_text(json.dumps(_own_holder()))
    try:
        os.link(draft, path)
    except FileExistsError:
        # A server's answer may get lost and the request be sent again: then it was ours.
        return draft.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise ValueError(
            f"the file system of {path.parent.resolve()} has no hard links ({error.strerror}), by "
            "which processes keep out of each other's way; put the project and its store "
            "(OLMO_STORE) on one that has them: a local disk, NFS, GlusterFS, Lustre"
        ) from None
    finally:
        draft.unlink()
    return True


def _own_holder() -> Holder:
    pid = os.getpid()
    return {**_this_machine(), "pid": pid, "start": _start_time(pid)}


def _this_machine() -> Holder:
    """Where a process number means something: this boot of this machine, this container."""
    try:
        pids = os.readlink("/proc/self/ns/pid")
    except OSError:
        pids = ""
    return {"host": socket.gethostname(), "boot": _boot_id(), "pids": pids}


def _is_here(holder: Holder) -> bool:
    return all(holder.get(name, value) == value for name, value in _this_machine().items())


def _read_lease(path: Path) -> tuple[Holder, int]:
    """Who holds a lease, and its last touch; {} when it has just gone.

    Opened, since that is when a network file system asks its server.
    """
    try:
        with path.open() as file:
            touched = os.fstat(file.fileno()).st_mtime_ns
            try:
                holder = json.load(file)
                if {"host", "start"} <= set(holder) and type(holder["pid"]) is int:
                    return holder, touched
            except (ValueError, KeyError, TypeError):
                pass
            return {"host": "unknown"}, touched  # the power failed before its bytes were on disk
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return {}, 0


def _state(look: tuple[Holder, int], seen: dict[Path, tuple[int, float]], path: Path) -> str:
    """Of a lease: gone, dead, alive, or silent: elsewhere, and not known yet."""
    holder, touched = look
    if not holder:
        return "gone"
    if _is_here(holder):
        return "alive" if _start_time(holder["pid"]) == holder["start"] else "dead"
    now, before = time.monotonic(), seen.get(path)
    if before is None or before[0] != touched:
        seen[path] = (touched, now)
        return "silent" if before is None else "alive"
    return "dead" if now - before[1] > LEASE_TIMEOUT_S else "silent"


def _exit_after_loss(name: str) -> None:
    """Another has taken over: end at once, and with us all that we have started."""
    sys.stderr.write(
        f"this process held {name}, and its lease is gone: it was not heard of for "
        f"{LEASE_TIMEOUT_S:.0f} s (suspended, or its file server out of reach) and another has "
        "taken over, or somebody deleted it. It ends here: two would write into one folder\n"
    )
    sys.stderr.flush()
    os._exit(1)


def _boot_id() -> str:
    """Names this boot of this machine: process numbers mean something only within it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
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
