"""The model as a plain torch module: `OLMo(ModelConfig(...))(input_ids).logits`."""

from typing import TYPE_CHECKING

from olmo.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from olmo.model.olmo import OLMo as OLMo

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "olmo": ["OLMo", "OLMoOutput"],
        "block": [
            "GELU",
            "Activation",
            "Dropout",
            "OLMoBlock",
            "OLMoBlockGroup",
            "OLMoLlamaBlock",
            "OLMoSequentialBlock",
            "ReLU",
            "SwiGLU",
        ],
        "norm": ["LayerNorm", "LayerNormBase", "RMSLayerNorm"],
        "rope": ["BufferCache", "RotaryEmbedding"],
        "generate": ["OLMoGenerateOutput"],
    },
)
