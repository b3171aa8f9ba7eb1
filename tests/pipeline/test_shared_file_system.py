"""Two machines with one store on a network file system: nothing is done twice, nothing is lost."""

import os
import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import Project, processes, until
from shared import SharedFolder, shared_folder, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[SharedFolder]:
    with shared_folder(tmp_path, cached_s=20) as made:
        yield made


def of_two_machines(shared: SharedFolder) -> list[Project]:
    """The same project in two folders, one for each machine, with one store."""
    found = []
    for name in ("one", "two"):
        project = Project(shared.path / name, store=shared.path / "store")
        project.machine = [str(shared.machine), f"machine-{name}"]
        found.append(project)
    return found


def test_each_thing_is_made_by_one_of_two_machines(shared: SharedFolder, tmp_path: Path):
    alone = Project(tmp_path / "alone")
    expected = alone.run().ran
    projects = of_two_machines(shared)
    started = [project.start("checkpoints/small/final") for project in projects]
    one, two = (
        project.outcome(process.wait(600))
        for project, process in zip(projects, started, strict=True)
    )
    assert one.status == two.status == 0, one.output[-4000:] + two.output[-4000:]
    assert one.ran + two.ran == expected
    assert "on machine-" in one.logs + two.logs  # one waited for the other
    assert [project.content() for project in projects] == [alone.content()] * 2


@pytest.mark.long
def test_a_machine_that_is_gone_is_taken_over_from(shared: SharedFolder, tmp_path: Path):
    """Its lease is not touched any more; the other trains on from its last checkpoint."""
    alone = Project(tmp_path / "alone")
    one, two = of_two_machines(shared)
    for project in (alone, one, two):
        project.change("config/train/small.yaml", max_duration=5000, save_interval_unsharded=200)
    alone.run(timeout=900)
    mark = uuid.uuid4().hex
    first = one.start("checkpoints/small/final", mark=mark)
    until(lambda: one.steps() > 250, 300)
    second = two.start("checkpoints/small/final")
    waits = "training .* is being made by process .* on machine-one; waiting"
    until(lambda: re.search(waits, two.outcome().logs) is not None, 120)
    for pid in processes(mark):
        os.kill(pid, signal.SIGKILL)
    assert first.wait(60) == -signal.SIGKILL
    assert second.wait(900) == 0, two.outcome(1).output[-4000:]
    (begun,) = re.findall(r"resuming from .*/step(\d+)-unsharded", two.outcome().logs)
    assert 200 <= int(begun) < 5000
    assert two.content() == alone.content()
