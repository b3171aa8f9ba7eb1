"""The store's promises, each broken on purpose: keys, contents, single flight, upkeep."""

import json
import math
import os
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import CONTEXT, forked

from olmo.store import naming
from olmo.store.action import Action, canonical_json
from olmo.store.commands import collect_garbage, quarantine_damaged, set_pin
from olmo.store.lineage import flatten
from olmo.store.stage import current_store
from olmo.store.store import CorruptObject, NondeterministicStage, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def write(text: str, **extra):
    """A build that makes one output, `out`, with this text."""

    def build(work: Path):
        (work / "outputs" / "out").write_text(text)
        return extra

    return build


def refuse(work: Path):
    raise AssertionError("this was to be found in the store")


ONE = Action("demo", 1, {"n": 1})


def test_key_is_the_sha256_of_canonical_json():
    text = b'{"inputs":{"a":"00"},"params":{"x":1.5},"stage":"s","version":2}'
    import hashlib

    assert Action("s", 2, {"x": 1.5}, {"a": "00"}).key == hashlib.sha256(text).hexdigest()
    assert (
        canonical_json({"b": 1, "a": [None, True, "é"]}) == '{"a":[null,true,"é"],"b":1}'.encode()
    )


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, Path("x"), {1, 2}, b"x", {1: 2}, object()],
    ids=lambda value: type(value).__name__,  # a repr with an address differs between workers
)
def test_what_has_no_canonical_form_is_refused(value):
    with pytest.raises(ValueError, match="params"):
        _ = Action("s", 1, {"x": value}).key


def test_each_part_of_an_action_is_in_its_key():
    keys = {
        a.key
        for a in (
            ONE,
            Action("other", 1, {"n": 1}),
            Action("demo", 2, {"n": 1}),
            Action("demo", 1, {"n": 2}),
            Action("demo", 1, {"n": 1}, {"source": "ab"}),
        )
    }
    assert len(keys) == 5


def test_runs_once_then_is_found(store: Store):
    first = store.run(ONE, write("hello"))
    assert store.run(ONE, refuse) == first
    digest = first["outputs"]["out"]["sha256"]
    assert store.object_path(digest).read_text() == "hello"
    assert stat.S_IMODE(store.object_path(digest).stat().st_mode) == 0o444


def test_equal_bytes_are_one_object(store: Store):
    a = store.run(ONE, write("same"))
    b = store.run(Action("demo", 1, {"n": 2}), write("same"))
    assert a["key"] != b["key"] and a["content"] == b["content"]
    assert len(list((store.root / "objects").glob("??/*"))) == 1


def test_failure_leaves_no_record_and_no_output(store: Store):
    def build(work: Path):
        (work / "outputs" / "out").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError):
        store.run(ONE, build)
    assert store.record(ONE.key) is None
    assert not list((store.root / "objects").glob("??/*"))
    assert not list((store.root / "work").glob("*/outputs"))


def test_work_folder_survives_a_failure(store: Store):
    def build(work: Path):
        kept = work / "attempt"
        if kept.exists():
            (work / "outputs" / "out").write_text("carried on")
            return {}
        kept.mkdir()
        raise ValueError("cut off")

    with pytest.raises(ValueError):
        store.run(ONE, build)
    record = store.run(ONE, build)
    assert store.object_path(record["outputs"]["out"]["sha256"]).read_text() == "carried on"


