"""Human names: whole or not there, and known for as long as something may need what they name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import CONTEXT, forked

from olmo.store import naming
from olmo.store.action import Action
from olmo.store.commands import collect_garbage, gc, list_first, quarantine_damaged, verify
from olmo.store.record import Record
from olmo.store.store import Store

ONE = Action("demo", 1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder, in it."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def made(store: Store, text: str) -> Record:
    """A record whose output `out` is a file, and `final` a folder."""

    def build(work: Path):
        (work / "outputs" / "out").write_text(text)
        (work / "outputs" / "final").mkdir()
        (work / "outputs" / "final" / "text").write_text(text)
        return {}

    return store.run(Action("demo", 1, {"text": text}), build)


def test_a_folder_of_links_replaces_an_older_one_whole(store: Store, tmp_path: Path):
    def build(*names: str):
        def make(work: Path):
            (work / "outputs" / "final").mkdir()
            for name in names:
                (work / "outputs" / "final" / name).write_text(name)
            return {}

        return make

    naming.link_output(store, store.run(ONE, build("a", "b")), "final", tmp_path / "final")
    naming.link_output(store, store.run(Action("demo", 2), build("c")), "final", tmp_path / "final")
    assert {p.name for p in tmp_path.joinpath("final").iterdir()} == {"c", "record.json"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def _name(root: Path, folder: Path, keys: list[str], barrier) -> None:
    store = Store(root)
    records = [store.record(key) for key in keys]
    barrier.wait()
    for number in range(60):
        naming.link_output(store, records[number % 2], "final", folder)


def test_a_folder_is_named_by_several_at_once(store: Store, tmp_path: Path):
    def build(text: str):
        def make(work: Path):
            (work / "outputs" / "final").mkdir()
            (work / "outputs" / "final" / "text").write_text(text)
            return {}

        return make

    keys = [store.run(Action("demo", n), build(f"text {n}"))["key"] for n in (1, 2)]
    barrier = CONTEXT.Barrier(3)
    processes = [forked(_name, store.root, tmp_path / "final", keys, barrier) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {p.name for p in (tmp_path / "final").iterdir()} == {"text", "record.json"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


KILLED = """
import os, shutil, sys
from pathlib import Path
from olmo.store import naming
from olmo.store.store import Store

