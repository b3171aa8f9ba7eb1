"""Leases between machines. Two of them are two processes here that differ in their host's name.

What a network file system adds is put in by hand, one thing a test: clocks that differ, a listing
of a minute ago, an answer that got lost.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

import olmo.store.lease
import olmo.store.store
from olmo.store.lease import held_names, lease
from olmo.store.store import Store

HOLDER = """
import os, socket, sys, time
from pathlib import Path
folder, host, behind = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
socket.gethostname = lambda: host
touch = os.utime
os.utime = lambda path: touch(path, (time.time() - behind,) * 2)  # this machine's clock
import olmo.store.lease
from olmo.store.lease import lease
olmo.store.lease.HEARTBEAT_S, olmo.store.lease.LEASE_TIMEOUT_S = 0.1, 1.5
with lease(folder, "action"):
    print("holding", flush=True)
    sys.stdin.readline()
"""


def on(host: str, folder: Path, behind: float = 0) -> "subprocess.Popen[str]":
    """A process of another machine that asks for the lease, and holds it until told to end."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), host, str(behind)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def holds(process: "subprocess.Popen[str]") -> None:
    assert process.stdout and process.stdout.readline() == "holding\n"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.slow
@pytest.mark.parametrize("behind", [-86_400, 86_400])
def test_a_living_holder_elsewhere_keeps_it_and_a_killed_one_does_not(
    tmp_path: Path, behind: float
) -> None:
    """However wrong its clock is."""
    first = on("a", tmp_path, behind)
    holds(first)
    second = on("b", tmp_path)
    time.sleep(4)  # of a patience of 1.5
    assert second.poll() is None and names(tmp_path) == ["action.0"]
    first.kill()
    first.wait()
    holds(second)
    assert names(tmp_path) == ["action.1"]
    second.communicate("\n", timeout=30)
    assert second.returncode == 0 and names(tmp_path) == []


def test_who_was_away_too_long_ends(tmp_path: Path) -> None:
    first = on("a", tmp_path)
    holds(first)
    first.send_signal(signal.SIGSTOP)
    second = on("b", tmp_path)
    holds(second)
    first.send_signal(signal.SIGCONT)
    assert first.wait(30) == 1
    assert first.stderr and "this process lost the lease of action" in first.stderr.read()
    assert names(tmp_path) == ["action.1"]
    second.communicate("\n", timeout=30)
    assert second.returncode == 0


def test_a_container_of_this_machine_is_elsewhere(tmp_path: Path, monkeypatch: Any) -> None:
    """Its process numbers are others, though host and boot are ours."""
    monkeypatch.setattr(olmo.store.lease, "LEASE_TIMEOUT_S", 1.0)
    holder = olmo.store.lease._own_holder() | {"pids": "pid:[1]", "start": "another"}
    (tmp_path / "action.0").write_text(json.dumps(holder))
    begun = time.monotonic()
    with lease(tmp_path, "action"):
        assert time.monotonic() - begun > 1.0


class Remembered:
    """Names in a folder as a client remembers them until it changes the folder itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[Path, list[Path]] = {}
        glob, link, mkstemp = Path.glob, os.link, tempfile.mkstemp

        def remembered(folder: Path, pattern: str) -> list[Path]:
            key = folder / pattern
            if key not in self.names:
                self.names[key] = list(glob(folder, pattern))
            return self.names[key]

        def forgetting(change: Any) -> Any:
            def changed(*args: Any, **kwargs: Any) -> Any:
                self.names.clear()
                return change(*args, **kwargs)

            return changed

        monkeypatch.setattr(Path, "glob", remembered)
        monkeypatch.setattr(os, "link", forgetting(link))
        monkeypatch.setattr(tempfile, "mkstemp", forgetting(mkstemp))


@pytest.mark.parametrize("seen", [[], ["action.0"]])
def test_an_old_listing_gives_nobody_a_second_lease(
    tmp_path: Path, monkeypatch: Any, seen: list[str]
) -> None:
    """It shows nothing, or a lease that is gone, where another machine holds the next one."""
    waited: list[str] = []
    elsewhere = on("a", tmp_path)
    holds(elsewhere)
    os.rename(tmp_path / "action.0", tmp_path / "action.1")
    monkeypatch.setattr(olmo.store.lease, "LEASE_TIMEOUT_S", 1.0)
    remembered = Remembered(monkeypatch)
    remembered.names[tmp_path / "action.*"] = [tmp_path / name for name in seen]
    with lease(tmp_path, "action", waiting=lambda holder: waited.append(holder["host"])):
        pass
    # The holder ended, since its lease had another name; before, it was waited for.
    assert waited == ["a"]
    elsewhere.wait(30)


def test_an_answer_that_got_lost(tmp_path: Path, monkeypatch: Any) -> None:
    """The server made the link, and refuses the request when it comes again."""
    link, asked = os.link, []

    def twice(source: Path, target: Path) -> None:
        asked.append(target)
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    with lease(tmp_path, "action"):
        assert names(tmp_path) == ["action.0"]
    assert len(asked) == 1


def test_a_lease_whose_bytes_a_power_failure_took(tmp_path: Path, monkeypatch: Any) -> None:
    """Nobody can say whose it was: it is waited for like one of another machine."""
    monkeypatch.setattr(olmo.store.lease, "LEASE_TIMEOUT_S", 1.0)
    (tmp_path / "action.0").touch()
    assert held_names(tmp_path) == ["action"]
    seen: list[Any] = []
    with lease(tmp_path, "action", waiting=seen.append):
        assert names(tmp_path) == ["action.1"]
    assert [holder["host"] for holder in seen] == ["unknown"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: Any, number: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    refusal = pytest.raises(ValueError, match=f"{tmp_path} has no hard links .*OLMO_STORE")
    with refusal, lease(tmp_path, "name"):
        raise AssertionError("nobody may hold it")
    assert not list(tmp_path.iterdir())


def test_an_object_that_was_not_there_a_moment_ago(tmp_path: Path, monkeypatch: Any) -> None:
    store = Store(tmp_path / "store")
    (tmp_path / "out").write_text("text")
    digest = store.put(tmp_path / "out")["sha256"]
    path = store.object_path(digest)
    hidden = path.rename(path.with_suffix(".hidden"))
    assert not store.is_intact(digest)
    monkeypatch.setattr(olmo.store.store, "refresh_listing", lambda folder: hidden.rename(path))
    assert store.is_intact(digest)


ALONE = """
import os, socket, sys
os.chdir(sys.argv[1])
socket.gethostname = lambda: sys.argv[2]
import olmo.store.lease
olmo.store.lease.HEARTBEAT_S = 0.2
from olmo.pipeline.workspace import lock_folder
lock_folder("store")
print("holding", flush=True)
sys.stdin.readline()
"""


def test_one_snakemake_a_folder_also_from_another_machine(tmp_path: Path) -> None:
    def snakemake(host: str) -> "subprocess.Popen[str]":
        words = [sys.executable, "-c", ALONE, str(tmp_path), host]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    first = snakemake("a")
    holds(first)
    for host in ("a", "b"):
        refused = snakemake(host)
        said = refused.communicate(timeout=60)[1]
        assert refused.returncode == 1
        assert f"another snakemake (pid {first.pid} on a) runs in {tmp_path}" in said
    first.communicate("\n", timeout=30)
    last = snakemake("b")
    holds(last)
    last.communicate("\n", timeout=30)
