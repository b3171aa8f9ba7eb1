"""Keys of a training config that the pipeline refuses, since its earlier stages ignore them.

tests/unit/test_heeded.py lists all keys: used, refused or harmless.
"""

from olmo.config import TrainConfig
from olmo.pipeline.recipe import RunConfig


def refuse_unsupported_keys(name: str, run: RunConfig, cfg: TrainConfig) -> None:
    """Raises ValueError for a key that the trainer uses and the stages before it ignore."""
    path, dataset = run.train, run.dataset
    if cfg.load_path is not None:  # the digest of what it names must be in the action
        raise ValueError(
            f"{path}: load_path works with `python -m olmo.train` only; give {name} in "
            f"config/config.yaml start_from: {cfg.load_path}"
        )
    values = {
        "dry_run": cfg.dry_run,
        "fast_forward_batches": cfg.fast_forward_batches,
        "data.custom_dataset": cfg.data.custom_dataset,
        "data.order_path": cfg.data.order_path,
        "data.mixture": cfg.data.mixture,
        "data.holes_path": cfg.data.holes_path,
        "data.label_mask_paths": cfg.data.label_mask_paths,
        "data.token_bytes_paths": cfg.data.token_bytes_paths,
    }
    if unsupported := [name for name, value in values.items() if value]:
        raise ValueError(
            f"{path}: {unsupported[0]} works with `python -m olmo.train` only; remove it"
        )
    if dataset is None:
        return
    if cfg.data.paths or cfg.data.datasets:
        raise ValueError(
            f"{path} names token files, and config/config.yaml gives {name} the dataset {dataset}; "
            "remove data.paths and data.datasets, or the dataset"
        )
    # The token stages write uint16 or uint32; the int type of the same size reads the same ids.
    bits = "16" if cfg.model.vocab_size <= 2**16 else "32"
    if not cfg.data.memmap_dtype.endswith(bits):
        raise ValueError(
            f"{path}: data.memmap_dtype: expected uint{bits}, in which the tokens of {dataset} "
            f"are stored for {cfg.model.vocab_size:,} ids; found {cfg.data.memmap_dtype}"
        )
