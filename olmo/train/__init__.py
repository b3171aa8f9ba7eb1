"""The trainer: `torchrun --nproc_per_node=N -m olmo.train CONFIG [--key=value]`."""

from olmo.runtime.lazy import lazy

__getattr__, __all__ = lazy(__name__, {"loop": ["train"]})
