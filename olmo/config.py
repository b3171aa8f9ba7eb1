"""What a run is, in dataclasses with OLMo's field names and defaults.

    cfg = TrainConfig.load("config/train/olmo-tiny.yaml", ["--optimizer.learning_rate=3e-4"])

Loading is strict: a key that no dataclass has is an error that names the nearest one, and so is a
value of another type. A config object belongs to its owner, who may change it; nothing in this
package does. Fields that OLMo does not have are marked "ours".
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from glob import glob
from pathlib import Path
from typing import Any, Self, Union

import yaml

# --- the kinds -----------------------------------------------------------------------------------


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


# --- loading -------------------------------------------------------------------------------------


class BaseConfig:
    """Typed construction (`ModelConfig(block_type="llama")`), strict loading, saving."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            setattr(self, name, _typed(getattr(self, name), hint, name))

    @classmethod
    def new(cls, **values: Any) -> Self:
        """The config with `values` in place of the defaults; nested ones may be dictionaries."""
        return _typed(values, cls, "")

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Iterable[str] | None = None,
        key: str | None = None,
        validate_paths: bool = True,
    ) -> Self:
        """Read a YAML file, with `--a.b=value` or `a.b=value` overrides; a bare flag means true.

        `key` picks one section of the file (`ModelConfig.load(path, key="model")`).
        `validate_paths=False` lets ${path.glob:…} and ${path.choose:…} find nothing.

        Raises ValueError for what cannot be read, unknown keys and values of the wrong type,
        FileNotFoundError for a missing file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no config file at {path}")
        try:
            with open(path, encoding="utf-8") as stream:
                raw = yaml.load(stream, _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not readable as YAML: {error}") from error
        raw = {} if raw is None else raw
        if key is not None and isinstance(raw, dict):
            if key not in raw:
                raise ValueError(
                    f"{path} has no section '{key}'; it has {', '.join(map(str, raw))}"
                )
            raw = raw[key]
        if not isinstance(raw, dict):
            raise ValueError(f"{path} must hold a mapping of keys, found {type(raw).__name__}")
        plain = _resolve(cls, raw, overrides or (), validate_paths)
        return _typed(cls.update_legacy_settings(plain), cls, "")

    @classmethod
    def update_legacy_settings(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """Values that older OLMo configs spell differently."""
        return plain

    def save(self, path: str | Path) -> None:
        """Write YAML that `load` reads back to an equal object."""
        Path(path).write_text(to_yaml(self.asdict()), encoding="utf-8")

    def asdict(self, exclude: Iterable[str] | None = None) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers. What is ours is there only if used."""
        left_out = set(exclude or ())
        return {k: v for k, v in _plain(self).items() if k not in left_out}

    def update_with(self, **values: Any) -> Self:
        """A copy with some fields changed."""
        changed = copy.deepcopy(self)
        for name, value in values.items():
            setattr(changed, name, value)
        return changed


def _ours(default: Any = None) -> Any:
    """A field OLMo does not have: absent from saved configs until used, so that OLMo reads them."""
    return field(default=default, metadata={"ours": True})


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML with 1e-4 read as a number, dates left as text, and a repeated key refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key '{key_node.value}' is there twice",
                    key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":timestamp", ":float"))]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}
