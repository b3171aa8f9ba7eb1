"""`olmo store …`: verify, collect garbage, check out, explain and push."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from olmo.io import sealed
from olmo.io.sealed import hash_file
from olmo.runtime.bar import track
from olmo.store import naming, remote
from olmo.store.lease import PROBE_PREFIX, held_names, lease
from olmo.store.lineage import describe_record, explain, format_lineage
from olmo.store.record import output_files
from olmo.store.stage import current_store
from olmo.store.store import GC_LEASE, Store

MAX_NAMES = 5  # that a message lists


def verify() -> None:
    """Hash every object, read every record and name.

    Damaged files are moved to quarantine, and the names of this project that need them are removed:
    the next run remakes them.

    Example:
        olmo store verify
    """
    store = current_store()
    objects = len(list((store.root / "objects").glob("??/[0-9a-f]*")))
    keys = [path.stem for path in (store.root / "actions").glob("??/*.json")]
    corrupt, broken = (
        quarantine_damaged(store),
        [key for key in sorted(keys) if store.record(key) is None],
    )
    found, unknown = naming.read_names(store, all_links=True)
    lost = [] if unknown else naming.broken_names(store)
    problems = []
    if corrupt:
        problems.append(
            f"{len(corrupt)} of {objects} objects were corrupt: "
            + list_first([store.describe(store.object_path(digest)) for digest in corrupt])
        )
    if broken:
        problems.append(
            f"{len(broken)} of {len(keys)} records were damaged: "
            + list_first([store.describe(store.record_path(key)) for key in broken])
        )
    if corrupt or broken:
        problems.append(f"they are in {store.root}/quarantine")
    if lost:
        names = list_first([os.path.relpath(path) for path in lost])
        problems.append(f"{len(lost)} names lack their record or objects: {names}")
    for path in lost:
        if path.is_relative_to(Path.cwd()):
            naming.remove_name(path)  # snakemake then remakes it
    if problems:
        raise ValueError("; ".join(problems) + ". Run snakemake again: it remakes them")
    if unknown:
        raise ValueError(f"{unknown[0]} is damaged, and {naming.NO_LINK_LEFT}")
    print(f"{store.root}: {objects} objects, {len(keys)} records, {len(found)} names, all intact")


def list_first(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = [f"and {len(names) - MAX_NAMES:,} more"] * (len(names) > MAX_NAMES)
    return ", ".join(names[:MAX_NAMES] + more)


def quarantine_damaged(store: Store) -> list[str]:
    """Hash every object and quarantine the damaged ones; their digests."""
    corrupt = []
    for path in track(sorted((store.root / "objects").glob("??/*")), "hashing objects"):
        is_object = path.is_file() and not path.name.startswith(".")
        if is_object and hash_file(path) != path.name:
            store.quarantine(path, "found by verify")
            corrupt.append(path.name)
    return corrupt


def gc(dry_run: bool = False, forget: Path | None = None) -> None:
    """Remove the objects without a path or a pin, and the work folders of finished actions.

    Records stay, and checkpoints of runs that have not ended.

    Args:
        dry_run: only say what would be removed
        forget: project that no longer exists, whose paths do not count

    Example:
        olmo store gc --dry-run
        olmo store gc --forget /home/me/old-project
    """
    store = current_store()
    objects = (p for p in (store.root / "objects").glob("??/[0-9a-f]*") if p.is_file())
    sizes = {p.name: p.stat().st_size for p in objects}
    work = {folder: folder_bytes(folder) for folder in finished_work_folders(store)}
    paths = naming.paths_in_store(store)
    removed = collect_garbage(store, dry_run, forget)
    for line in describe_removed(store, removed):
        print(line)
    for folder, size in work.items():
        print(f"{paths.get(folder.name, folder)}: its earlier checkpoints, {size:,} bytes")
    freed = sum(sizes[digest] for digest in removed)
    verb = "would remove" if dry_run else "removed"
    print(
        f"{store.root}: {verb} {len(removed)} of {len(sizes)} objects, {freed:,} bytes, and the "
        f"earlier checkpoints of {len(work)} finished runs, {sum(work.values()):,} bytes"
    )


def collect_garbage(store: Store, dry_run: bool = False, forget: Path | None = None) -> list[str]:
    """Remove the objects that no name and no pin needs; their digests.

    Records stay: they are small, and a rebuilt object is compared with them. So do the work folders
    of actions that have not ended: a training run's checkpoints.

    Args:
        forget: a project whose names do not count.
    """
    with lease(store.root / "leases", GC_LEASE):  # stages that begin now wait for it
        return _collect_garbage(store, dry_run, forget)


def _collect_garbage(store: Store, dry_run: bool, forget: Path | None) -> list[str]:
    if running := set(held_names(store.root / "leases")) - {GC_LEASE}:
        raise ValueError(
            f"expected no running stage, found {len(running)}, whose new objects have no name yet; "
            "run gc again when they are done"
        )
    naming.read_names(store, all_links=True)  # links that links/ lacks count too
    forgotten = naming.names_of_project(store, forget) if forget else {}
    for project in naming.missing_projects(store):
        if forget is None or project != Path(os.path.abspath(forget)):
            raise ValueError(
                f"expected the project {project}, which has names in the store {store.root}, found "
                "no such folder or an empty one. Mount its disk; if it was moved, leave a link at "
                f"its old place (ln -s); if it was deleted: olmo store gc --forget {project}"
            )
    found = [name for name in naming.live_names(store) if name["path"] not in forgotten]
    # A name is written to links/ before its link is made: after a kill the old link may remain.
    keep = {name["target"] for name in found}
    for name in found:  # a folder's objects, even if its record is damaged
        path = Path(name["path"])
        if path.is_dir() and not path.is_symlink():
            keep |= {Path(os.path.realpath(inner)).name for inner in path.rglob("*")}
    keys = {key for name in found for key in (name["key"], name["target"].removesuffix(".json"))}
    for key in pinned_keys(store):
        if store.record(key) is None:
            raise ValueError(
                f"the record of the pinned action {key[:12]}… is missing or damaged, so its "
                f"outputs are unknown; run snakemake again, or remove {store.root}/pins/{key}"
            )
    for key in keys | set(pinned_keys(store)) | set(unnamed_keys(store)):
        if (record := store.record(key)) is not None:
            keep |= {file["sha256"] for file in output_files(record)}
    objects = sorted(p for p in (store.root / "objects").glob("??/[0-9a-f]*") if p.is_file())
    removed = [path for path in objects if path.name not in keep]
    if dry_run:
        return [path.name for path in removed]
    failed = [store.root / "unnamed" / key for key in unnamed_keys(store) if not store.record(key)]
    for path in [*removed, *forgotten.values(), *leftover_drafts(store), *failed]:
        path.unlink()
    shutil.rmtree(store.root / "drafts", ignore_errors=True)
    for work in finished_work_folders(store):
        shutil.rmtree(work)
    for work in sorted((store.root / "work").glob("*")):
        shutil.rmtree(work / "outputs", ignore_errors=True)
        if not any(work.iterdir()):
            work.rmdir()
    return [path.name for path in removed]


def finished_work_folders(store: Store) -> list[Path]:
    """The work folders of actions that have ended and have their names."""
    folders = sorted((store.root / "work").glob("*"))
    kept = unnamed_keys(store)
    return [f for f in folders if f.name not in kept and store.record(f.name) is not None]


def unnamed_keys(store: Store) -> list[str]:
    """Keys of actions that run, or whose process was killed before their outputs had names."""
    return sorted(path.name for path in (store.root / "unnamed").glob("*"))


def leftover_drafts(store: Store) -> list[Path]:
    """Drafts of records and names that killed processes left."""
    folders = [store.root / "links", *(store.root / "actions").glob("??")]
    looks = store.root.glob(f"*/??/{PROBE_PREFIX}*")  # left in refresh_listing
    return [*looks, *(path for folder in folders for path in sealed.find_drafts(folder))]


def folder_bytes(folder: Path) -> int:
    """The bytes of a folder's files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def describe_removed(store: Store, removed: list[str]) -> Iterator[str]:
    """Lines with the deleted names whose objects were removed, for a user who wants one back."""
    gone = set(removed)
    for _, name in naming.all_names(store):
        record = store.record(name["key"])
        if record is not None and gone.intersection(
            file["sha256"] for file in output_files(record)
        ):
            when = record.get("run", {}).get("started", "an unknown time")
            yield f"{name['path']}, by {record['action']['stage']} of {when}"