def corrupt(path: Path) -> None:
    """Flip a bit, keeping size and times: what a bad disk does."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_corrupt_object_is_found_on_a_hit_quarantined_and_rebuilt(store: Store):
    record = store.run(ONE, write("hello"))
    path = store.object_path(record["outputs"]["out"]["sha256"])
    corrupt(path)
    assert store.run(ONE, write("hello"))["content"] == record["content"]
    assert path.read_text() == "hello"
    assert len(list((store.root / "quarantine").iterdir())) == 1


def test_a_corrupt_object_is_found_by_verify(store: Store):
    digest = store.run(ONE, write("hello"))["outputs"]["out"]["sha256"]
    assert quarantine_damaged(store) == []
    corrupt(store.object_path(digest))
    assert quarantine_damaged(store) == [digest]
    assert not store.object_path(digest).exists()


def test_a_corrupt_input_is_refused(store: Store, tmp_path: Path):
    record = store.run(ONE, write("hello"))
    naming.link_output(store, record, "out", tmp_path / "name")
    assert store.digest(tmp_path / "name") == record["outputs"]["out"]["sha256"]
    corrupt(store.object_path(record["outputs"]["out"]["sha256"]))
    with pytest.raises(CorruptObject, match="damaged or missing"):
        store.digest(tmp_path / "name")


def test_one_action_with_two_contents_is_an_alarm(store: Store):
    record = store.run(ONE, write("hello"))
    store.object_path(record["outputs"]["out"]["sha256"]).unlink()
    with pytest.raises(NondeterministicStage, match="differing: out"):
        store.run(ONE, write("other"))
    assert store.record(ONE.key) == record


def test_other_conditions_explain_two_contents(store: Store):
    record = store.run(ONE, write("hello", conditions={"world_size": 1}))
    store.object_path(record["outputs"]["out"]["sha256"]).unlink()
    again = store.run(ONE, write("other", conditions={"world_size": 2}))
    assert again["conditions"] == {"world_size": 2}


def test_what_lies_aside_is_kept_but_not_in_the_content(store: Store, tmp_path: Path):
    def build(text: str):
        def make(work: Path):
            folder = work / "outputs" / "final"
            folder.mkdir()
            (folder / "model").write_text("weights")
            (folder / "timings").write_text(text)
            return {"not_in_content": ["timings"]}

        return make

    record = store.run(ONE, build("1 s"))
    store.object_path(record["outputs"]["final"]["aside"]["timings"]["sha256"]).unlink()
    assert store.run(ONE, build("2 s"))["content"] == record["content"]
    naming.link_output(store, record, "final", tmp_path / "final")
    assert {p.name for p in (tmp_path / "final").iterdir()} == {"model", "timings", "record.json"}
    assert json.loads((tmp_path / "final" / "record.json").read_text())["key"] == ONE.key


def test_gc_keeps_what_is_named_or_pinned(store: Store, tmp_path: Path):
    named, pinned, loose = (
        store.run(Action("demo", 1, {"n": n}), write(f"text {n}")) for n in range(3)
    )
    naming.link_output(store, named, "out", tmp_path / "name")
    set_pin(store, pinned["key"])
    assert collect_garbage(store, dry_run=True) == [loose["outputs"]["out"]["sha256"]]
    assert collect_garbage(store) == [loose["outputs"]["out"]["sha256"]]
    assert collect_garbage(store) == []
    (tmp_path / "name").unlink()
    assert collect_garbage(store) == [named["outputs"]["out"]["sha256"]]
    assert store.record(loose["key"]) is not None


def test_an_input_that_cannot_be_read_is_not_the_stores_fault(store: Store):
    def build(work: Path):
        raise PermissionError(13, "Permission denied", "/data/input.json.gz")

    with pytest.raises(PermissionError, match="/data/input"):
        store.run(ONE, build)


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch):
    # Root may write anywhere, so the refusal is a file where a folder has to be.
    (tmp_path / "store").mkdir()
    store = Store(tmp_path / "store")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "link", denied)
    with pytest.raises(OSError, match=r"cannot be written.*OLMO_STORE"):
        store.run(ONE, write("x"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become two other users")
def test_two_users_share_a_store_that_their_group_may_write_to():
    """One begins, with a umask that shuts others out; another finishes and seals what it left."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        root = Path(place) / "store"
        root.mkdir()
        os.chown(root, -1, 54321)
        for folder, mode in ((root, 0o2775), (root.parent, 0o755)):
            folder.chmod(mode)
        assert as_user(10001, root, begin) == "InterruptedError"
        assert as_user(10002, root, finish) == "sealed"
        assert as_user(10001, root, refuse) == "sealed"
        (found,) = (path for path in (root / "objects").rglob("*") if path.is_file())
        assert found.read_text() == "begun and finished" and found.stat().st_uid == 10002


