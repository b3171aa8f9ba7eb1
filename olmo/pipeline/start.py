"""A checkpoint that this pipeline did not train, as a folder that it can start a run from.

Whatever the kind and the place, what comes out is the same: model.safetensors and, where it is
wanted, the optimizer's state, named and laid out as in the pipeline's own final folders.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from olmo.runtime.numbers import to_json
from olmo.store.stage import Facts, Folder, Inputs, Unhashed, Work, stage


def start(place: str, checkpoint: Path, optimizer: bool = False) -> None:
    """Take a checkpoint, a folder or a URL, of any kind that can be loaded.

    Its weights, and with --optimizer its optimizer's state too.
    """
    if "://" in place:
        fetched_checkpoint(url=place, checkpoint=checkpoint, optimizer=optimizer)
        return
    folder = Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"start_from: no run and no checkpoint folder at {place}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    local_checkpoint(files=files, checkpoint=checkpoint, folder=folder, optimizer=optimizer)


@stage(version=1)
def local_checkpoint(
    files: Inputs, checkpoint: Folder, folder: Unhashed[Path], optimizer: bool = False
) -> Facts:
    """Take a checkpoint of this machine. `files` are those in `folder`."""
    return {"from": str(folder), "parameters": write(folder, checkpoint, optimizer)}


@stage(version=1)
def fetched_checkpoint(url: str, checkpoint: Folder, part: Work, optimizer: bool = False) -> Facts:
    """Fetch a checkpoint. What arrived before an attempt was cut off is used."""
    from olmo.checkpoint.mirror import download_checkpoint

    folder = download_checkpoint(url, part, optimizer, trainer=optimizer)
    parameters = write(folder, checkpoint, optimizer)
    shutil.rmtree(part)
    return {"from": url, "parameters": parameters}


def write(folder: Path, out: Path, optimizer: bool) -> int:
    """Write what a run can start from; how many weights there are."""
    from olmo.checkpoint.final import write_safetensors
    from olmo.checkpoint.read import load_checkpoint

    found = load_checkpoint(folder, optimizer=optimizer, trainer=False)
    state, groups = found.optim or ({}, [])
    out.mkdir(parents=True)
    write_safetensors(out, found.model, state if optimizer else None)
    if optimizer:
        (out / "train.json").write_text(to_json({"optimizer": groups}, indent=1) + "\n")
    if (folder / "config.yaml").exists():
        shutil.copyfile(folder / "config.yaml", out / "config.yaml")
    return sum(tensor.numel() for tensor in found.model.values())
