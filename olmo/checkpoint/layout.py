"""Checkpoint folders on disk: their names, when one is whole, which is the newest, which go.

    <save_folder>/step40-unsharded/   config.yaml  model.pt  optim.pt  train.pt  manifest.json
    <save_folder>/latest-unsharded -> step40-unsharded
    <save_folder>/latest           -> the newest of any kind

A folder is filled under another name, each file and then the manifest brought to disk, and
renamed at the end. So a folder of that name is whole, and its manifest (size and sha256 of each
file) says whether it still is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmo.io import foreign, sealed
from olmo.io.sealed import Damaged

MANIFEST = "manifest.json"
EPHEMERAL = "ephemeral"  # an empty file in a checkpoint that the next one replaces
_STEP = re.compile(r"step(\d{1,15})(-unsharded)?", re.ASCII)
_PARTIAL, _REPLACED, _REMOVED = ".partial", ".replaced", ".removed"


def folder_name(step: int, unsharded: bool) -> str:
    return f"step{step}{'-unsharded' if unsharded else ''}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for other names."""
    found = _STEP.fullmatch(folder.name)
    return int(found[1]) if found else None


def is_unsharded(folder: Path) -> bool:
    return folder.name.endswith("-unsharded")


def is_name(folder: Path) -> bool:
    """Whether this is what a checkpoint folder is called."""
    return _STEP.fullmatch(folder.name) is not None


def age(folder: Path) -> tuple[int, bool]:
    """What checkpoint folders are sorted by, oldest first. Of two at one step the sharded one
    counts as the newer: it is the cheaper to load."""
    return step_of(folder) or 0, not is_unsharded(folder)


def checkpoints(save_folder: str | Path, unsharded: bool | None = None) -> list[Path]:
    """Checkpoint folders, oldest first, of one kind or of both; unfinished ones are not there."""
    found = [
        path
        for path in Path(save_folder).glob("step*")
        if path.is_dir() and not path.is_symlink() and is_name(path)
    ]
    if unsharded is not None:
        found = [path for path in found if is_unsharded(path) == unsharded]
    return sorted(found, key=age)


def partial_name(folder: Path) -> Path:
    """What a folder is called while it is being filled."""
    return folder.with_name(folder.name + _PARTIAL)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that what is left of it, if interrupted, is not taken for one."""
    removed = folder.with_name(folder.name + _REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder to fill; it gets its manifest and the name `folder` at the end, or never.

    An older folder of that name is replaced. Raises OSError where the disk is full.
    """
    partial = partial_name(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        manifest = {}
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            manifest[str(path.relative_to(partial))] = {
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
            sealed.to_disk(path)
        sealed.write(partial / MANIFEST, sealed.dumps({"files": manifest}, 1))
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            error.errno,
            f"could not write the checkpoint {folder} ({error.strerror}); "
            "earlier checkpoints are untouched, and the run goes on from the newest of them",
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    publish(partial, folder)


def publish(partial: Path, folder: Path) -> None:
    """Give a finished folder its name, putting aside one that has it."""
    if folder.exists():
        replaced = folder.with_name(folder.name + _REPLACED)
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced)
    else:
        partial.rename(folder)
    sealed.to_disk(folder.parent)


def put_back(save_folder: Path) -> None:
    """Give a checkpoint its name again, where a save was interrupted that was to replace it."""
    for path in save_folder.glob(f"step*{_REPLACED}"):
        if not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))


def sweep(save_folder: Path) -> None:
    """Remove what interrupted saves left."""
    for path in save_folder.glob("step*"):
        if path.suffix in (_PARTIAL, _REPLACED, _REMOVED):
            shutil.rmtree(path, ignore_errors=True)


def remove_after(save_folder: Path, step: int, origin: Path | None) -> None:
    """Remove checkpoints of later steps: another run's, which this one writes over.

    Left there, they would be taken for this run's newest. The one it started from stays.
    """
    for path in checkpoints(save_folder):
        if (step_of(path) or 0) > step and (origin is None or not path.samefile(origin)):
            remove(path)


def link_latest(folder: Path) -> None:
    """Point `latest`, and `latest-unsharded` where it fits, to this folder."""
    for name in ("latest", "latest-unsharded") if is_unsharded(folder) else ("latest",):
        fresh = folder.with_name(f".{name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(folder.name)
        fresh.replace(folder.with_name(name))


def retain(newest: Path, keep: int) -> list[Path]:
    """Of `newest` and the older ones of its kind keep that many (-1: all); what was removed."""
    found = [p for p in checkpoints(newest.parent, is_unsharded(newest)) if age(p) <= age(newest)]
    going = found[: max(len(found) - keep, 0)] if keep >= 0 else []
    for path in going:
        remove(path)
    return going


def listed(manifest: bytes, whose: str) -> dict[str, dict[str, Any]]:
    """The files of a manifest, by their names in the folder: {"bytes", "sha256"}.

    Raises ValueError for one that is damaged, or that names what lies elsewhere.
    """
    try:
        files: dict[str, dict[str, Any]] = sealed.loads(manifest, whose)["files"]
    except Damaged:
        if (unsealed := _unsealed(manifest)) is None:
            raise
        files = unsealed
    try:
        for name, facts in files.items():
            foreign.inner(name, whose)
            foreign.size(facts["bytes"], whose)
            foreign.digest(facts["sha256"], whose)
        foreign.refuse_twice(files, whose)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{whose}: expected files with bytes and sha256, found none") from error
    if not files:
        raise ValueError(f"{whose}: expected the files of a checkpoint, found none")
    return files


def _unsealed(manifest: bytes) -> dict[str, dict[str, Any]] | None:
    """The files of a manifest from before manifests were sealed, if it is as those were."""
    try:
        found = json.loads(manifest)
        whole = all(set(facts) == {"bytes", "sha256"} for facts in found["files"].values())
        return dict(found["files"]) if whole and set(found) == {"files"} else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def verify(folder: Path) -> None:
    """Raise ValueError unless every file is there as its manifest says.

    A folder without a manifest (OLMo's own) is taken as it is, and so is a file. Raises
    FileNotFoundError where there is neither.
    """
    if folder.is_file():
        return  # of weights alone
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder}; name one that is there")
    remedy = "load another one (--load_path), or remove the folder"
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    try:
        files = listed(manifest.read_bytes(), MANIFEST)
    except ValueError as error:
        raise ValueError(
            f"the checkpoint {folder} has an unreadable manifest: {error}; {remedy}"
        ) from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"the checkpoint {folder} lacks {name}; {remedy}")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(
                f"the checkpoint {folder} is cut off or overwritten: {name} has {size} bytes, "
                f"expected {expected['bytes']}; {remedy}"
            )
        if (found := sha256(path)) != expected["sha256"]:
            raise ValueError(
                f"the checkpoint {folder} is corrupt: {name} has sha256 {found[:12]}…, "
                f"expected {expected['sha256'][:12]}…; {remedy}"
            )


def sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
