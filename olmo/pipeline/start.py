"""`olmo start`: an external checkpoint as a folder that a run can start from.

Whatever its format and place, the result has model.safetensors and, on request, the optimizer
state, with the names and layout of the pipeline's own final folders.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from olmo.runtime.numbers import to_json
from olmo.store.stage import Facts, Folder, Inputs, Unhashed, Work, stage


def start(place: str, checkpoint: Path, optimizer: bool = False) -> None:
    """Import a checkpoint, a folder or a URL, of any format that can be loaded.

    Its weights, and with --optimizer its optimizer state.

    Args:
        place: folder or URL of a checkpoint
        checkpoint: folder to write
        optimizer: import its optimizer state, too
    """
    if "://" in place:
        fetched_checkpoint(url=place, checkpoint=checkpoint, optimizer=optimizer)
        return
    folder = Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"start_from: expected a run or a checkpoint's folder, found none at {place}"
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    local_checkpoint(files=files, checkpoint=checkpoint, folder=folder, optimizer=optimizer)


@stage(version=1)
def local_checkpoint(
    files: Inputs, checkpoint: Folder, folder: Unhashed[Path], optimizer: bool = False
) -> Facts:
    """Import a checkpoint of this machine. `files` are those in `folder`."""
    return {
        "from": str(folder),
        "parameters": write_start_checkpoint(folder, checkpoint, optimizer),
    }


@stage(version=1)
def fetched_checkpoint(url: str, checkpoint: Folder, part: Work, optimizer: bool = False) -> Facts:
    """Download and import a checkpoint. An interrupted download is resumed."""
    from olmo.checkpoint.mirror import download_checkpoint

    folder = download_checkpoint(url, part, optimizer, trainer=optimizer)
    parameters = write_start_checkpoint(folder, checkpoint, optimizer)
    shutil.rmtree(part)
    return {"from": url, "parameters": parameters}


def write_start_checkpoint(folder: Path, out: Path, optimizer: bool) -> int:
    """Write the parts of a checkpoint that a run starts from. Returns the number of parameters."""
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