naming._save_name = lambda *_: None
{where} = lambda *_: os.kill(os.getpid(), 9)
store = Store(Path(sys.argv[1]))
naming.link_output(store, store.record(sys.argv[2]), "final", Path("final"))
"""


@pytest.mark.parametrize("where", ["os.replace", "shutil.rmtree"])
def test_a_process_that_is_killed_while_it_replaces_a_folder(
    store: Store, project: Path, where: str
):
    naming.link_output(store, made(store, "a"), "final", Path("final"))
    for text in ("b", "c"):
        record = made(store, text)
        code = KILLED.format(where=where)
        ended = subprocess.run([sys.executable, "-c", code, store.root, record["key"]])
        assert ended.returncode == -9
        assert list(project.glob(".final.*")), "it was in the middle of it"
    naming.link_output(store, record, "final", Path("final"))
    assert Path("final/text").read_text() == text
    assert [p.name for p in project.iterdir()] == ["final"]


def test_gc_after_the_project_was_moved_whole(project: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(project / "store")
    naming.link_output(store, made(store, "a"), "out", Path("out"))
    naming.link_output(store, made(store, "b"), "final", Path("final"))
    made(store, "nobody's")
    moved = project.rename(project.parent / "moved")
    monkeypatch.chdir(moved)
    store = Store(moved / "store")
    assert len(collect_garbage(store)) == 1
    assert Path("out").read_text() == "a" and Path("final/text").read_text() == "b"
    assert naming.record_of(store, Path("final"))["key"] == made(store, "b")["key"]
    Path("out").unlink()
    assert naming.last_record(store, Path("out")) == store.record(made(store, "a")["key"])
    assert len(collect_garbage(store)) == 1


@pytest.mark.parametrize("there", [False, True])
def test_gc_where_a_projects_disk_is_not_mounted(store: Store, project: Path, there: bool):
    naming.link_output(store, made(store, "a"), "out", Path("out"))
    away = project.rename(project.parent / "unmounted")
    if there:  # what it is mounted at
        project.mkdir()
    with pytest.raises(ValueError, match=f"(?s)the project {project}.*gc --forget {project}"):
        collect_garbage(store)
    if there:
        project.rmdir()
    project.symlink_to(away)  # as the message says
    assert collect_garbage(store) == []
    project.unlink()
    assert len(collect_garbage(store, forget=project, dry_run=True)) == 1
    assert len(collect_garbage(store, forget=project)) == 1
    with pytest.raises(ValueError, match=f"expected a project that has names in .*{project}"):
        collect_garbage(store, forget=project)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user for a moment: needs root")
def test_a_folder_that_this_user_may_not_see_counts_as_there(store: Store, project: Path):
    naming.link_output(store, made(store, "a"), "out", Path("hers/out"))
    naming.link_output(store, made(store, "b"), "out", Path("ours"))
    Path("hers").chmod(0o700)
    project.parent.chmod(0o755)
    other = """if True:
        import os, sys
        from pathlib import Path
        from olmo.store import naming
        from olmo.store.store import Store
        os.setuid(65534)
        store = Store(Path(sys.argv[1]))
        print(naming.record_of(store, Path("ours"))["key"], len(list(naming.live_names(store))))
    """
    for folder in (project.parent, *project.parent.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o055)
    said = subprocess.run([sys.executable, "-c", other, store.root], stdout=subprocess.PIPE)
    assert said.stdout.decode().split() == [made(store, "b")["key"], "2"]


def test_gc_keeps_what_a_name_points_to_that_was_written_down_but_not_made(
    store: Store, project: Path, monkeypatch: pytest.MonkeyPatch
):
    naming.link_output(store, made(store, "a"), "out", Path("out"))
    naming.link_output(store, made(store, "c"), "final", Path("final"))
    for output in ("out", "final"):
        with monkeypatch.context() as patch:
            patch.setattr(naming, "symlink_atomic", lambda *_: 1 / 0)
            patch.setattr(naming, "_link_folder", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                naming.link_output(store, made(store, "b"), output, Path(output))
    collect_garbage(store)
    assert Path("out").read_text() == "a" and Path("final/text").read_text() == "c"
    assert naming.record_of(store, Path("final"))["key"] == made(store, "c")["key"]
    with pytest.raises(ValueError, match="expected a name"):
        naming.record_of(store, Path("out"))


def test_gc_says_what_it_took(project: Path, capsys: pytest.CaptureFixture[str]):
    store = Store(project / "store")
    record = made(store, "a")
    naming.link_output(store, record, "out", Path("out"))
    naming.link_output(store, made(store, "b"), "out", Path("kept"))
    for key in (record["key"], "0" * 64):  # one that ended, one that did not
        (store.root / "work" / key).mkdir(parents=True)
        (store.root / "work" / key / "step80").write_text("12345")
    Path("out").unlink()
    for dry_run, verb in ((True, "would remove 1 of 2"), (False, "removed 1 of 2")):
        gc(dry_run=dry_run)
        said = capsys.readouterr().out
        assert f"{project}/out, by demo of" in said and f"{project}/kept" not in said
        assert f"{verb} objects, 1 bytes" in said
        assert "\nout: its earlier checkpoints, 5 bytes\n" in said
        assert "and the earlier checkpoints of 1 finished runs, 5 bytes" in said
    assert [path.name for path in (store.root / "work").iterdir()] == ["0" * 64]


def test_a_damaged_object_is_told_by_its_path(project: Path, capsys: pytest.CaptureFixture[str]):
    store = Store(project / "store")
    record = made(store, "a")
    naming.link_output(store, record, "out", Path("data/out"))
    digest = record["outputs"]["out"]["sha256"]
    store.object_path(digest).chmod(0o644)
    store.object_path(digest).write_text("b")
    assert not store.is_intact(digest)
    told = capsys.readouterr().err
    assert f"store: data/out ({digest[:12]}…) is damaged (its 1 bytes do not match" in told
    assert store.describe(store.object_path("0" * 64)) == "000000000000…"
    record_path = store.record_path(record["key"])
    assert store.describe(record_path) == f"data/out ({record['key'][:12]}…)"
    for path in (record_path, record_path.with_suffix(".copy")):
        path.chmod(0o644)
        path.write_text("{}")
    with pytest.raises(ValueError, match=r"^1 of 1 records were damaged: data/out \(.*: data/out"):
        verify()


def test_a_long_list_is_told_by_its_beginning():
    assert list_first(["a", "b"]) == "a, b"
    assert list_first(list("abcdefgh")) == "a, b, c, d, e, and 3 more"


def test_gc_keeps_what_a_link_here_points_to_though_no_name_is_written_down(
    store: Store, project: Path
):
    naming.link_output(store, made(store, "a"), "out", Path("out"))
    naming.link_output(store, made(store, "b"), "final", Path("folder/final"))
    made(store, "nobody's")
    shutil.rmtree(store.root / "links")
    assert len(collect_garbage(store)) == 1
    assert Path("out").read_text() == "a" and Path("folder/final/text").read_text() == "b"
    assert naming.record_of(store, Path("folder/final"))["key"] == made(store, "b")["key"]


def test_what_is_no_file_of_the_stores_is_passed_over(store: Store, project: Path):
    naming.link_output(store, made(store, "a"), "out", Path("out"))
    (store.root / "links" / ("a" * 32)).mkdir()
    (store.root / "objects/ba/stray").mkdir(parents=True)
    assert collect_garbage(store) == [] and quarantine_damaged(store) == []
    assert naming.record_of(store, Path("out"))["key"] == made(store, "a")["key"]


def test_what_a_killed_process_left_between_objects_is_none(store: Store, project: Path):
    naming.link_output(store, made(store, "a"), "out", Path("out"))
    look = Path("out").resolve().with_name(".look-abc")
    look.touch()
    assert quarantine_damaged(store) == [] and collect_garbage(store) == [] and not look.exists()


def test_a_name_that_is_written_down_is_written_again_only_if_it_is_damaged(
    store: Store, project: Path
):
    for damage in (None, "other", b"\xff"):
        naming.link_output(store, made(store, "a"), "out", project / "named")
        (file,) = (store.root / "links").iterdir()
        whole, before = file.read_text(), file.stat().st_ino
        if damage is not None:
            file.chmod(0o644)
            file.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
        (project / "named").unlink()
        naming.link_output(store, made(store, "a"), "out", project / "named")
        assert (file.stat().st_ino == before) is (damage is None)
        assert file.read_text() == whole and (project / "named").read_text() == "a"
