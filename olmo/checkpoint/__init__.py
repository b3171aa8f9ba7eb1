"""Checkpoints: OLMo's folder layout, written whole or not at all, and the pipeline's final one."""

from olmo.runtime.lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "save": ["save_unsharded"],
        "full": ["FullCheckpointer"],
        "read": ["Checkpoint", "load", "load_model"],
        "final": ["export"],
        "layout": ["checkpoints", "verify"],
    },
)
