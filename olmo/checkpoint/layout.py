"""Checkpoint folders on disk: names, atomic writing, verification, retention.

    <save_folder>/step40-unsharded/   config.yaml  model.pt  optim.pt  train.pt  manifest.json
    <save_folder>/latest-unsharded -> step40-unsharded
    <save_folder>/latest           -> the newest of any kind

A folder is filled under a temporary name; each file and then the manifest is fsynced; then the
folder is renamed. So a folder with the final name is complete, and its manifest (size and sha256 of
each file) shows later damage.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmo.io import sealed, untrusted
from olmo.io.sealed import Damaged

MANIFEST = "manifest.json"
EPHEMERAL = "ephemeral"  # an empty file that marks a checkpoint for removal by the next one
_STEP = re.compile(r"step(\d{1,15})(-unsharded)?", re.ASCII)
_PARTIAL, _REPLACED, _REMOVED = ".partial", ".replaced", ".removed"


def folder_name(step: int, unsharded: bool) -> str:
    return f"step{step}{'-unsharded' if unsharded else ''}"


def parse_step(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for another name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def is_unsharded(folder: Path) -> bool:
    return folder.name.endswith("-unsharded")


def is_checkpoint_name(folder: Path) -> bool:
    return parse_step(folder) is not None


def age_key(folder: Path) -> tuple[int, bool]:
    """Sort key, oldest first. Of two at one step the sharded one is newer: it loads faster."""
    return parse_step(folder) or 0, not is_unsharded(folder)


def list_checkpoints(save_folder: str | Path, unsharded: bool | None = None) -> list[Path]:
    """Complete checkpoint folders, oldest first: `unsharded`, sharded (False), or both (None)."""
    folders = [
        path
        for path in Path(save_folder).glob("step*")
        if path.is_dir() and not path.is_symlink() and is_checkpoint_name(path)
    ]
    if unsharded is not None:
        folders = [path for path in folders if is_unsharded(path) == unsharded]
    return sorted(folders, key=age_key)


def partial_path(folder: Path) -> Path:
    """The temporary name of a folder while it is filled."""
    return folder.with_name(folder.name + _PARTIAL)


def remove_checkpoint(folder: Path) -> None:
    """Rename a checkpoint, then remove it: an interrupted removal leaves none that looks valid."""
    removed = folder.with_name(folder.name + _REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


@contextlib.contextmanager
def atomic_checkpoint(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; at the end it gets a manifest and the name `folder`.

    An error removes it. An older folder of that name is replaced. Raises OSError if the disk is
    full.
    """
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        manifest = {}
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            manifest[str(path.relative_to(partial))] = {
                "bytes": path.stat().st_size,
                "sha256": sealed.hash_file(path),
            }
            sealed.fsync_path(path)
        sealed.write_atomic(partial / MANIFEST, sealed.dumps({"files": manifest}, 1))
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            error.errno,
            f"could not write the checkpoint {folder} ({error.strerror}); earlier checkpoints are "
            "unchanged, and the run can be resumed from the newest of them",
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    publish_folder(partial, folder)


def publish_folder(partial: Path, folder: Path) -> None:
    """Rename a finished folder to its final name, replacing an older one."""
    if folder.exists():
        replaced = folder.with_name(folder.name + _REPLACED)
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced)
    else:
        partial.rename(folder)
    sealed.fsync_path(folder.parent)


def restore_replaced(save_folder: Path) -> None:
    """Rename a checkpoint back whose replacement was interrupted."""
    for path in save_folder.glob(f"step*{_REPLACED}"):
        if not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))


def remove_leftovers(save_folder: Path) -> None:
    """Remove what interrupted saves and removals left."""
    for path in save_folder.glob("step*"):
        if path.suffix in (_PARTIAL, _REPLACED, _REMOVED):
            shutil.rmtree(path, ignore_errors=True)


def remove_later_checkpoints(save_folder: Path, step: int, origin: Path | None) -> None:
    """Remove checkpoints of later steps, from an earlier run that this one overwrites.

    They would look like this run's newest checkpoint. `origin`, from which this run started, stays.
    """
    for path in list_checkpoints(save_folder):
        if (parse_step(path) or 0) > step and (origin is None or not path.samefile(origin)):
            remove_checkpoint(path)


def link_latest(folder: Path) -> None:
    """Point `latest`, and for an unsharded folder `latest-unsharded`, to this folder."""
    for name in ("latest", "latest-unsharded") if is_unsharded(folder) else ("latest",):
        fresh = folder.with_name(f".{name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(folder.name)
        fresh.replace(folder.with_name(name))


def keep_newest(newest: Path, keep: int) -> list[Path]:
    """Of `newest` and older ones of its kind keep `keep` (-1: all); returns the removed ones."""
    found = [
        p
        for p in list_checkpoints(newest.parent, is_unsharded(newest))
        if age_key(p) <= age_key(newest)
    ]
    removed = found[: max(len(found) - keep, 0)] if keep >= 0 else []
    for path in removed:
        remove_checkpoint(path)
    return removed


def parse_manifest(manifest: bytes, source: str) -> dict[str, dict[str, Any]]:
    """The {"bytes", "sha256"} of each file in a manifest, by its name in the folder.

    `source` names the manifest in errors. Raises ValueError if it is damaged, or names a file
    outside its folder.
    """
    try:
        files: dict[str, dict[str, Any]] = sealed.loads(manifest, source)["files"]
    except Damaged:
        if (unsealed := _unsealed(manifest)) is None:
            raise
        files = unsealed
    try:
        for name, facts in files.items():
            untrusted.check_relative(name, source)
            untrusted.check_byte_count(facts["bytes"], source)
            untrusted.check_digest(facts["sha256"], source)
        untrusted.check_no_overlap(files, source)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: expected files with bytes and sha256, found none") from error
    if not files:
        raise ValueError(f"{source}: expected the files of a checkpoint, found none")
    return files


def _unsealed(manifest: bytes) -> dict[str, dict[str, Any]] | None:
    """The files of a manifest from a version that did not seal manifests; None if it is not one."""
    try:
        found = json.loads(manifest)
        is_valid = all(set(facts) == {"bytes", "sha256"} for facts in found["files"].values())
        return dict(found["files"]) if is_valid and set(found) == {"files"} else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def verify_checkpoint(folder: Path) -> None:
    """Raise ValueError unless every file has the size and sha256 of the manifest.

    A folder without a manifest (OLMo's own) is not checked, nor is a file. Raises
    FileNotFoundError if there is neither.
    """
    if folder.is_file():
        return  # weights alone
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder}; give one that exists")
    remedy = "load another one (--load_path), or remove the folder"
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    try:
        files = parse_manifest(manifest.read_bytes(), MANIFEST)
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
                f"the checkpoint {folder} is truncated or overwritten: {name} has {size} bytes, "
                f"expected {expected['bytes']}; {remedy}"
            )
        if (found := sealed.hash_file(path)) != expected["sha256"]:
            raise ValueError(
                f"the checkpoint {folder} is corrupt: {name} has sha256 {found[:12]}…, "
                f"expected {expected['sha256'][:12]}…; {remedy}"
            )