_FLOAT = r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?"
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(rf"^({_FLOAT}|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def _resolve(
    cls: type, raw: dict[str, Any], overrides: Iterable[str], validate_paths: bool
) -> dict[str, Any]:
    """Overrides and ${interpolations}, by OmegaConf.

    OmegaConf makes a node of every value, which takes minutes for thousands of data paths. Long
    lists without interpolations therefore wait outside, behind one placeholder each.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _register_resolvers(validate_paths)
    waiting: dict[str, list[Any]] = {}

    def lift(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: lift(v) for k, v in value.items()}
        if isinstance(value, list):
            if len(value) > 32 and all(isinstance(v, str) and "${" not in v for v in value):
                placeholder = f"<list {len(waiting)} set aside while resolving>"
                waiting[placeholder] = value
                return placeholder
            return [lift(v) for v in value]
        return value

    def put_back(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: put_back(v) for k, v in value.items()}
        if isinstance(value, list):
            return [put_back(v) for v in value]
        return waiting.get(value, value) if isinstance(value, str) else value

    try:
        # The defaults take part, since ${save_interval} may mean one that the file does not set.
        tree = OmegaConf.merge(OmegaConf.create(_defaults(cls)), OmegaConf.create(lift(raw)))
        for override in overrides:
            name, given, value = override.lstrip("-").partition("=")
            try:
                parsed = yaml.load(value, _Loader) if given else True
            except yaml.YAMLError as error:
                raise ValueError(f"cannot read the value of --{name}={value}: {error}") from error
            name = name.replace("-", "_")
            # Values such as ${a.b} stay text here and are resolved with the rest.
            OmegaConf.update(tree, name, parsed, merge=False, force_add=True)
        return put_back(OmegaConf.to_container(tree, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error}".strip()) from error


def _register_resolvers(validate_paths: bool) -> None:
    from omegaconf import OmegaConf

    def missing(what: str, empty: Any) -> Any:
        if validate_paths:
            raise FileNotFoundError(what)
        return empty

    def path_glob(*patterns: str) -> list[str]:
        found: list[str] = []
        for pattern in patterns:
            matches = sorted(glob(pattern))
            found += matches or missing(f"no file matches {pattern}", [])
        return found

    def path_choose(*paths: str) -> str:
        for path in paths:
            if "://" in path or Path(path).exists():
                return path
        return missing(f"none of these exist: {', '.join(paths)}", "")

    def path_last_checkpoint(folder: str) -> str:
        steps = [
            p for p in Path(folder).glob("step*") if re.fullmatch(r"step\d+(-unsharded)?", p.name)
        ]
        if not steps:
            return missing(f"no checkpoint (step{{N}} or step{{N}}-unsharded) in {folder}", "")
        # Of two at one step the sharded one comes first, as it is the cheaper to load.
        return str(
            max(
                steps,
                key=lambda p: (int(re.findall(r"\d+", p.name)[0]), "-" not in p.name),
            )
        )

    # OmegaConf 2.4 renamed the call and warns of the old name, the only one that 2.3 has.
    modern = "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    register = OmegaConf.register_resolver if modern else OmegaConf.register_new_resolver
    resolvers: dict[str, Any] = {
        "path.glob": path_glob,
        "path.choose": path_choose,
        "path.last_checkpoint": path_last_checkpoint,
    }
    for name, resolver in resolvers.items():
        register(name, resolver, replace=True)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return {name: h for name, h in typing.get_type_hints(cls).items() if not name.startswith("_")}


def _defaults(cls: type) -> dict[str, Any]:
    if any(_is_required(f) for f in dataclasses.fields(cls)):
        return {}
    return _plain(cls(), everything=True)


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _plain(value: Any, everything: bool = False) -> Any:
    """Dataclasses, enumerations and tuples as what JSON and YAML know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name), everything)
            for f in dataclasses.fields(value)
            if everything or not (f.metadata.get("ours") and getattr(value, f.name) == _default(f))
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {k: _plain(v, everything) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, everything) for v in value]
    return value