def begin(work: Path):
    (work / "kept").write_text("begun")
    raise InterruptedError


def finish(work: Path):
    with (work / "kept").open("a") as file:
        file.write(" and finished")
    (work / "kept").rename(work / "outputs" / "out")
    return {}


def as_user(number: int, root: Path, build: Callable[[Path], Any]) -> str:
    """What came of an action that another user of group 54321 asks for."""
    results = CONTEXT.SimpleQueue()
    forked(_run_as, number, root, build, results).join(60)
    return "" if results.empty() else results.get()


def _run_as(number: int, root: Path, build: Callable[[Path], Any], results: Any) -> None:
    os.setgroups([])
    os.setgid(54321)
    os.setuid(number)
    os.umask(0o022)
    os.environ["OLMO_STORE"] = str(root)
    try:
        current_store().run(ONE, build)
        results.put("sealed")
    except BaseException as error:
        results.put(type(error).__name__)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting needs root")
def test_a_full_disk_says_so_and_carries_on_when_there_is_room(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk])
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        store = Store(disk / "store")
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(900_000))
        with pytest.raises(OSError, match=r"the disk is full.*make room"):
            store.run(ONE, write("x" * 300_000))
        assert store.record(ONE.key) is None and quarantine_damaged(store) == []
        ballast.unlink()
        assert store.run(ONE, write("x" * 300_000))["outputs"]["out"]["size"] == 300_000
        assert quarantine_damaged(store) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def _contend(root: Path, ran: Path, barrier) -> None:
    store = Store(root)

    def build(work: Path):
        with ran.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        (work / "outputs" / "out").write_text("once")
        return {}

    barrier.wait()
    store.run(ONE, build)


def test_however_many_ask_an_action_runs_once(tmp_path: Path):
    barrier = CONTEXT.Barrier(6)
    ran = tmp_path / "ran"
    processes = [forked(_contend, tmp_path / "store", ran, barrier) for _ in range(6)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(ran.read_text().splitlines()) == 1
    assert not list((tmp_path / "store" / "leases").iterdir())


def test_a_killed_holder_is_replaced_at_once(tmp_path: Path):
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from olmo.store.action import Action
        from olmo.store.store import Store

        def build(work):
            print("holding", flush=True)
            time.sleep(60)

        Store(Path(sys.argv[1])).run(Action("demo", 1, {"n": 1}), build)
        """
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "store"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout and holder.stdout.readline() == "holding\n"
    holder.kill()
    holder.wait()
    assert list((tmp_path / "store" / "leases").iterdir())
    Store(tmp_path / "store").run(ONE, write("hello"))
    assert not list((tmp_path / "store" / "leases").iterdir())


def test_a_silent_holder_elsewhere_loses_its_lease(store: Store, monkeypatch):
    import olmo.store.lease

    folder = store.root / "leases"
    folder.mkdir(parents=True)
    elsewhere = {"host": "another", "boot": "x", "pid": 1, "start": "1"}
    (folder / f"{ONE.key}.0").write_text(json.dumps(elsewhere))
    assert olmo.store.lease.held_names(folder) == [ONE.key]
    with pytest.raises(ValueError, match="no running stage, found 1"):
        collect_garbage(store)
    monkeypatch.setattr(olmo.store.lease, "LEASE_TIMEOUT_S", 0.6)
    start = time.monotonic()
    store.run(ONE, write("hello"))
    assert time.monotonic() - start > 0.6


def test_a_damaged_record_is_written_anew_from_its_copy(store: Store):
    record = store.run(ONE, write("one"))
    path = store.record_path(ONE.key)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"demo"', b'"d3mo"'))
    assert store.record(ONE.key) == record == store.record(ONE.key)
    copy = path.with_suffix(".copy")
    copy.unlink()
    path.unlink()
    path.write_bytes(b"")
    assert store.record(ONE.key) is None


def test_a_digest_is_abbreviated_and_a_url_is_not():
    url = "https://a-long-name.example/and/a/long/path/part-0000.json.gz"
    assert flatten({"sha256": "0" * 64, "url": url}) == ["sha256: 000000000000…", f"url: {url}"]