def checkout(name: str, /, to: Path | None = None) -> None:
    """Restore the path of an artifact, or link it at another one.

    Args:
        name: path that the store made, deleted or not, or an action's key (with --to)
        to: the other path

    Example:
        olmo store checkout data/stdlib/tokenizer.json
    """
    store = current_store()
    known = naming.find_name(store, Path(name))
    record = store.record(known["key"] if known else name)
    if record is None or (to is None and known is None):
        raise naming.unknown_name_error(store, name)
    with store.protect_from_gc(record["key"]):
        if not store.lookup(record["key"]):
            raise ValueError(f"objects of {name} are missing in {store.root}; run snakemake again")
        for output in [known["output"]] if known else record["outputs"]:
            path = to or Path(name)
            path = path if known or len(record["outputs"]) == 1 else path / output
            naming.link_output(store, record, output, path)
            print(f"{path} → {describe_record(record, {record['key']: name})}")


def why(path: Path, /) -> None:
    """Print the action that made PATH, and how it differs from the most similar other one.

    Args:
        path: path that the store made

    Example:
        olmo store why checkpoints/olmo-tiny/final
    """
    print("\n".join(explain(current_store(), path)))


def trace(path: Path, /) -> None:
    """Print the actions that PATH was made from, back to its sources.

    Args:
        path: path that the store made

    Example:
        olmo store trace checkpoints/olmo-tiny/final
    """
    print("\n".join(format_lineage(current_store(), path)))


def pin(path: Path, /, remove: bool = False) -> None:
    """Keep the objects of PATH in `gc`, even if the path is deleted.

    Args:
        path: path that the store made
        remove: remove the pin

    Example:
        olmo store pin checkpoints/olmo-tiny/final
    """
    store = current_store()
    record = naming.record_of(store, path)
    set_pin(store, record["key"], remove)
    print(f"{'un' if remove else ''}pinned {describe_record(record, {record['key']: str(path)})}")


def set_pin(store: Store, key: str, remove: bool = False) -> None:
    """Pin an action, whose outputs `gc` then keeps; or remove its pin."""
    pins = store.root / "pins"
    pins.mkdir(parents=True, exist_ok=True)
    (pins / key).unlink(missing_ok=True) if remove else (pins / key).touch()


def pinned_keys(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / "pins").glob("*"))


def push(to: str, paths: list[Path], /, inputs: bool = False, verify: bool = False) -> None:
    """Send the outputs of PATHS, or of all names here, to a remote store: a folder or a bucket.

    The records of the actions that they were made from are sent, too.

    Args:
        to: folder or URL of the remote store
        paths: paths that the store made
        inputs: send the contents that they were made from, too
        verify: download and hash objects that exist there, and replace damaged ones

    Example:
        olmo store push s3://lab/store checkpoints/olmo-tiny/final
    """
    print(f"{to}: {remote.push_names(current_store(), remote.Remote(to), paths, inputs, verify)}")
