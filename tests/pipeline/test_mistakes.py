"""What users do wrong: each mistake ends with one sentence, whose remedy then works.

Each row breaks a copy of one finished project. The sentence is the last line on the screen. What it
tells to do is done, and the same command, or the one that it names, then succeeds.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from mistake import RECIPE, TRAIN, Mistake
from mistakes import MISTAKES
from project import Project


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose run is trained."""
    project = Project(tmp_path_factory.mktemp("finished") / "project")
    project.change(TRAIN, max_duration=6)
    project.change(RECIPE, tokens={"engine": "fast"})
    project.run()
    return project


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(m, id=m.name, marks=[pytest.mark.long] * m.is_long) for m in MISTAKES],
)
def test_a_mistake_ends_with_one_sentence_whose_remedy_works(
    finished: Project, tmp_path: Path, mistake: Mistake
):
    project = finished.copy(tmp_path / "project")
    if mistake.change:
        mistake.change(project)
    status, said = type_command(project, mistake.command, mistake.folder, mistake.store)
    assert status not in (0, None), said
    assert "Traceback" not in said
    last = said.rstrip().rpartition("\n")[2]
    assert re.search(mistake.sentence, last), said
    if mistake.remedy:
        mistake.remedy(project)
    else:
        shutil.copytree(finished.root / "config", project.root / "config", dirs_exist_ok=True)
    status, said = type_command(project, mistake.then or mistake.command)
    assert status == 0, said


def type_command(
    project: Project, command: str, folder: str = ".", store: str | None = None
) -> tuple[int, str]:
    """The exit status of a command line, and what was on the screen."""
    program, *words = shlex.split(command)
    environment = project.environment() | ({"OLMO_STORE": store} if store else {})
    done = subprocess.run(
        [*project.command(program), *words],
        cwd=project.root / folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout
