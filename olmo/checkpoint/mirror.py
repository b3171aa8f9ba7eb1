"""Checkpoints elsewhere: fetched from a URL; mirrored to a bucket while a run goes on.

A mirrored checkpoint's manifest comes last: a folder there that has one is whole. Until then the
same list is there as `sending.json`, so that a run which was killed goes on sending where it was.
What is there is never thinned out.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from olmo.checkpoint import layout
from olmo.io import foreign
from olmo.io.bucket import Bucket
from olmo.io.downloads import fetch
from olmo.io.sealed import Damaged
from olmo.runtime.log import log
from olmo.runtime.urls import entrusted

SENDING = "sending.json"


def fetched(url: str, into: Path, optimizer: bool = True, trainer: bool = True) -> Path:
    """The checkpoint at a URL (http, s3, r2, weka, gs, hf), downloaded to a folder in `into`.

    Unsharded, or sharded in torch's layout. What is there already is not fetched again. Raises
    ValueError, one line, for what cannot be had.
    """
    url = entrusted(url).rstrip("/")
    # Checkpoints of several runs have one name, so the folder goes by the whole URL.
    name = foreign.part(url.rsplit("/", 1)[-1], url)
    folder = into / hashlib.sha256(url.encode()).hexdigest()[:12] / name

    def bring(*names: str) -> str | None:
        """The first of some files that is there; None if none is."""
        refusals = []
        for name in names:
            path = folder / name
            if path.exists():
                return name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fetch(f"{url}/{name}", path, folder / f".{path.name}.part")
                return name
            except ValueError as error:
                refusals.append(str(error))
        raise ValueError(
            f"cannot load {url}: {'; '.join(refusals)}. Expected a checkpoint there "
            "(step{N}-unsharded, or step{N} of torch's distributed checkpoint)"
        )

    bring("config.yaml")
    found = bring("model.pt", "model.safetensors", "model_and_optim/.metadata")
    if found == "model_and_optim/.metadata":
        from olmo.checkpoint.sharded import FOLDER, TRAIN, files_of

        for name in files_of(folder / FOLDER / ".metadata"):
            bring(f"{FOLDER}/{name}")
        if optimizer or trainer:
            bring(TRAIN)
        return folder
    if optimizer:
        bring("optim.pt", "optim.safetensors")
    if trainer or found == "model.safetensors":
        bring("train.pt", "other.pt", "train.json")
    return folder


def mirror(save_folder: Path, remote: str) -> None:
    """Send every finished checkpoint of a run that `remote` lacks.

    Raises ValueError where access is refused, OSError where a file cannot be read.
    """
    place = Bucket(remote)
    sizes = place.sizes()
    for folder in layout.checkpoints(save_folder):
        manifest = folder / layout.MANIFEST
        if not manifest.exists():
            continue  # OLMo's own
        done, sending = f"{folder.name}/{layout.MANIFEST}", f"{folder.name}/{SENDING}"
        content = manifest.read_bytes()
        try:
            files = layout.listed(content, str(manifest))
        except Damaged as error:
            log.warning(f"not sent: {error}")
            continue
        if done in sizes:
            if place.read(done) == content:
                continue
            place.remove(done)
        begun = sending in sizes and place.read(sending) == content
        if not begun:
            place.put(manifest, sending)
        for file, facts in files.items():
            name = f"{folder.name}/{file}"
            if not begun or sizes.get(name) != facts["bytes"]:
                place.put(folder / file, name)
        place.put(manifest, done)
        place.remove(sending)
        log.info(f"sent {folder.name} to {remote}")


def whole_there(place: Bucket) -> list[str]:
    """Names of the mirrored checkpoints that are whole, oldest first."""
    found = [name.split("/") for name in place.sizes()]
    folders = [Path(parts[0]) for parts in found if parts[1:] == [layout.MANIFEST]]
    folders = [folder for folder in folders if layout.is_name(folder)]
    return [str(folder) for folder in sorted(folders, key=layout.age)]


def begin(remote: str, step: int, overwrite: bool) -> None:
    """Ready `remote` for a run from `step` on: later checkpoints there, another run's, do not
    count as whole any more.

    Raises ValueError where there are some and `overwrite` does not say so.
    """
    place = Bucket(remote)
    there = [name for name in whole_there(place) if layout.age(Path(name))[0] > step]
    if there and not overwrite:
        raise ValueError(
            f"remote_save_folder={remote} already holds a run, up to {there[-1]}; give "
            "--try_load_latest_save to go on with it, --save_overwrite to write over it, or "
            "another --remote_save_folder"
        )
    for name in there:
        place.remove(f"{name}/{layout.MANIFEST}")


def newest_of_both(own: Path | None, save_folder: Path, remote: str) -> Path | None:
    """The newest checkpoint here or there; one from there is fetched into the save folder.

    What was lost on the way or is broken is passed over, loudly.
    """
    place = Bucket(remote)
    for name in reversed(whole_there(place)):
        folder = save_folder / name
        if own is not None and layout.age(folder) <= layout.age(own):
            return own
        try:
            _bring(place, folder)
        except ValueError as error:
            log.warning(f"passing over a broken checkpoint of {remote}: {error}")
            continue
        log.info(f"fetched {name} from {remote}")
        return folder
    return own


def _bring(place: Bucket, folder: Path) -> None:
    """Fetch a mirrored checkpoint; files that came before a kill are kept."""
    partial = layout.partial_name(folder)
    of = f"{folder.name}/{layout.MANIFEST}"
    manifest = place.read(of)
    files = layout.listed(manifest, f"{place.url}/{of}")
    partial.mkdir(parents=True, exist_ok=True)
    for name, facts in files.items():
        path = foreign.place(partial, name, f"{place.url}/{of}")
        if not (path.is_file() and layout.sha256(path) == facts["sha256"]):
            path.parent.mkdir(parents=True, exist_ok=True)
            place.get(f"{folder.name}/{name}", path, facts["bytes"])
    (partial / layout.MANIFEST).write_bytes(manifest)
    layout.verify(partial)
    layout.publish(partial, folder)
    layout.link_latest(folder)
