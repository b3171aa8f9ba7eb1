"""The config of a training run: dataclasses with OLMo's field names and defaults.

    cfg = TrainConfig.load("config/train/olmo-tiny.yaml", ["--optimizer.learning_rate=3e-4"])

Loading is strict: an unknown key is an error that names the nearest one, and a value of another
type is an error. The trainer never modifies a config; `update_with` makes a changed copy. Fields
that OLMo lacks are marked `extension()`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from olmo.config.data_config import DataConfig
from olmo.config.enums import (
    ActivationCheckpointingStrategy,
    ActivationType,
    AttentionBackend,
    BlockType,
    CrossEntropy,
    DDPGradSyncMode,
    DistributedStrategy,
    EvaluatorType,
    FP8Backend,
    FP8Recipe,
    FP8Scaling,
    FSDPPrecision,
    FSDPWrapStrategy,
    InitFnType,
    LayerNormType,
    OptimizerType,
    SchedulerType,
    SchedulerUnits,
    ShardedCheckpointerType,
    ShardingStrategy,
    TruncationDirection,
)
from olmo.config.fork_keys import FORK_KEYS, remove_fork_keys
from olmo.config.strict import BaseConfig, extension
from olmo.config.trackers import TensorboardConfig, TrackioConfig, WandbConfig


@dataclass
class ModelConfig(BaseConfig):
    """The shape of the model, and how its weights are drawn."""

    d_model: int = 768  # width of the residual stream
    n_heads: int = 12  # query heads
    n_kv_heads: int | None = None  # None: n_heads; 1: multi-query; between: grouped-query
    clip_qkv: float | None = None  # clamp q, k, v to ±this
    n_layers: int = 12  # blocks
    mlp_ratio: int = 4  # width of ff_proj over d_model; swiglu's inner width is half of it
    mlp_hidden_size: int | None = None  # width of ff_proj; overrides mlp_ratio
    activation_type: ActivationType = ActivationType.swiglu  # of the feed-forward layer
    block_type: BlockType = BlockType.sequential  # how a block is laid out
    block_group_size: int = 1  # blocks that FSDP wraps and compile treats together
    alibi: bool = False  # linear position biases, instead of rope
    alibi_bias_max: float = 8.0  # the largest slope
    rope: bool = False  # rotary position embeddings
    rope_full_precision: bool = True  # compute them in float32
    rope_theta: int = 10_000  # the base of their frequencies
    flash_attention: bool = False  # true: a flash kernel or an error; the log names the kernel
    attention_dropout: float = 0.1  # share of attention weights set to 0 in training
    multi_query_attention: bool | None = None  # older key for n_kv_heads: 1
    attention_layer_norm: bool = False  # norm on queries and keys
    residual_dropout: float = 0.1  # likewise of each block's outputs
    embedding_dropout: float = 0.1  # likewise of embeddings
    embedding_layer_norm: bool = False  # normalize embeddings
    layer_norm_type: LayerNormType = LayerNormType.default  # default has a mean, rms has none
    layer_norm_with_affine: bool = True  # norms learn a scale
    layer_norm_eps: float = 1e-05  # added to the variance
    attention_layer_norm_with_affine: bool = True  # norms of queries and keys learn a scale
    max_sequence_length: int = 1024  # tokens of an instance
    include_bias: bool = True  # linear layers learn biases
    bias_for_layer_norm: bool | None = None  # None: as include_bias
    scale_logits: bool = False  # by 1/sqrt(d_model)
    vocab_size: int = 50257  # ids that the tokenizer has
    embedding_size: int | None = 50304  # rows of wte, at least vocab_size; None: vocab_size
    weight_tying: bool = True  # the output layer is the embedding
    eos_token_id: int = 50256  # ends a document
    pad_token_id: int = 50256  # fills instances; never learned
    init_device: str | None = None  # where weights are made
    init_fn: InitFnType = InitFnType.normal  # how weights are drawn
    init_std: float = 0.02  # standard deviation of normal initialization
    init_cutoff_factor: float | None = None  # cut normal init at ± this many std
    precision: str | None = None
    scale_emb_init: bool = False  # draw embeddings with a standard deviation of sqrt(d_model)
    emb_init_std: float | None = None  # standard deviation of embeddings
    norm_after: bool = False  # norm the output of attention and MLP, not their input (OLMo 2)

    @property
    def effective_n_kv_heads(self) -> int:
        if self.multi_query_attention is None:
            return self.n_kv_heads or self.n_heads
        implied = 1 if self.multi_query_attention else self.n_heads
        if self.n_kv_heads not in (None, implied):
            raise ValueError(
                f"model.n_kv_heads={self.n_kv_heads} contradicts model.multi_query_attention="
                f"{self.multi_query_attention}, which means {implied}; set n_kv_heads alone"
            )
        return implied

    @classmethod
    def update_legacy_settings(cls, plain: dict[str, Any]) -> dict[str, Any]:
        return remove_fork_keys(plain, FORK_KEYS["model"], "model.")


@dataclass
class OptimizerConfig(BaseConfig):
    """How gradients become updates."""

    name: OptimizerType = OptimizerType.lionw  # muon is not one of OLMo's
    learning_rate: float = 1.0e-4  # the peak
    weight_decay: float = 0.01  # AdamW's, times the learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the moments
    eps: float = 1e-5  # added to the root of the second moment
    no_decay_norm_and_bias: bool | None = None  # older key: the negation of the two below
    selective_updates: bool = False  # no update of parameter and state where the gradient is 0
    decay_norm_and_bias: bool = False  # weight decay for norms and biases, too
    decay_embeddings: bool = False  # likewise for embeddings
    metrics_log_interval: int | None = None  # steps between per-parameter metrics
    record_update_metrics: bool = False  # log how much parameters move
    packed_state: bool = extension(False)  # adamw's moments in 8 and 16 bits

    @classmethod
    def update_legacy_settings(cls, plain: dict[str, Any]) -> dict[str, Any]:
        if plain.get("name") == "decoupled_lionw":
            plain = {k: v for k, v in plain.items() if k != "eps"} | {"name": "lionw"}
        return plain


@dataclass
class SchedulerConfig(BaseConfig):
    """The learning rate over the steps, as a share of its peak."""

    name: SchedulerType = SchedulerType.cosine_with_warmup  # the shape of the curve
    units: SchedulerUnits = SchedulerUnits.steps  # of t_warmup, t_max, t_decay
    t_warmup: int | float = 100  # the learning rate rises linearly until then
    t_max: int | float | None = None  # None: the end of the run
    alpha_f: float = 0.1  # final learning rate / peak learning rate
    grad_clip_warmup_steps: int | float | None = None  # until then max_grad_norm is scaled
    grad_clip_warmup_factor: float | None = None  # by this factor
    warmup_min_lr: float | None = None  # None: a tenth of the peak
    t_decay: int | float | None = extension()  # warmup_stable_decay: length of the decay


@dataclass
class EvaluatorConfig(BaseConfig):
    """An evaluation at every `eval_interval` steps."""

    label: str  # names the metrics: eval/<label>/…
    type: EvaluatorType = EvaluatorType.lm  # lm: a loss on documents; downstream: multiple choice
    data: DataConfig = field(default_factory=DataConfig)
    device_eval_batch_size: int | None = None  # instances of a forward pass on each process
    subset_num_batches: int | None = None  # evaluate on the first batches only


@dataclass
class TokenizerConfig(BaseConfig):
    """The tokenizer of the token files."""

    identifier: str = "gpt2"  # a file, or a name on the hub
    truncate_direction: TruncationDirection = TruncationDirection.right


@dataclass
class SpeedMonitorConfig(BaseConfig):
    """How speed is measured."""

    window_size: int = 100  # steps averaged
    gpu_flops_available: float | int | None = None  # per second and device, for MFU


@dataclass
class CompilerConfig(BaseConfig):
    """Arguments of torch.compile."""

    mode: str | None = None  # default, reduce-overhead, max-autotune; null: default
    fullgraph: bool = False  # an error where the graph would break
    backend: str = "inductor"  # of torch.compile
    dynamic: bool | None = None  # shapes vary; null: torch finds out
    # Tune the tiling of each kernel: minutes at the first step, for slightly faster kernels.
    coordinate_descent_tuning: bool = extension(False)


@dataclass
class DDPConfig(BaseConfig):
    """Settings of distributed_strategy: ddp."""

    # Gradients are reduced once a batch, or with each microbatch.
    grad_sync_mode: DDPGradSyncMode = DDPGradSyncMode.batch
    find_unused_params: bool = False


@dataclass
class SingleGPUConfig(BaseConfig):
    """The device of distributed_strategy: single."""

    device: str = "auto"  # cuda if available, else cpu

    def get_device(self) -> Any:
        """The torch.device. Raises ValueError for an unavailable or unsupported one."""
        import torch

        has_cuda = torch.cuda.is_available()
        if self.device.partition(":")[0] not in ("auto", "cpu", *["cuda"] * has_cuda):
            expected = (
                "auto, cpu or cuda" if has_cuda else "auto or cpu, since torch sees no CUDA device"
            )
            raise ValueError(f"single.device: expected {expected}; found {self.device!r}")
        default = "cuda" if has_cuda else "cpu"
        return torch.device(default if self.device == "auto" else self.device)


@dataclass
class FSDPConfig(BaseConfig):
    """Settings of distributed_strategy: fsdp."""

    use_orig_params: bool = True
    # What is sharded, and over which processes.
    sharding_strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD
    # Layers whose parameters are gathered together; null: each block.
    wrapping_strategy: FSDPWrapStrategy | None = None
    # In which gradients are reduced: pure: the low one; mixed: float32.
    precision: FSDPPrecision | None = FSDPPrecision.pure
    hybrid_sharding_num_model_replicas: int | None = None  # null: one for each node


@dataclass
class FP8Config(BaseConfig):
    """Which matrix products run in 8-bit floating point, and how (an extension)."""

    backend: FP8Backend = FP8Backend.native  # native: torch's; emulate: slow, for tests
    # Scales: one a tensor is fastest, one a row most exact.
    recipe: FP8Recipe = FP8Recipe.tensorwise
    # Scales of the tensor itself, or delayed: of earlier steps.
    scaling: FP8Scaling = FP8Scaling.dynamic
    history: int = 16  # steps whose maxima delayed scaling uses
    # Last parts of layer names. Without the head, whose precision affects the loss directly.
    modules: list[str] = field(default_factory=lambda: ["ff_proj", "ff_out"])


@dataclass
class TrainConfig(BaseConfig):
    # The run, its model and its data.

    run_name: str | None = None  # names the run in trackers and records
    seed: int = 6198  # of the weights, the order and dropout
    epoch: int | None = None  # the number of the first epoch
    dry_run: bool = False  # set everything up, train nothing
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    # Continue at load_path's step and position in the data; False: at step 0 and the data's start.
    restore_dataloader: bool = True
    fast_forward_batches: int | None = None  # on resume, skip this many further batches
    evaluators: list[EvaluatorConfig] = field(default_factory=list)
    eval_interval: int = 1000  # steps
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    # Checkpoints.

    save_folder: str = "./"  # where the run is written; the pipeline sets it
    remote_save_folder: str | None = None  # a bucket or folder to which checkpoints are copied
    canceled_check_interval: int = 50
    save_interval: int | None = 1000  # steps between sharded checkpoints
    save_interval_unsharded: int | None = None  # steps between whole checkpoints
    # Steps between sharded checkpoints of which only the newest is kept.
    save_interval_ephemeral: int | None = None
    save_num_checkpoints_to_keep: int = -1  # -1: all
    save_num_unsharded_checkpoints_to_keep: int = -1  # -1: all
    save_overwrite: bool = False  # a folder that has a run already
    force_save_unsharded: bool = False  # also save before training, and in a dry run
    no_pre_train_checkpoint: bool = False  # do not save step 0
    load_path: str | None = None  # folder or URL of a checkpoint to start from
    load_path_sharded_checkpointer: ShardedCheckpointerType | None = None
    try_load_latest_save: bool = False  # resume from save_folder's newest checkpoint, if any
    reset_optimizer_state: bool = False  # begin with empty moments
    reset_trainer_state: bool = False  # begin at step 0, with the weights of load_path
    sharded_checkpointer: ShardedCheckpointerType = ShardedCheckpointerType.torch_legacy
    new_style_checkpoints: bool | None = None

    # Duration and batches.

    max_duration: int | str = 10000  # steps, or "2e12T" tokens, or "1ep" epochs
    global_train_batch_size: int = 512  # instances per step over all processes
    device_train_batch_size: int | None = None
    device_train_microbatch_size: int = 16  # instances of a forward pass; less needs less memory
    device_eval_batch_size: int = 16  # instances of a forward pass on each process
    eval_subset_num_batches: int = -1  # -1: all
    eval_on_load: bool = False  # evaluate before the first step
    device_train_grad_accum: int | None = None
    max_grad_norm: float | None = None  # gradients with a larger norm are scaled down to it
    max_grad_norm_ratio: float | None = None  # of the running mean; overrides max_grad_norm
    precision: str | None = None  # amp_bf16, amp_fp16, fp32; None: fp32

    # Logging.

    wandb: WandbConfig | None = None
    trackio: TrackioConfig | None = extension()  # noqa: RUF009
    tensorboard: TensorboardConfig | None = extension()  # noqa: RUF009
    speed_monitor: SpeedMonitorConfig = field(default_factory=SpeedMonitorConfig)
    console_log_interval: int = 1  # steps
    gen1_gc_interval: int | None = 1  # steps between collections of Python's young garbage

    # How steps are computed.

    compile: CompilerConfig | None = None
    # How the model is spread over processes.
    distributed_strategy: DistributedStrategy | None = DistributedStrategy.fsdp
    fsdp: FSDPConfig | None = field(default_factory=FSDPConfig)
    ddp: DDPConfig | None = None
    single: SingleGPUConfig = field(  # newer than OLMo's release
        default_factory=SingleGPUConfig, metadata={"extension": True}
    )
    softmax_auxiliary_loss: bool = False  # z-loss
    auxiliary_loss_multiplier: float | None = 1e-4  # of the z-loss
    time_limit: float | None = None  # seconds; then save and exit
    extra_steps_after_cancel: int = 10
    early_stopping_factor: float | None = None  # end if the loss exceeds its lowest this many times
    save_data_indices: bool = True  # data-indices/rank{r}.tsv.gz
    python_profiling: bool = False  # profile the first steps by cProfile
    torch_profiling: bool = False  # profile some steps by torch
    stop_at: int | None = None  # the step after which it pauses
    stop_after: int | None = None  # pause after this many steps from a start or resume
    # Blocks whose activations are computed again in the backward pass, to save memory.
    activation_checkpointing: ActivationCheckpointingStrategy | None = None
    fused_loss: bool | None = None  # flash-attn's cross-entropy
    hf_datasets_cache_dir: str | None = None  # documents of evaluation tasks
    module_outputs_save_steps: list[int] | None = None  # steps whose modules' outputs are saved
    use_msamp: bool = extension(False)  # MS-AMP's 8-bit optimizer
    fp8: FP8Config | None = extension()  # noqa: RUF009
    # The attention kernel; an error if it does not work here. None: the fastest one that works, or
    # with model.flash_attention the fastest flash kernel that works.
    attention: AttentionBackend | None = extension()  # noqa: RUF009
    master_weights: bool = extension(False)  # matrices in bfloat16, with float32 master weights
    cross_entropy: CrossEntropy | None = extension()  # noqa: RUF009 (None: chunked)
    # CPU threads of one process. They determine the order of sums, and so the bits of the result:
    # a setting of the run, not of the machine. None: 1 under `olmo train`, as under torchrun with
    # several processes; else OMP_NUM_THREADS, or torch's choice.
    intra_op_threads: int | None = extension()
    # Seconds without a step, or a batch of an evaluation, after which the watchdog ends the run and
    # prints all stacks. Must exceed the time of the first step, which may compile.
    hang_timeout: float | None = extension(1200.0)  # None: never

    @property
    def data_seed(self) -> int:
        """The seed of the data order."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def duration(self) -> tuple[int, str]:
        """max_duration as a number and its unit: "steps", "tokens" or "epochs"."""
        text = str(self.max_duration).strip()
        try:
            if text.endswith("ep"):
                return int(text[:-2]), "epochs"
            if text.endswith("T"):
                return int(float(text[:-1])), "tokens"
            return int(float(text)), "steps"
        except (ValueError, OverflowError):
            raise ValueError(
                f'max_duration: expected steps (1000), tokens ("2e9T") or epochs ("1ep"), '
                f"found {text!r}"
            ) from None

    @property
    def autocast_precision(self) -> Any:
        """The torch dtype that matrix products run in."""
        import torch

        types = {
            "amp_bf16": torch.bfloat16,
            "amp_fp16": torch.float16,
            "fp32": torch.float32,
            None: torch.float32,
        }
        if self.precision not in types:
            known = ", ".join(str(t) for t in types if t)
            raise ValueError(f"precision: expected one of {known}, found {self.precision!r}")
        return types[self.precision]

    @classmethod
    def update_legacy_settings(cls, plain: dict[str, Any]) -> dict[str, Any]:
        plain = dict(plain)
        legacy = {True: "whole_layer", False: None}
        if isinstance(plain.get("activation_checkpointing"), bool):
            plain["activation_checkpointing"] = legacy[plain["activation_checkpointing"]]
        if isinstance(plain.get("optimizer"), dict):
            plain["optimizer"] = OptimizerConfig.update_legacy_settings(plain["optimizer"])
        if isinstance(plain.get("model"), dict):
            plain["model"] = ModelConfig.update_legacy_settings(plain["model"])
        return remove_fork_keys(plain, FORK_KEYS[""])
