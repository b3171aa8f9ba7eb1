"""Checkpoints: OLMo's folder layout, saved atomically, and the pipeline's final folder."""

from pathlib import Path

from olmo.runtime.lazy import lazy_exports

# OLMo's names that our trainer does not use: FullCheckpointer is in compat/checkpoint/full.py.
__path__.append(str(Path(__file__).parents[1] / "compat/checkpoint"))

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "save": ["save_unsharded"],
        "full": ["FullCheckpointer"],
        "read": ["Checkpoint", "load_checkpoint", "load_model"],
        "final": ["export_final"],
        "layout": ["list_checkpoints", "verify_checkpoint"],
    },
)
