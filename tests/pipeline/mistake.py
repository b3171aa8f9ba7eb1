"""A mistake of a user, and the changes to a project that make and mend it."""

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from project import Project

from olmo.store.lease import lease

CONFIG, RECIPE, TRAIN = "config/config.yaml", "config/data/small.yaml", "config/train/small.yaml"
FINAL = "checkpoints/small/final"
DRY = f"snakemake -n {FINAL}"
SOURCES = "snakemake --cores 2 data/small/sources/000.tsv"
Change = Callable[[Project], object]


@dataclass
class Mistake:
    """A row of the table.

    Args:
        command: what the user typed.
        sentence: a regex of the last line.
        change: what the user did before.
        remedy: what the sentence tells to do; None: the configs are corrected.
        then: what is typed after it; None: the same command.
        folder: where the command is typed.
        store: $OLMO_STORE of the command.
        is_long: it takes many seconds.
    """

    name: str
    command: str
    sentence: str
    change: Change | None = None
    remedy: Change | None = None
    then: str | None = None
    folder: str = "."
    store: str | None = None
    is_long: bool = False


def put(path: str, text: str) -> Change:
    return lambda project: (project.root / path).write_text(text)


def edit(path: str, old: str, new: str) -> Change:
    def change(project: Project) -> None:
        file = project.root / path
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return change


def sh(command: str) -> Change:
    return lambda project: subprocess.run(["bash", "-ec", command], cwd=project.root, check=True)


def table_of(url: str) -> Change:
    """A recipe with one file to download."""

    def change(project: Project) -> None:
        (project.root / "sources.tsv").write_text(f"url\tbytes\tsha256\n{url}\t\t\n")
        project.change(RECIPE, sources={"table": "sources.tsv"})

    return change


def keys(path: str, **values: object) -> Change:
    """`a__b=value` in a config."""
    return lambda project: project.change(path, **values)


def hold_the_folder(project: Project) -> None:
    """Another snakemake runs, as its lease says."""
    RUNNING.enter_context(lease(project.root / ".snakemake/leases", "running"))


RUNNING = ExitStack()


def append(path: str, text: str) -> Change:
    def change(project: Project) -> None:
        with (project.root / path).open("a") as file:
            file.write(text)

    return change


def in_config(name: str, sentence: str, change: Change, is_long: bool = False) -> Mistake:
    """A mistake in a config, as a dry run tells it."""
    return Mistake(name, DRY, sentence, change, then="olmo check", is_long=is_long)
