"""Keys of a training config that the pipeline refuses: its stages before training do not heed them.

tests/unit/test_heeded.py lists all keys: heeded, refused or harmless.
"""

from olmo.config import TrainConfig
from olmo.pipeline.recipe import Run


def refuse_unheeded(name: str, run: Run, cfg: TrainConfig) -> None:
    """Raises ValueError for what the trainer would heed and the stages before it do not."""
    path, dataset = run.train, run.dataset
    if cfg.load_path is not None:  # its content is to be part of what is asked for
        raise ValueError(
            f"{path}: load_path is for `python -m olmo.train` alone; give {name} in "
            f"config/config.yaml start_from: {cfg.load_path}"
        )
    values = {
        "dry_run": cfg.dry_run,
        "fast_forward_batches": cfg.fast_forward_batches,
        "data.custom_dataset": cfg.data.custom_dataset,
        "data.order_path": cfg.data.order_path,
        "data.label_mask_paths": cfg.data.label_mask_paths,
    }
    if alone := [name for name, value in values.items() if value]:
        raise ValueError(f"{path}: {alone[0]} is for `python -m olmo.train` alone; take it out")
    if dataset is None:
        return
    if cfg.data.paths or cfg.data.datasets:
        raise ValueError(
            f"{path} names its own tokens, and config/config.yaml the dataset {dataset} for "
            f"{name}: keep one. Take out data.paths and data.datasets, or the dataset"
        )
    # As the tokens' stage writes them; the sign makes no difference there.
    bits = "16" if cfg.model.vocab_size <= 2**16 else "32"
    if not cfg.data.memmap_dtype.endswith(bits):
        raise ValueError(
            f"{path}: data.memmap_dtype: expected uint{bits}, in which the tokens of {dataset} "
            f"are stored for {cfg.model.vocab_size:,} ids; found {cfg.data.memmap_dtype}"
        )
