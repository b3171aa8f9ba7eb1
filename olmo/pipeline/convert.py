"""`olmo checkpoint convert`: one checkpoint format to another."""

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
from olmo.runtime.log import log
from olmo.runtime.numbers import to_json
from olmo.store.naming import check_not_in_store

FORMATS = ("unsharded", "sharded", "safetensors", "hf")


def convert(
    source: str | Path, into: str | Path, /, kind: str, tokenizer: Path | None = None
) -> Path:
    """Read a checkpoint, a folder or a URL, and write it in another format. Returns its folder.

    Of the kind sharded and unsharded, INTO gets step{N} (one shard, which any number of processes
    can load) or step{N}-unsharded; of the kind safetensors, model, optim, train.json and
    config.yaml itself; of the kind hf what transformers reads: the model alone, and a
    tokenizer.json. A folder of transformers can be converted to safetensors, without optimizer
    state.

    Args:
        source: folder or URL of a checkpoint
        into: folder to write
        kind: sharded, unsharded, safetensors or hf
        tokenizer: tokenizer.json for the kind hf, if neither the store's records nor the
            checkpoint's config name one

    Example:
        olmo checkpoint convert checkpoints/olmo-tiny/final for-transformers --kind hf

    Raises ValueError for an unknown kind, for a checkpoint that lacks a part, for an INTO that the
    pipeline made, and for a model that transformers does not support.
    """
    if kind not in FORMATS:
        raise ValueError(f"--kind: expected one of {', '.join(FORMATS)}, found {kind!r}")
    into = Path(into)
    check_not_in_store(into)
    if "://" not in str(source):
        return _convert(Path(source), into, kind, tokenizer)
    into.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".fetched", dir=into) as place:
        needs_state = kind != "hf"
        folder = download_checkpoint(
            str(source), Path(place), optimizer=needs_state, trainer=needs_state
        )
        return _convert(folder, into, kind, tokenizer)


def _convert(source: Path, into: Path, kind: str, tokenizer: Path | None) -> Path:
    if kind == "hf":
        return _write_hf(source, into, tokenizer)
    if huggingface.is_hf_folder(source):
        return _convert_hf(source, into, kind)
    checkpoint = load_checkpoint(source)
    assert checkpoint.optim is not None and checkpoint.train is not None
    if not (source / "config.yaml").exists():
        raise ValueError(f"{source}: expected a checkpoint with config.yaml, found none")
    config_yaml = (source / "config.yaml").read_text()
    if kind == "safetensors":
        text = format_train_json({**checkpoint.train, "optimizer": checkpoint.optim[1]})
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
        "optim": _number_parameters(*checkpoint.optim),
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


def format_train_json(train: dict[str, Any]) -> str:
    """train.json of a trainer's state, without the state of random generators.

    Raises ValueError for values that JSON has no form for.
    """
    plain_state = {key: value for key, value in train.items() if key != "rng"}

    def convert_path(value: Any) -> str:
        if isinstance(value, Path):
            return str(value)
        raise ValueError(
            f"expected plain values in the trainer's state, found a {type(value).__name__}"
        )

    return to_json(plain_state, indent=1, sort_keys=True, default=convert_path) + "\n"


def _write_hf(source: Path, into: Path, tokenizer: Path | None) -> Path:
    checkpoint = load_checkpoint(source, optimizer=False, trainer=False)
    into.mkdir(parents=True, exist_ok=True)
    config_yaml = (source / "config.yaml").read_text()
    if tokenizer is None:
        from olmo.inspect.generate import load_checkpoint_tokenizer
        from olmo.inspect.run import TrainedRun

        base_tokenizer = load_checkpoint_tokenizer(
            str(source), TrainedRun(str(source)), None
        ).base_tokenizer
        tokenizer = into / "tokenizer.json"
        base_tokenizer.save(str(tokenizer))
    huggingface.write_hf_folder(into, checkpoint.model, config_yaml, tokenizer)
    log.info(f"written: {into}")
    return into


def _convert_hf(source: Path, into: Path, kind: str) -> Path:
    if kind != "safetensors":
        raise ValueError(
            f"{source}: expected optimizer state, which --kind {kind} needs, found a model only; "
            "write it with --kind safetensors"
        )
    weights, config_yaml = huggingface.read_hf_folder(source)
    into.mkdir(parents=True, exist_ok=True)
    (into / "config.yaml").write_text(config_yaml)
    write_safetensors(into, weights)
    log.info(f"written: {into}")
    return into


def _number_parameters(state: State, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """torch's state_dict of an optimizer: parameters are numbered in the order of the groups."""
    numbers: dict[str, int] = {}
    new_groups = []
    for group in groups:
        names = group["param_names"]
        numbers |= {name: len(numbers) + i for i, name in enumerate(names)}
        new_groups.append({**group, "params": [numbers[name] for name in names]})
    return {
        "state": {numbers[name]: tensors for name, tensors in state.items()},
        "param_groups": new_groups,
    }
