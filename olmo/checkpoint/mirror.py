"""Remote checkpoints: downloads from a URL, and a mirror in a bucket while a run trains.

A checkpoint's manifest is uploaded last: a remote folder that has one is complete. Until then the
same content is there as `sending.json`, so that a run that was killed resumes its upload. Remote
checkpoints are never removed to save space.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from olmo.checkpoint import layout
from olmo.io import untrusted
from olmo.io.bucket import Bucket, BucketError
from olmo.io.downloads import fetch
from olmo.io.sealed import Damaged, hash_file
from olmo.runtime.log import log
from olmo.runtime.urls import stash_secrets

UPLOADING = "sending.json"


def download_checkpoint(url: str, into: Path, optimizer: bool = True, trainer: bool = True) -> Path:
    """Download the checkpoint at a URL (http, s3, r2, weka, gs, hf) to a folder in `into`.

    It is unsharded, or sharded in torch's layout. Files that exist are not downloaded again.
    Raises ValueError, one line, if a file is not available.
    """
    url = stash_secrets(url).rstrip("/")
    # Checkpoints of several runs have the same name, so the folder is named by the full URL.
    name = untrusted.check_part(url.rsplit("/", 1)[-1], url)
    folder = into / hashlib.sha256(url.encode()).hexdigest()[:12] / name

    def download_first(*names: str) -> str:
        """Download the first of these files that exists; returns its name."""
        errors = []
        for name in names:
            path = folder / name
            if path.exists():
                return name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fetch(f"{url}/{name}", path, folder / f".{path.name}.part")
                return name
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(
            f"cannot load {url}: {'; '.join(errors)}. Expected a checkpoint there "
            "(step{N}-unsharded, or step{N} of torch's distributed checkpoint)"
        )

    download_first("config.yaml")
    weights = download_first("model.pt", "model.safetensors", "model_and_optim/.metadata")
    if weights == "model_and_optim/.metadata":
        from olmo.checkpoint.sharded import STATE_FOLDER, TRAIN_FILE, list_shard_files

        for name in list_shard_files(folder / STATE_FOLDER / ".metadata"):
            download_first(f"{STATE_FOLDER}/{name}")
        if optimizer or trainer:
            download_first(TRAIN_FILE)
        return folder
    if optimizer:
        download_first("optim.pt", "optim.safetensors")
    if trainer or weights == "model.safetensors":
        download_first("train.pt", "other.pt", "train.json")
    return folder


def mirror_checkpoints(save_folder: Path, remote: str) -> None:
    """Upload every finished checkpoint of a run that `remote` lacks.

    Raises ValueError if access is denied, OSError if a file cannot be read.
    """
    bucket = Bucket(remote)
    sizes = bucket.sizes()
    for folder in layout.list_checkpoints(save_folder):
        manifest = folder / layout.MANIFEST
        if not manifest.exists():
            continue  # OLMo's own
        done, uploading = f"{folder.name}/{layout.MANIFEST}", f"{folder.name}/{UPLOADING}"
        content = manifest.read_bytes()
        try:
            files = layout.parse_manifest(content, str(manifest))
        except Damaged as error:
            log.warning(f"not uploaded: {error}")

            continue
        if done in sizes:
            if bucket.read(done) == content:
                continue
            bucket.remove(done)
        is_resumed = uploading in sizes and bucket.read(uploading) == content
        if not is_resumed:
            bucket.put(manifest, uploading)
        for file, facts in files.items():
            name = f"{folder.name}/{file}"
            if not is_resumed or sizes.get(name) != facts["bytes"]:
                bucket.put(folder / file, name)
        bucket.put(manifest, done)
        bucket.remove(uploading)
        log.info(f"uploaded {folder.name} to {remote}")


def list_mirrored(bucket: Bucket) -> list[str]:
    """Names of the complete checkpoints in a bucket, oldest first."""
    paths = [name.split("/") for name in bucket.sizes()]
    folders = [Path(parts[0]) for parts in paths if parts[1:] == [layout.MANIFEST]]
    folders = [folder for folder in folders if layout.is_checkpoint_name(folder)]
    return [str(folder) for folder in sorted(folders, key=layout.age_key)]


def prepare_remote(remote: str, step: int, overwrite: bool) -> None:
    """Prepare `remote` for a run from `step` on: removes the manifests of later checkpoints, which
    belong to another run and then no longer count as complete.

    Raises ValueError if there are some and `overwrite` is not set.
    """
    bucket = Bucket(remote)
    later = [name for name in list_mirrored(bucket) if layout.age_key(Path(name))[0] > step]
    if later and not overwrite:
        raise ValueError(
            f"remote_save_folder={remote} already contains a run, up to {later[-1]}; give "
            "--try_load_latest_save to continue it, --save_overwrite to overwrite it, or "
            "another --remote_save_folder"
        )
    for name in later:
        bucket.remove(f"{name}/{layout.MANIFEST}")


def find_newest_or_download(own: Path | None, save_folder: Path, remote: str) -> Path | None:
    """The newest local or remote checkpoint; a remote one is downloaded into the save folder.

    `own` is the newest local one. A broken remote one is skipped with a warning; BucketError if
    one cannot be read.
    """
    bucket = Bucket(remote)
    for name in reversed(list_mirrored(bucket)):
        folder = save_folder / name
        if own is not None and layout.age_key(folder) <= layout.age_key(own):
            return own
        try:
            _download_mirrored(bucket, folder)
        except BucketError:
            raise  # an older checkpoint would lose the steps between
        except ValueError as error:
            log.warning(f"skipping a broken checkpoint of {remote}: {error}")
            continue
        log.info(f"downloaded {name} from {remote}")
        return folder
    return own


def _download_mirrored(bucket: Bucket, folder: Path) -> None:
    """Download a mirrored checkpoint; files that an interrupted download left are reused."""
    partial = layout.partial_path(folder)
    manifest_name = f"{folder.name}/{layout.MANIFEST}"
    source = f"{bucket.url}/{manifest_name}"
    manifest = bucket.read(manifest_name)
    files = layout.parse_manifest(manifest, source)
    partial.mkdir(parents=True, exist_ok=True)
    for name, facts in files.items():
        path = untrusted.resolve_inside(partial, name, source)
        if not (path.is_file() and hash_file(path) == facts["sha256"]):
            path.parent.mkdir(parents=True, exist_ok=True)
            bucket.get(f"{folder.name}/{name}", path, facts["bytes"])
    (partial / layout.MANIFEST).write_bytes(manifest)
    layout.verify_checkpoint(partial)
    layout.publish_folder(partial, folder)
    layout.link_latest(folder)
