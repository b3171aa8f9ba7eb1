"""Enums of config values: types of blocks, norms, schedules, strategies and so on."""

from __future__ import annotations

from enum import StrEnum


class LayerNormType(StrEnum):
    default = "default"
    low_precision = "low_precision"
    rms = "rms"


class ActivationType(StrEnum):
    gelu = "gelu"
    relu = "relu"
    swiglu = "swiglu"


class BlockType(StrEnum):
    sequential = "sequential"
    llama = "llama"


class InitFnType(StrEnum):
    mitchell = "mitchell"
    normal = "normal"
    kaiming_normal = "kaiming_normal"
    fan_in = "fan_in"
    full_megatron = "full_megatron"


class OptimizerType(StrEnum):
    lionw = "lionw"
    adamw = "adamw"
    muon = "muon"  # ours: Muon on the blocks' matrices, AdamW on everything else


class SchedulerType(StrEnum):
    cosine_with_warmup = "cosine_with_warmup"
    linear_with_warmup = "linear_with_warmup"
    inverse_sqrt_with_warmup = "inverse_sqrt_with_warmup"
    max_scheduler = "max_scheduler"
    constant = "constant"
    cosine_linear_envelope = "cosine_linear_envelope"
    constant_with_warmup = "constant_with_warmup"
    warmup_stable_decay = "warmup_stable_decay"  # ours


class SchedulerUnits(StrEnum):
    steps = "steps"
    tokens = "tokens"


class PaddingDirection(StrEnum):
    right = "right"
    left = "left"


class TruncationDirection(StrEnum):
    right = "right"
    left = "left"


class EvaluatorType(StrEnum):
    downstream = "downstream"
    lm = "lm"


class DistributedStrategy(StrEnum):
    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"


class DDPGradSyncMode(StrEnum):
    batch = "batch"
    micro_batch = "micro_batch"


class FSDPWrapStrategy(StrEnum):
    by_block = "by_block"
    by_block_and_size = "by_block_and_size"
    by_block_group = "by_block_group"
    by_block_group_and_size = "by_block_group_and_size"
    size_based = "size_based"
    one_in_two = "one_in_two"
    one_in_three = "one_in_three"
    one_in_four = "one_in_four"
    one_in_five = "one_in_five"


class FSDPPrecision(StrEnum):
    pure = "pure"
    mixed = "mixed"


class ShardingStrategy(StrEnum):
    """torch.distributed.fsdp's names, without importing torch."""

    FULL_SHARD = "FULL_SHARD"
    SHARD_GRAD_OP = "SHARD_GRAD_OP"
    NO_SHARD = "NO_SHARD"
    HYBRID_SHARD = "HYBRID_SHARD"
    _HYBRID_SHARD_ZERO2 = "_HYBRID_SHARD_ZERO2"


class CheckpointType(StrEnum):
    sharded = "sharded"
    unsharded = "unsharded"
    sharded_ephemeral = "sharded_ephemeral"


class ShardedCheckpointerType(StrEnum):
    torch_new = "torch_new"
    torch_legacy = "torch_legacy"
    local = "local"
    olmo_core = "olmo_core"


class ActivationCheckpointingStrategy(StrEnum):
    whole_layer = "whole_layer"
    one_in_two = "one_in_two"
    one_in_three = "one_in_three"
    one_in_four = "one_in_four"
    one_in_eight = "one_in_eight"
    two_in_three = "two_in_three"
    three_in_four = "three_in_four"
    fine_grained = "fine_grained"


class FP8Backend(StrEnum):
    native = "native"  # torch's scaled product
    torchao = "torchao"
    emulate = "emulate"  # float32 products of the dequantized values: slow, for tests


class FP8Recipe(StrEnum):
    tensorwise = "tensorwise"  # one scale per tensor: the fastest
    rowwise = "rowwise"  # one scale per row: the most exact
    rowwise_with_gw_hp = "rowwise_with_gw_hp"  # rowwise, with weight gradients in high precision


class FP8Scaling(StrEnum):
    dynamic = "dynamic"  # scales from the tensor itself
    delayed = "delayed"  # scales from the maxima of earlier steps


class AttentionBackend(StrEnum):
    """Kernels that compute attention."""

    # Kernels of F.scaled_dot_product_attention.
    sdpa = "sdpa"  # PyTorch's choice; on the CPU a tiled kernel that supports masks
    math = "math"  # plain matrix products; all scores in memory
    flash = "flash"  # FlashAttention 2, CUDA
    efficient = "efficient"  # xFormers' memory-efficient kernel, CUDA; supports float32 and masks
    cudnn = "cudnn"  # cuDNN's fused kernel, FlashAttention 3's speed on Hopper
    # Kernels of packages.
    fa2 = "fa2"  # flash-attn 2
    fa3 = "fa3"  # FlashAttention 3, Hopper
    fa4 = "fa4"  # flash-attn-4, Hopper and Blackwell
    # torch.nn.attention.flex_attention: skips blocks that a document mask excludes.
    flex = "flex"


class CrossEntropy(StrEnum):
    """Implementations of the head and the loss."""

    chunked = "chunked"  # ours: one chunk of rows at a time
    torch = "torch"  # F.linear_cross_entropy (torch ≥ 2.13), also chunked
    plain = "plain"  # all logits in memory


class TokenType(StrEnum):
    """numpy's integer types of raw token files."""

    uint16 = "uint16"  # vocabularies up to 65,536
    uint32 = "uint32"  # OLMo 2's
    uint8 = "uint8"
    uint64 = "uint64"
    int8 = "int8"
    int16 = "int16"
    int32 = "int32"
    int64 = "int64"
