"""The trainer: `torchrun --nproc_per_node=N -m olmo.train CONFIG [--key=value]`."""

from olmo.runtime.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(__name__, {"loop": ["train"]})
