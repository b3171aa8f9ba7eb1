"""The model as a plain torch module: `OLMo(ModelConfig(...))(input_ids).logits`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Dropout

    from olmo.model.block import (
        GELU,
        Activation,
        OLMoBlock,
        OLMoBlockGroup,
        OLMoLlamaBlock,
        OLMoSequentialBlock,
        ReLU,
        SwiGLU,
    )
    from olmo.model.generate import OLMoGenerateOutput
    from olmo.model.norm import LayerNorm, LayerNormBase, RMSLayerNorm
    from olmo.model.olmo import OLMo, OLMoOutput
    from olmo.model.rope import BufferCache, RotaryEmbedding

__all__ = [
    "GELU",
    "Activation",
    "BufferCache",
    "Dropout",
    "LayerNorm",
    "LayerNormBase",
    "OLMo",
    "OLMoBlock",
    "OLMoBlockGroup",
    "OLMoGenerateOutput",
    "OLMoLlamaBlock",
    "OLMoOutput",
    "OLMoSequentialBlock",
    "RMSLayerNorm",
    "ReLU",
    "RotaryEmbedding",
    "SwiGLU",
]
_MODULES = ("olmo", "block", "norm", "rope", "generate")


def __getattr__(name: str) -> Any:
    # torch is imported when the first name is asked for.
    if name in __all__:
        for module in _MODULES:
            found = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