def to_yaml(plain: dict[str, Any]) -> str:
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10_000)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or a ValueError naming `where`, what was expected and found."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)

    def refuse(expected: str) -> ValueError:
        return ValueError(f"{where}: expected {expected}, found {value!r}")

    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options:
            if isinstance(option, type) and type(value) is option:
                return value
        if len(options) == 1:
            return _typed(value, options[0], where)
        for option in options:
            try:
                return _typed(value, option, where)
            except ValueError:
                continue
        raise refuse(" or ".join(getattr(o, "__name__", str(o)) for o in options))
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise refuse("a list")
        return [_typed(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(args):
            raise refuse(f"{len(args)} values")
        return tuple(
            _typed(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise refuse("a mapping")
        return {str(k): _typed(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return _typed_dataclass(value, hint, where)
    if issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            raise refuse(f"one of {', '.join(hint)}") from None
    if hint is bool:
        if isinstance(value, str) and value.lower() in (
            "true",
            "yes",
            "on",
            "false",
            "no",
            "off",
        ):
            return value.lower() in ("true", "yes", "on")
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise refuse({int: "a whole number", float: "a number", str: "text"}[hint])
    try:
        if hint is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return hint(value)
    except (ValueError, OverflowError):
        raise refuse("a whole number" if hint is int else "a number") from None


def _typed_dataclass(value: Any, cls: Any, where: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected the keys of a {cls.__name__}, found {value!r}")
    hints, values = _hints(cls), {}
    for key, part in value.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            raise ValueError(f"{place}: no such key in {cls.__name__}; the nearest is '{near[0]}'")
        values[key] = _typed(part, hints[key], place)
    for f in dataclasses.fields(cls):
        if _is_required(f) and f.name not in values:
            raise ValueError(f"{where}: the key '{f.name}' is missing")
    return cls(**values)


# --- the fields ----------------------------------------------------------------------------------


@dataclass
class ModelConfig(BaseConfig):
    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: int | None = None  # None: n_heads; 1: multi-query; between: grouped-query
    clip_qkv: float | None = None  # clamp q, k, v to ±this
    n_layers: int = 12
    mlp_ratio: int = 4  # width of ff_proj over d_model; swiglu's inner width is half of it
    mlp_hidden_size: int | None = None  # width of ff_proj, over mlp_ratio
    activation_type: ActivationType = ActivationType.swiglu
    block_type: BlockType = BlockType.sequential
    block_group_size: int = 1
    alibi: bool = False
    alibi_bias_max: float = 8.0
    rope: bool = False
    rope_full_precision: bool = True
    rope_theta: int = 10_000
    flash_attention: bool = False  # a wish; which attention runs, and why, is printed at the start
    attention_dropout: float = 0.1
    multi_query_attention: bool | None = None  # older spelling of n_kv_heads: 1
    attention_layer_norm: bool = False  # norm on queries and keys
    residual_dropout: float = 0.1
    embedding_dropout: float = 0.1
    embedding_layer_norm: bool = False
    layer_norm_type: LayerNormType = LayerNormType.default
    layer_norm_with_affine: bool = True
    layer_norm_eps: float = 1e-05
    attention_layer_norm_with_affine: bool = True
    max_sequence_length: int = 1024
    include_bias: bool = True
    bias_for_layer_norm: bool | None = None  # None: as include_bias
    scale_logits: bool = False  # by 1/sqrt(d_model)
    vocab_size: int = 50257
    embedding_size: int | None = 50304  # rows of wte, at least vocab_size; None: vocab_size
    weight_tying: bool = True
    eos_token_id: int = 50256
    pad_token_id: int = 50256
    init_device: str | None = None
    init_fn: InitFnType = InitFnType.normal
    init_std: float = 0.02
    init_cutoff_factor: float | None = None  # cut normal init at ± this many std
    precision: str | None = None  # set TrainConfig.precision instead
    scale_emb_init: bool = False
    emb_init_std: float | None = None
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


@dataclass
class OptimizerConfig(BaseConfig):
    name: OptimizerType = OptimizerType.lionw
    learning_rate: float = 1.0e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    no_decay_norm_and_bias: bool | None = None  # older spelling of the two below, negated
    selective_updates: bool = False  # leave parameter and state alone where the gradient is 0
    decay_norm_and_bias: bool = False
    decay_embeddings: bool = False
    metrics_log_interval: int | None = None  # steps between per-parameter metrics
    record_update_metrics: bool = False

    @classmethod
    def update_legacy_settings(cls, plain: dict[str, Any]) -> dict[str, Any]:
        if plain.get("name") == "decoupled_lionw":
            plain = {k: v for k, v in plain.items() if k != "eps"} | {"name": "lionw"}
        return plain


@dataclass
class SchedulerConfig(BaseConfig):
    name: SchedulerType = SchedulerType.cosine_with_warmup
    units: SchedulerUnits = SchedulerUnits.steps  # of the t_… below
    t_warmup: int | float = 100
    t_max: int | float | None = None  # None: the end of the run
    alpha_f: float = 0.1  # final learning rate over the peak
    grad_clip_warmup_steps: int | float | None = None
    grad_clip_warmup_factor: float | None = None
    warmup_min_lr: float | None = None  # None: a tenth of the peak
    t_decay: int | float | None = _ours()  # warmup_stable_decay: length of the decay


@dataclass
class InstanceFilterConfig(BaseConfig):
    """Instances left out of the loss: an n-gram of a period in this range repeats too often."""

    repetition_max_period: int = 13
    repetition_min_period: int = 1
    repetition_max_count: int = 32


@dataclass
class CustomDatasetCollatorConfig(BaseConfig):
    """Which field of a custom dataset's items is what."""

    input_id_field: str = "input_ids"
    attention_mask_field: str | None = None
    attention_bias_field: str | None = None
    label_mask_field: str | None = None
    index_field: str | None = None
    instance_mask_field: str | None = None
    doc_lens_field: str | None = None
    metadata_field: str | None = None


@dataclass
class CustomDatasetConfig(BaseConfig):
    name: str  # class or function, in `module` or dotted
    module: str | None = None
    args: dict[str, Any] | None = None
    collate_fn: str | None = None
    token_field: str | None = None
    collate_config: CustomDatasetCollatorConfig | None = field(
        default_factory=CustomDatasetCollatorConfig
    )


@dataclass
class DataConfig(BaseConfig):
    paths: list[str] | None = None  # raw token files, in this order
    memmap_dtype: str = "uint16"
    datasets: dict[str, list[str]] | None = None  # label → paths, instead of `paths`
    label_mask_paths: list[str] | None = None  # raw bool files, one per token file
    pad_direction: PaddingDirection = PaddingDirection.right
    generate_attention_mask: bool = False
    generate_doc_lengths: bool = False  # mask attention between documents
    num_workers: int = 0
    drop_last: bool = False
    pin_memory: bool = False
    prefetch_factor: int | None = None
    persistent_workers: bool = False
    timeout: int = 0
    seed: int | None = None  # of the data order; None: the run's seed
    instance_filter: InstanceFilterConfig | None = None
    custom_dataset: CustomDatasetConfig | None = None
    # The order made beforehand: raw little-endian uint32, one number per instance, no padding.
    order_path: str | None = _ours()

    @property
    def effective_memmap_dtype(self) -> Any:
        """The numpy type of the token files."""
        import numpy as np

        dtype = getattr(np, self.memmap_dtype, None)
        if not (isinstance(dtype, type) and issubclass(dtype, np.generic)):
            raise TypeError(f"data.memmap_dtype: {self.memmap_dtype!r} is not a valid numpy type")
        return dtype


@dataclass
class EvaluatorConfig(BaseConfig):
    label: str
    type: EvaluatorType = EvaluatorType.lm
    data: DataConfig = field(default_factory=DataConfig)
    device_eval_batch_size: int | None = None
    subset_num_batches: int | None = None


@dataclass
class TokenizerConfig(BaseConfig):
    identifier: str = "gpt2"
    truncate_direction: TruncationDirection = TruncationDirection.right


@dataclass
class WandbConfig(BaseConfig):
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] | None = None
    log_artifacts: bool = False
    rank_zero_only: bool = True
    log_interval: int = 1


@dataclass
class SpeedMonitorConfig(BaseConfig):
    window_size: int = 100  # steps averaged
    gpu_flops_available: float | int | None = None  # per second and device, for MFU


@dataclass
class CompilerConfig(BaseConfig):
    """Arguments of torch.compile."""

    mode: str | None = None
    fullgraph: bool = False
    backend: str = "inductor"
    dynamic: bool | None = None


@dataclass
class DDPConfig(BaseConfig):
    grad_sync_mode: DDPGradSyncMode = DDPGradSyncMode.batch
    find_unused_params: bool = False


@dataclass
class FSDPConfig(BaseConfig):
    use_orig_params: bool = True
    sharding_strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD
    wrapping_strategy: FSDPWrapStrategy | None = None
    precision: FSDPPrecision | None = FSDPPrecision.pure
    hybrid_sharding_num_model_replicas: int | None = None


@dataclass
class TrainConfig(BaseConfig):
    # What is trained.
    run_name: str | None = None
    seed: int = 6198
    epoch: int | None = None
    dry_run: bool = False  # set everything up, train nothing
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    restore_dataloader: bool = True  # on resume go on in the data; False: from its start
    fast_forward_batches: int | None = None  # on resume skip this many batches more
    evaluators: list[EvaluatorConfig] = field(default_factory=list)
    eval_interval: int = 1000  # steps
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    # Checkpoints.
    save_folder: str = "./"
    remote_save_folder: str | None = None
    canceled_check_interval: int = 50
    save_interval: int | None = 1000  # steps between sharded checkpoints
    save_interval_unsharded: int | None = None
    save_interval_ephemeral: int | None = None  # sharded, only the newest is kept
    save_num_checkpoints_to_keep: int = -1  # -1: all
    save_num_unsharded_checkpoints_to_keep: int = -1
    save_overwrite: bool = False
    force_save_unsharded: bool = False  # also save before training, and in a dry run
    no_pre_train_checkpoint: bool = False  # do not save step 0
    load_path: str | None = None  # folder or URL of a checkpoint to start from
    load_path_sharded_checkpointer: ShardedCheckpointerType | None = None
    try_load_latest_save: bool = False  # go on from save_folder's newest checkpoint, if it has one
    reset_optimizer_state: bool = False
    reset_trainer_state: bool = False
    sharded_checkpointer: ShardedCheckpointerType = ShardedCheckpointerType.torch_legacy
    new_style_checkpoints: bool | None = None

    # Duration and batches.
    max_duration: int | str = 10000  # steps, or "2e12T" tokens, or "1ep" epochs
    global_train_batch_size: int = 512  # instances per step over all processes
    device_train_batch_size: int | None = None  # derived; given, it must agree
    device_train_microbatch_size: int = 16
    device_eval_batch_size: int = 16
    eval_subset_num_batches: int = -1  # -1: all
    eval_on_load: bool = False
    device_train_grad_accum: int | None = None  # derived; given, it must agree
    max_grad_norm: float | None = None
    max_grad_norm_ratio: float | None = None  # of the running mean; over max_grad_norm
    precision: str | None = None  # amp_bf16, amp_fp16, fp32; None: fp32

    # What is told.
    wandb: WandbConfig | None = None
    speed_monitor: SpeedMonitorConfig = field(default_factory=SpeedMonitorConfig)
    console_log_interval: int = 1
    gen1_gc_interval: int | None = 1

    # How it is computed.
    compile: CompilerConfig | None = None
    distributed_strategy: DistributedStrategy | None = DistributedStrategy.fsdp
    fsdp: FSDPConfig | None = field(default_factory=FSDPConfig)
    ddp: DDPConfig | None = None
    softmax_auxiliary_loss: bool = False  # z-loss
    auxiliary_loss_multiplier: float | None = 1e-4
    time_limit: float | None = None  # seconds, then save and leave
    extra_steps_after_cancel: int = 10
    early_stopping_factor: float | None = None
    save_data_indices: bool = True  # data-indices/rank{r}.tsv.gz
    python_profiling: bool = False
    torch_profiling: bool = False
    stop_at: int | None = None  # step
    stop_after: int | None = None  # steps of this start
    activation_checkpointing: ActivationCheckpointingStrategy | None = None
    fused_loss: bool | None = None
    hf_datasets_cache_dir: str | None = None
    module_outputs_save_steps: list[int] | None = None
    use_msamp: bool = _ours(False)  # the seed's
    # CPU threads of one process. The order of sums, and so the bits, depend on it, which is why
    # it belongs to the run and not to the machine. None: torch's choice.
    intra_op_threads: int | None = _ours()

    @property
    def autocast_precision(self) -> Any:
        """The torch type that matrix products run in."""
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
        return plain


# --- identity ------------------------------------------------------------------------------------

# Fields that do not decide the bytes of what is trained: where things lie, what is told, when it
# is saved, what is measured on the way, and how fast data is fetched. All others do.
FREE = frozenset(
    {
        "run_name",
        "dry_run",
        "wandb",
        "speed_monitor",
        "console_log_interval",
        "gen1_gc_interval",
        "save_data_indices",
        "save_folder",
        "remote_save_folder",
        "save_interval",
        "save_interval_unsharded",
        "save_interval_ephemeral",
        "save_num_checkpoints_to_keep",
        "save_num_unsharded_checkpoints_to_keep",
        "save_overwrite",
        "force_save_unsharded",
        "no_pre_train_checkpoint",
        "try_load_latest_save",
        "sharded_checkpointer",
        "load_path_sharded_checkpointer",
        "new_style_checkpoints",
        "canceled_check_interval",
        "time_limit",
        "extra_steps_after_cancel",
        "python_profiling",
        "torch_profiling",
        "module_outputs_save_steps",
        "evaluators",
        "eval_interval",
        "eval_subset_num_batches",
        "eval_on_load",
        "device_eval_batch_size",
        "hf_datasets_cache_dir",
        "fused_loss",
        "device_train_batch_size",
        "device_train_grad_accum",
        "tokenizer",
        "model.init_device",
        "model.precision",
        "optimizer.metrics_log_interval",
        "optimizer.record_update_metrics",
        "data.paths",
        "data.datasets",
        "data.label_mask_paths",
        "data.order_path",
        "data.num_workers",
        "data.pin_memory",
        "data.prefetch_factor",
        "data.persistent_workers",
        "data.timeout",
    }
)


def identity(cfg: TrainConfig) -> dict[str, Any]:
    """The fields that decide the bytes of the result and differ from their default.

    Plain values, ready for JSON. A field added later has its default in older runs and so does
    not change their identity. The data is not here: its files' digests are its identity, and the
    tokens' digests already depend on the tokenizer.
    """

    def differing(config: Any, default: Any, where: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for f in dataclasses.fields(config):
            value, standard = getattr(config, f.name), getattr(default, f.name)
            place = where + f.name
            if place in FREE or value == standard:
                continue
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                inner = differing(value, standard or type(value)(), place + ".")
                if inner or standard is None:
                    out[f.name] = inner
            else:
                out[f.name] = _plain(value)
        return out

    return differing(cfg, TrainConfig(), "")
