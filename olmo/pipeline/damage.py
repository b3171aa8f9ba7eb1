"""What was made here and is no longer whole, found when a plan is made.

By itself snakemake does not look at a shard, a tokenizer or a listing that is gone while the
checkpoint made from it is there, nor behind a link. So what is missing is written into
data/<dataset>/damage.log, a journal that every rule of the data set reads: its jobs run again,
find in the store what is still sound, and make the rest anew. Names whose objects are gone are
deleted, so that what is asked for is made again.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from olmo.io import foreign, sealed
from olmo.io.sealed import Damaged
from olmo.pipeline.plan import Plan
from olmo.store.store import now


class Damage:
    """The journals of a plan's data sets, each looked for once.

    Args:
        plan: what there should be.
        dry_run: whether nothing may be written; known only when snakemake asks for the first input.
        judges: whether to look at all: not in a job, beside others' work.
    """

    def __init__(
        self, plan: Plan, dry_run: Callable[[], bool] = lambda: False, judges: bool = True
    ) -> None:
        self.plan, self.dry_run, self.judges = plan, dry_run, judges
        self._journals: dict[str, list[str]] = {}
        self._drafts = tempfile.TemporaryDirectory()  # gone with this process

    def journal(self, dataset: str) -> list[str]:
        """A file that every rule of a data set reads, and that changes when damage is found.

        A dry run writes nothing and deletes only links to nothing: where there is damage, a file
        that is gone with this process stands for the journal.
        """
        if not self.judges:
            return [str(_path(dataset))]
        if not self._journals:
            self._delete_lost()
        if dataset not in self._journals:
            self._journals[dataset] = self._look(dataset)
        return self._journals[dataset]

    def _look(self, dataset: str) -> list[str]:
        path, missing = _path(dataset), sorted(self.missing(dataset))
        if self.dry_run():
            if missing:
                path = Path(self._drafts.name, f"{dataset}.log")
                path.touch()
            return [str(path)] if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()  # into a store: nothing is to be written there
        if not path.exists():
            path.touch()
            os.utime(path, (0, 0))  # older than anything made here
        if missing:
            with path.open("a") as file:
                file.writelines(f"{now()} missing: {name}\n" for name in missing)
        return [str(path)]

    def missing(self, dataset: str) -> set[str]:
        """The files of a data set, and of its runs, that were made here and have lost their bytes.

        A listing that names one of them is taken away, so that its job runs whenever it is asked
        for, and the file counts as missing once.
        """
        folder = Path("data", dataset)
        missing = set()
        # A batch's, and that of the attributes of all; other tables are artifacts like any file.
        for listing in (*folder.glob("*/[0-9]*.tsv"), *folder.glob("attributes/all.tsv")):
            try:
                files = [folder / row[2] for row in _rows(listing)]
            except Damaged:
                files = [listing / "damaged"]  # which is not there
            if gone := {str(file) for file in files if not file.exists()}:
                missing |= gone
                self._take_away(listing)
        missing |= self.not_as_the_table_says(dataset)
        needed: list[Path] = []
        for name in (*self.plan.pipeline.runs, *self.plan.pipeline.soups):
            final = Path("checkpoints", name, "final")
            if self.plan.dataset(name) == dataset and final.exists():
                needed += final.iterdir()
                if name in self.plan.pipeline.runs:
                    needed.append(final.parent / "global_indices.npy")
        if needed and not self.plan.unlisted(dataset):
            listings = self.plan.listings(dataset, "tokens")
            needed += [folder / "tokenizer.json", *map(Path, listings)]
        return missing | {str(file) for file in needed if not file.exists()}

    def not_as_the_table_says(self, dataset: str) -> set[str]:
        """Files that are here and of which the source table has come to say something else."""
        recipe = self.plan.recipe(dataset)
        table = recipe.sources.table
        if not table or not Path(table).exists() or recipe.instructions:
            return set()
        known = {source.name: source for source in self.plan.sources(dataset)}
        wrong = set()
        for listing in Path("data", dataset, "sources").glob("[0-9]*.tsv"):
            try:
                rows = _rows(listing)
            except Damaged:
                continue  # it is in `missing` already
            for name, _, _, digest, size in rows:
                source = known.get(name)
                if source and not source.allows(int(size), digest):
                    wrong.add(f"{source.place} as {table} says now")
                    self._take_away(listing)
        return wrong

    def _take_away(self, listing: Path) -> None:
        if not self.dry_run():
            listing.unlink(missing_ok=True)

    def _delete_lost(self) -> None:
        """Delete the names whose objects are gone from the store: snakemake stumbles over them.

        Not the final checkpoints: that they are there, and what they lack, is in the journal.
        """
        store = Path(os.path.realpath(self.plan.store))
        for place in foreign.FOLDERS:
            for folder, _, files in os.walk(place):
                path = Path(folder)
                dead = [path / name for name in files if _is_dead(path / name, store)]
                if dead and "record.json" in files:
                    if path.name != "final":
                        shutil.rmtree(path)
                else:
                    for link in dead:
                        link.unlink()


def _is_dead(path: Path, store: Path) -> bool:
    """Whether a path is a link to what is gone from the store."""
    dead = path.is_symlink() and not path.exists()
    return dead and Path(os.path.realpath(path)).is_relative_to(store)


def _path(dataset: str) -> Path:
    return Path("data", dataset, "damage.log")


def _rows(listing: Path) -> list[list[str]]:
    """A listing's rows: shard, output, path, sha256, bytes. Raises Damaged."""
    return sealed.load_table(listing.read_bytes(), listing)[1:]
