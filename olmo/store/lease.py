"""Leases: one holder of a name at a time, among processes of one machine or of several.

A lease is a file `<name>.<n>`, created by a hard link, which fails if the name exists; network file
systems guarantee this, but not flock. The holder touches it every few seconds. A holder on this
machine is dead as soon as its process is gone; one on another machine when its touches stop, by
the clock of the waiting process, so that the clocks of machines need not agree.

A process that finds dead holders only creates the next number. If two do so at once, the link
decides; a second listing finds one that acted on an old listing. A holder that was suspended, or
could not reach its file server, for so long that another replaced it exits as soon as it notices:
two would write to one folder.

A network file system may show a folder's names as they were up to a minute ago. Before a missing
name counts, we change the folder ourselves, which makes the client list it again.
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

HEARTBEAT_S = 5.0  # between two touches
PROBE_PREFIX = ".look-"  # of the files by which `refresh_listing` changes a folder
LEASE_TIMEOUT_S = 60.0  # a holder without a touch for this long is dead

Holder = dict[str, Any]  # {"host", "boot", "pids", "pid", "start"}


@contextlib.contextmanager
def lease(
    folder: Path,
    name: str,
    waiting: Callable[[Holder], None] | None = None,
    alive: Callable[[Holder], None] | None = None,
) -> Iterator[None]:
    """Hold `name` for the block, after the present holder.

    Args:
        waiting: called once with the holder, before the wait.
        alive: called with the holder when it is known to be alive; it may raise instead of waiting.

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
                # `done` is set before the lease is released: then this is no loss.
                if error.errno in (errno.ENOENT, errno.ESTALE) and not done.is_set():
                    _exit_after_loss(name)

    threading.Thread(target=beat, daemon=True, name="lease").start()
    try:
        yield
    finally:
        done.set()
        mine.unlink(missing_ok=True)


def held_names(folder: Path) -> list[str]:
    """The names whose leases may still be held; one look cannot exclude holders elsewhere."""
    leases = [
        path for path in folder.glob("[!.]*") if _state(_read_lease(path), {}, path) != "dead"
    ]
    return sorted({path.name.rsplit(".", 1)[0] for path in leases})


def refresh_listing(folder: Path) -> None:
    """Make a network file system's client list a folder again, by a change of the folder.

    It caches names, and missing names, until it sees that the folder has changed.
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
    seen: dict[Path, tuple[int, float]] = {}  # lease → its last touch, and when we saw it
    fresh = False  # whether the listing is current
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
        # The new file has changed the folder, so this listing is current.
        if set(folder.glob(f"{name}.*")) - set(looks) - {mine}:
            mine.unlink(missing_ok=True)  # another process created one too: both retry
            time.sleep(random.uniform(0.05, 0.5))
            fresh = False
            continue
        for path in looks:
            path.unlink(missing_ok=True)
        return mine


def _create(path: Path, draft: Path) -> bool:
    """Create a lease, atomically with its content; False if it exists."""
    draft.write_text(json.dumps(_own_holder()))
    try:
        os.link(draft, path)
    except FileExistsError:
        # A client repeats a request whose answer was lost: then the existing link is ours.
        return draft.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise ValueError(
            f"the file system of {path.parent.resolve()} has no hard links ({error.strerror}), "
            "which leases need; put the project and its store "
            "(OLMO_STORE) on one that has them: a local disk, NFS, GlusterFS, Lustre"
        ) from None
    finally:
        draft.unlink()
    return True


def _own_holder() -> Holder:
    pid = os.getpid()
    return {**_this_machine(), "pid": pid, "start": _start_time(pid)}


def _this_machine() -> Holder:
    """Where a process id is valid: this boot of this machine, this container."""
    try:
        pids = os.readlink("/proc/self/ns/pid")
    except OSError:
        pids = ""
    return {"host": socket.gethostname(), "boot": _boot_id(), "pids": pids}


def _is_here(holder: Holder) -> bool:
    return all(holder.get(name, value) == value for name, value in _this_machine().items())


def _read_lease(path: Path) -> tuple[Holder, int]:
    """The holder of a lease and its last touch (ns); {} if the lease is gone.

    The file is opened, since a network file system asks its server at an open.
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
            return {"host": "unknown"}, touched  # a power failure before its bytes were on disk
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return {}, 0


def _state(look: tuple[Holder, int], seen: dict[Path, tuple[int, float]], path: Path) -> str:
    """The state of a lease: gone, dead, alive, or silent (elsewhere, and not known yet)."""
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
    """Exit at once, with all child processes: another process has taken over."""
    sys.stderr.write(
        f"this process lost the lease of {name}: it was not renewed for "
        f"{LEASE_TIMEOUT_S:.0f} s (suspended, or its file server was not available) and another "
        "process took over, or the lease was deleted. It exits: two would write to one folder\n"
    )
    sys.stderr.flush()
    os._exit(1)


def _boot_id() -> str:
    """The id of this boot of this machine; "" where the kernel has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """When a process started, which distinguishes it from a later one with the same id."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
        try:  # no /proc: the id alone must do
            os.kill(pid, 0)
            return "running"
        except ProcessLookupError:
            return None
        except PermissionError:
            return "running"
    state, started = stat.rsplit(")", 1)[1].split()[0], stat.rsplit(")", 1)[1].split()[19]
    return None if state in "ZX" else started
