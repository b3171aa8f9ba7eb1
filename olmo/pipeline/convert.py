"""One kind of checkpoint to another: sharded, unsharded, safetensors, hf."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from olmo.checkpoint import huggingface
from olmo.checkpoint.final import write_safetensors
from olmo.checkpoint.mirror import download_checkpoint
from olmo.checkpoint.optim_state import State
from olmo.checkpoint.read import load_checkpoint
from olmo.checkpoint.save import save_unsharded
from olmo.io.downloads import check_not_in_store
from olmo.runtime.log import log
from olmo.runtime.numbers import to_json

KINDS = ("unsharded", "sharded", "safetensors", "hf")


def convert(
    source: str | Path, into: str | Path, /, kind: str, tokenizer: Path | None = None
) -> Path:
    """Read a checkpoint, a folder or a URL, and write it as another kind: unsharded, sharded,
    safetensors or hf; the folder that was written.

    Sharded and unsharded ones are written as INTO/step{N} and INTO/step{N}-unsharded,
    safetensors (model, optim, train.json, config.yaml) into INTO itself. Written sharded, it is
    one shard: a run that loads it spreads it as it needs.

    hf is what transformers reads: the model alone, beside the tokenizer.json of `tokenizer`, or
    else the one that the store's records or the checkpoint's config lead to. Such a folder is a
    source too, of safetensors without optimizer state.

    Raises ValueError for another kind, for a checkpoint that lacks a part, for an INTO that the
    pipeline made, and for a model that transformers cannot express.
    """
    if kind not in KINDS:
        raise ValueError(f"--kind: expected one of {', '.join(KINDS)}, found {kind!r}")
    into = Path(into)
    check_not_in_store(into)
    if "://" not in str(source):
        return _convert(Path(source), into, kind, tokenizer)
    into.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".fetched", dir=into) as place:
        whole = kind != "hf"
        found = download_checkpoint(str(source), Path(place), optimizer=whole, trainer=whole)
        return _convert(found, into, kind, tokenizer)


def _convert(source: Path, into: Path, kind: str, tokenizer: Path | None) -> Path:
    if kind == "hf":
        return _to_hf(source, into, tokenizer)
    if huggingface.is_hf_folder(source):
        return _from_hf(source, into, kind)
    checkpoint = load_checkpoint(source)
    assert checkpoint.optim is not None and checkpoint.train is not None
    if not (source / "config.yaml").exists():
        raise ValueError(f"{source} has no config.yaml, which a checkpoint of any kind has")
    config_yaml = (source / "config.yaml").read_text()
    if kind == "safetensors":
        text = as_json({**checkpoint.train, "optimizer": checkpoint.optim[1]})
        into.mkdir(parents=True, exist_ok=True)
        (into / "config.yaml").write_text(config_yaml)
        write_safetensors(into, checkpoint.model, checkpoint.optim[0])
        (into / "train.json").write_text(text)
        log.info(f"written: {into}")
        return into
    train = {k: v for k, v in checkpoint.train.items() if k != "optimizer"}
    parts: dict[str, Any] = {
        "config_yaml": config_yaml,
        "model": checkpoint.model,
        "optim": _numbered(*checkpoint.optim),
        "train": train,
    }
    step = int(train["global_step"])
    into.mkdir(parents=True, exist_ok=True)
    if kind == "unsharded":
        folder = save_unsharded(into, step, **parts)
    else:
        from olmo.checkpoint.sharded import save_sharded

        folder = save_sharded(into, step, **parts)
    log.info(f"written: {folder}")
    return folder


def as_json(train: dict[str, Any]) -> str:
    """train.json of a trainer's state, without that of the generators, which nothing here needs.

    Raises ValueError for what has no place in JSON.
    """
    told = {key: value for key, value in train.items() if key != "rng"}

    def plain(value: Any) -> str:
        if isinstance(value, Path):
            return str(value)
        raise ValueError(
            f"the trainer's state holds a {type(value).__name__}; expected plain values"
        )

    return to_json(told, indent=1, sort_keys=True, default=plain) + "\n"


def _to_hf(source: Path, into: Path, tokenizer: Path | None) -> Path:
    checkpoint = load_checkpoint(source, optimizer=False, trainer=False)
    into.mkdir(parents=True, exist_ok=True)
    config_yaml = (source / "config.yaml").read_text()
    if tokenizer is None:
        from olmo.inspect.generate import tokenizer_of
        from olmo.inspect.run import Run

        known = tokenizer_of(str(source), Run(str(source)), None).base_tokenizer
        tokenizer = into / "tokenizer.json"
        known.save(str(tokenizer))
    huggingface.write_hf_folder(into, checkpoint.model, config_yaml, tokenizer)
    log.info(f"written: {into}")
    return into


def _from_hf(source: Path, into: Path, kind: str) -> Path:
    if kind != "safetensors":
        raise ValueError(
            f"{source} is a model alone and has no optimizer state, without which there is no "
            f"{kind} checkpoint; write it with --kind safetensors"
        )
    weights, config_yaml = huggingface.read_hf_folder(source)
    into.mkdir(parents=True, exist_ok=True)
    (into / "config.yaml").write_text(config_yaml)
    write_safetensors(into, weights)
    log.info(f"written: {into}")
    return into


def _numbered(state: State, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """torch's form: parameters numbered in the order of the groups."""
    numbers: dict[str, int] = {}
    new_groups = []
    for group in groups:
        names = group["param_names"]
        numbers |= {name: len(numbers) + i for i, name in enumerate(names)}
        new_groups.append({**group, "params": [numbers[name] for name in names]})
    return {
        "state": {numbers[name]: kept for name, kept in state.items()},
        "param_groups": new_groups,
    }
