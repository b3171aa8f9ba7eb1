"""Missing files of data sets and runs, found before snakemake plans its jobs.

Snakemake does not notice a shard, tokenizer or listing that is missing while the checkpoint made
from it exists, nor a dangling link. So missing files are logged in data/<dataset>/damage.log, a
journal that is an input of every rule of the data set. Its jobs run again, find in the store what
is intact, and make only the rest. Dangling links into the store are deleted, so that snakemake
makes their targets again.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from olmo.corpus.listing import as_arrived, read_listing
from olmo.io import sealed, untrusted
from olmo.io.sealed import Damaged
from olmo.pipeline.plan import Plan
from olmo.store.store import utc_now


class DamageScanner:
    """Finds damage and keeps the journals of a plan's data sets, each checked once.

    Args:
        plan: which files there should be.
        dry_run: whether nothing may be written. A function, since snakemake knows it only when the
            first input function runs.
        enabled: False in a job, while other jobs write.
    """

    def __init__(
        self, plan: Plan, dry_run: Callable[[], bool] = lambda: False, enabled: bool = True
    ) -> None:
        self.plan, self.dry_run, self.enabled = plan, dry_run, enabled
        self._journals: dict[str, list[str]] = {}
        self._temporary = tempfile.TemporaryDirectory()  # gone with this process

    def update_journal(self, dataset: str) -> list[str]:
        """The file that every rule of a data set has as input; it is touched when damage is found.

        A dry run writes nothing and deletes only dangling links: if there is damage, a temporary
        file takes the journal's place.
        """
        if not self.enabled:
            return [str(_journal_path(dataset))]
        if not self._journals:
            self._delete_dangling_links()
        if dataset not in self._journals:
            self._journals[dataset] = self._update_journal(dataset)
        return self._journals[dataset]

    def _update_journal(self, dataset: str) -> list[str]:
        path, missing = _journal_path(dataset), sorted(self.find_missing_files(dataset))
        if self.dry_run():
            if missing:
                path = Path(self._temporary.name, f"{dataset}.log")
                path.touch()
            return [str(path)] if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()  # a link into the store, whose objects must not change
        if not path.exists():
            path.touch()
            os.utime(path, (0, 0))  # older than anything made here
        if missing:
            with path.open("a") as file:
                file.writelines(f"{utc_now()} missing: {name}\n" for name in missing)
        return [str(path)]

    def find_missing_files(self, dataset: str) -> set[str]:
        """Files of a data set and of its runs that were made and no longer exist.

        A listing that names one of them is deleted, so that its job runs when it is needed, and
        the file is reported once.
        """
        folder = Path("data", dataset)
        missing = set()
        for listing in self.find_listings(dataset):
            try:
                files = [folder / row[2] for row in _read_rows(listing)]
            except Damaged:
                files = [listing / "damaged"]  # a path that does not exist
            if lost := {str(file) for file in files if not file.exists()}:
                missing |= lost
                self._delete_listing(listing)
        missing |= self.find_changed_sources(dataset)
        needed: list[Path] = []
        for name in (*self.plan.pipeline.runs, *self.plan.pipeline.soups):
            final = Path("checkpoints", name, "final")
            if self.plan.dataset(name) == dataset and final.exists():
                needed += final.iterdir()
                if name in self.plan.pipeline.runs:
                    needed.append(final.parent / "global_indices.npy")
        if needed and not self.plan.needs_source_list(dataset):
            listings = self.plan.listings(dataset, "tokens")
            needed += [folder / "tokenizer.json", *map(Path, listings)]
        return missing | {str(file) for file in needed if not file.exists()}

    def find_listings(self, dataset: str) -> list[Path]:
        """Listings of batches, and those of all of them; other .tsv files are artifacts."""
        folder = Path("data", dataset)
        return [*folder.glob("*/[0-9]*.tsv"), *folder.glob("*/all.tsv")]

    def find_changed_sources(self, dataset: str) -> set[str]:
        """Downloaded sources whose size or sha256 the recipe's table now gives differently."""
        recipe = self.plan.recipe(dataset)
        table = recipe.sources.table
        if not table or not Path(table).exists() or recipe.instructions:
            return set()
        known = {source.name: source for source in self.plan.sources(dataset)}
        wrong = set()
        for listing in Path("data", dataset, "sources").glob("[0-9]*.tsv"):
            try:
                entries = as_arrived(read_listing([listing]))
            except Damaged:
                continue  # reported by `find_missing_files` already
            for name, entry in entries.items():
                source = known.get(name)
                if source and not source.allows(entry.bytes, entry.sha256):
                    wrong.add(f"{source.place}: its size or sha256 in {table} has changed")
                    self._delete_listing(listing)
        return wrong

    def _delete_listing(self, listing: Path) -> None:
        if not self.dry_run():
            listing.unlink(missing_ok=True)

    def _delete_dangling_links(self) -> None:
        """Delete links to objects that the store no longer has, on which snakemake would fail.

        Final checkpoints stay: `find_missing_files` reports what they lack.
        """
        store = Path(os.path.realpath(self.plan.store))
        for place in untrusted.OUTPUT_FOLDERS:
            for folder, _, files in os.walk(place):
                path = Path(folder)
                dangling = [path / name for name in files if _is_dangling(path / name, store)]
                if dangling and "record.json" in files:
                    if path.name != "final":
                        shutil.rmtree(path)
                else:
                    for link in dangling:
                        link.unlink()


def _is_dangling(path: Path, store: Path) -> bool:
    """Whether a path is a link to an object that the store no longer has."""
    is_broken = path.is_symlink() and not path.exists()
    return is_broken and Path(os.path.realpath(path)).is_relative_to(store)


def _journal_path(dataset: str) -> Path:
    return Path("data", dataset, "damage.log")


def _read_rows(listing: Path) -> list[list[str]]:
    """A listing's rows: shard, output, path, sha256, bytes. Raises Damaged."""
    return sealed.load_table(listing.read_bytes(), listing)[1:]
