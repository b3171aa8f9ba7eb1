"""What becomes of a project whose small files were damaged; flips.py has each change by itself."""

import random
from pathlib import Path

import flips
import pytest
from project import Project

RESULTS = ("checkpoints/small/final", "hf/small", "data/small/statistics.parquet")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("small-files") / "finished")
    project.run(*RESULTS)
    return project


def test_a_changed_byte_is_noticed(finished: Project, tmp_path: Path):
    random.seed(16)
    outcomes = {k.name: dict(n) for k, n in flips.sweep(finished.copy(tmp_path / "changed"))}
    for name, found in outcomes.items():
        assert set(found) <= set(flips.FINE), name
    assert sum(sum(found.values()) for found in outcomes.values()) > 2000, outcomes


def test_the_same_command_makes_good_what_was_damaged(finished: Project, tmp_path: Path):
    """One byte in a file of each kind, all at once."""
    project = finished.copy(tmp_path / "damaged")
    random.seed(16)
    for kind in flips.KINDS[:6]:
        files = sorted(project.root.glob(kind.pattern))
        path = random.choice(files)
        changed = next(flips.changes(path.read_bytes()))
        path.unlink()
        path.write_bytes(changed)
    noticed = project.olmo("store", "verify")
    assert (
        "the record does not match its seal" in noticed.output and "was restored" in noticed.output
    )
    project.run(*RESULTS)
    assert project.content() == finished.content()
    sound = project.olmo("store", "verify").output.partition(":")[2]
    assert sound == finished.olmo("store", "verify").output.partition(":")[2]


@pytest.mark.parametrize("pattern", ["links/*", "actions/*/*"])
def test_gc_where_names_or_records_are_damaged_takes_nothing_that_is_in_use(
    finished: Project, tmp_path: Path, pattern: str
):
    project = finished.copy(tmp_path / "damaged")
    before = sorted((project.root / "store/objects").glob("*/*"))
    for path in (project.root / "store").glob(pattern):
        path.unlink()
        path.write_bytes(b"{}")
    assert project.olmo("store", "gc").status == 0
    assert sorted((project.root / "store/objects").glob("*/*")) == before


def test_a_record_that_is_gone_is_made_again(finished: Project, tmp_path: Path):
    project = finished.copy(tmp_path / "damaged")
    records = sorted((project.root / "store/actions").glob("*/*"))
    for path in records:
        if b'"stage": "tokens"' in path.read_bytes() or b'"stage": "hugging' in path.read_bytes():
            path.unlink()
            path.write_bytes(b"{}")
    assert project.olmo("store", "verify").status == 1
    project.run(*RESULTS)
    assert project.olmo("store", "verify").status == 0
    assert sorted((project.root / "store/actions").glob("*/*")) == records


@pytest.mark.parametrize("pattern", ["[0-7]*", "[89a-f]*"])
def test_the_same_command_makes_anew_what_the_store_has_lost(
    finished: Project, tmp_path: Path, pattern: str
):
    project = finished.copy(tmp_path / "lost")
    for path in (project.root / "store/objects").glob(f"{pattern}/*"):
        path.unlink()
    noticed = project.olmo("store", "verify")
    assert noticed.status == 1 and "lack their record or objects" in noticed.output
    assert project.run("-n", *RESULTS).status == 0
    project.run(*RESULTS)
    assert project.content() == finished.content()
    assert project.olmo("store", "verify").status == 0
