"""From a list of text files to a language-model checkpoint one can trust."""

from pathlib import Path

from olmo.runtime.lazy import lazy_exports

# OLMo's module paths for what lives elsewhere here: `olmo.torch_util` is compat/torch_util.py.
__path__.append(str(Path(__file__).with_name("compat")))

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "checkpoint.read": ["load_model"],
        "config": [
            "ActivationCheckpointingStrategy",
            "ActivationType",
            "BlockType",
            "CheckpointType",
            "CompilerConfig",
            "DDPConfig",
            "DDPGradSyncMode",
            "DataConfig",
            "DistributedStrategy",
            "EvaluatorConfig",
            "FSDPConfig",
            "FSDPPrecision",
            "FSDPWrapStrategy",
            "InitFnType",
            "InstanceFilterConfig",
            "LayerNormType",
            "ModelConfig",
            "OptimizerConfig",
            "OptimizerType",
            "PaddingDirection",
            "SchedulerConfig",
            "SchedulerType",
            "SpeedMonitorConfig",
            "TokenizerConfig",
            "TrainConfig",
            "TruncationDirection",
            "WandbConfig",
        ],
        "model": [
            "GELU",
            "Activation",
            "LayerNorm",
            "LayerNormBase",
            "OLMo",
            "OLMoBlock",
            "OLMoGenerateOutput",
            "OLMoOutput",
            "OLMoSequentialBlock",
            "RMSLayerNorm",
            "ReLU",
            "RotaryEmbedding",
            "SwiGLU",
        ],
        "tokenizer": ["Tokenizer"],
    },
)
