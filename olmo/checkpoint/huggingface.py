"""Converts a checkpoint to the format of transformers' Olmo or Olmo2 class, and back.

    config.json             the architecture, with transformers' keys
    generation_config.json  the ids of the end-of-text and padding tokens
    model.safetensors       the same weights by other names; fused projections are split
    tokenizer.json          unchanged; tokenizer_config.json names its special tokens
    config.yaml             the checkpoint's own, which makes the conversion back exact

Nothing here imports transformers. The tests and lm-eval load what it writes with transformers.

Shapes: d d_model, V rows of the embedding, K = H_kv * D keys, F inner width of the feed-forward.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from olmo.checkpoint.final import save_tensors
from olmo.config import BlockType, LayerNormType, ModelConfig, TrainConfig, to_yaml
from olmo.io import untrusted
from olmo.model.regroup import regroup_state_dict

# What each class computes, regardless of its config.json: our key, its values that can be exported,
# and the reason.
COMMON_REQUIREMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "rope": ((True,), "they have rotary positions only"),
    "alibi": ((False,), "they have rotary positions only"),
    "activation_type": (("swiglu",), "their feed-forward is gated by silu"),
    "include_bias": ((False,), "their feed-forward and head have no biases"),
    "embedding_layer_norm": ((False,), "they have no norm after the embedding"),
    "scale_logits": ((False,), "they do not scale the logits"),
}
REQUIREMENTS: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "olmo": COMMON_REQUIREMENTS
    | {
        "norm_after": ((False,), "it norms what goes into attention and feed-forward"),
        "attention_layer_norm": ((False,), "it has no norm of queries and keys"),
        "layer_norm_type": (("default", "low_precision"), "its norm subtracts the mean"),
        "layer_norm_with_affine": ((False,), "its norms have no weights"),
        "layer_norm_eps": ((1e-5,), "its epsilon is fixed"),
    },
    "olmo2": COMMON_REQUIREMENTS
    | {
        "norm_after": ((True,), "it norms what comes out of attention and feed-forward"),
        "attention_layer_norm": ((True,), "it norms queries and keys"),
        "layer_norm_type": (("rms",), "its norm is RMSNorm"),
        "layer_norm_with_affine": ((True,), "its norms have weights"),
        "attention_layer_norm_with_affine": ((True,), "its norms have weights"),
        "bias_for_layer_norm": ((False, None), "its norms have no biases"),
        "clip_qkv": ((None,), "it does not clip"),
    },
}
REQUIRED_KEYS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
ARCHITECTURES = {"olmo": "OlmoForCausalLM", "olmo2": "Olmo2ForCausalLM"}
# Norms of a block by their names in Olmo2; those of Olmo have no weights.
NORM_NAMES = {
    "attn_norm": "post_attention_layernorm",
    "ff_norm": "post_feedforward_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}

# A conversation as a text, as in OLMo's fine-tuning data (Tulu): the end-of-text token before it
# and after each answer, each message below its role and stripped of white space.
CHAT_TEMPLATE = (
    "{{ eos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'].strip() }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def choose_architecture(config: ModelConfig) -> str:
    """The class that computes what this model computes: "olmo" or "olmo2".

    Raises ValueError if there is none, with each key that differs from the nearest one.
    """
    wrong = {
        name: {
            key: reason
            for key, (allowed, reason) in wanted.items()
            if getattr(config, key) not in allowed
        }
        for name, wanted in REQUIREMENTS.items()
    }
    nearest = min(REQUIREMENTS, key=lambda name: len(wrong[name]))
    if wrong[nearest]:
        reasons = "; ".join(
            f"model.{key}={getattr(config, key)} (expected "
            f"{' or '.join(map(str, REQUIREMENTS[nearest][key][0]))}: {reason})"
            for key, reason in wrong[nearest].items()
        )
        raise ValueError(
            f"transformers cannot express this model. {ARCHITECTURES[nearest]} is nearest, except "
            f"for {reasons}. Our own scorer and `olmo.OLMo` load the checkpoint as it is"
        )
    return nearest


def build_config_json(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The content of config.json. Raises ValueError if transformers cannot express the model."""
    model_type = choose_architecture(config)
    width = config.mlp_hidden_size or config.mlp_ratio * config.d_model
    settings: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": config.embedding_size or config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": width // 2,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.effective_n_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence_length,
        "rope_theta": config.rope_theta,  # before transformers 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.weight_tying,
        "initializer_range": config.init_std,
        "bos_token_id": None,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if model_type == "olmo":
        return settings | {"clip_qkv": config.clip_qkv}
    return settings | {"rms_norm_eps": config.layer_norm_eps}


def parse_config_json(settings: Mapping[str, Any], vocab_size: int | None = None) -> ModelConfig:
    """The ModelConfig of a config.json.

    `vocab_size` is the tokenizer's; by default every row of the embedding is a token.

    Raises ValueError for another class, and for a setting that our model does not compute.
    """
    kind = settings.get("model_type")
    if kind not in REQUIREMENTS:
        raise ValueError(
            f"config.json: expected model_type {' or '.join(REQUIREMENTS)}, found {kind!r}"
        )
    if missing := [key for key in REQUIRED_KEYS if not isinstance(settings.get(key), int)]:
        raise ValueError(f"config.json: expected a number as {missing[0]}, found none")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    heads, width = settings["num_attention_heads"], settings["hidden_size"]
    for key, found, allowed in (
        ("hidden_act", settings.get("hidden_act", "silu"), ("silu",)),
        ("attention_bias", settings.get("attention_bias", False), (False,)),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default",)),
        ("head_dim", settings.get("head_dim") or width // heads, (width // heads,)),
        ("quantization_config", settings.get("quantization_config"), (None,)),
    ):
        if found not in allowed:
            raise ValueError(f"config.json: {key}: expected {allowed[0]}, found {found}")
    theta = rope.get("rope_theta") or settings.get("rope_theta", 10_000)
    if theta != int(theta):
        raise ValueError(f"config.json: rope_theta: expected a whole number, found {theta}")
    rows, second = settings["vocab_size"], kind == "olmo2"
    kv_heads = settings.get("num_key_value_heads") or heads
    return ModelConfig(
        d_model=width,
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        n_layers=settings["num_hidden_layers"],
        mlp_hidden_size=2 * settings["intermediate_size"],
        clip_qkv=settings.get("clip_qkv"),
        rope=True,
        rope_theta=int(theta),
        max_sequence_length=settings["max_position_embeddings"],
        attention_dropout=settings.get("attention_dropout", 0.0),
        residual_dropout=0.0,
        embedding_dropout=0.0,
        include_bias=False,
        bias_for_layer_norm=False,
        norm_after=second,
        attention_layer_norm=second,
        layer_norm_type=LayerNormType.rms if second else LayerNormType.default,
        layer_norm_with_affine=second,
        attention_layer_norm_with_affine=second,
        layer_norm_eps=settings.get("rms_norm_eps", 1e-5) if second else 1e-5,
        weight_tying=settings.get("tie_word_embeddings", False),
        vocab_size=min(rows, vocab_size or rows),
        embedding_size=rows,
        eos_token_id=_one(settings.get("eos_token_id")),
        pad_token_id=_one(settings.get("pad_token_id"), settings.get("eos_token_id")),
        init_std=settings.get("initializer_range", 0.02),
    )


def _one(*candidates: Any) -> int:
    """The first id that is not None; of a list of end-of-text ids the first."""
    token_id = next((c for c in candidates if c is not None), None)
    if token_id is None:
        raise ValueError("config.json: expected an eos_token_id, found none")
    return int(token_id[0] if isinstance(token_id, list) else token_id)


# --- weights ------------------------------------------------------------------------------------


def to_hf_weights(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename a model's weights to transformers' names; the tensors share memory."""
    left = {
        n.removeprefix("transformer."): w for n, w in regroup_state_dict(dict(weights))[0].items()
    }
    kv = config.effective_n_kv_heads * (config.d_model // config.n_heads)
    found = {"model.embed_tokens.weight": left.pop("wte.weight")}
    if not config.weight_tying:
        found["lm_head.weight"] = left.pop("ff_out.weight")
    if "ln_f.weight" in left:
        found["model.norm.weight"] = left.pop("ln_f.weight")
    for i in range(config.n_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        if config.block_type == BlockType.sequential:
            q, k, v = left.pop(f"{ours}att_proj.weight").split((config.d_model, kv, kv))
        else:
            q, k, v = (left.pop(f"{ours}{name}_proj.weight") for name in "qkv")
        up, gate = left.pop(f"{ours}ff_proj.weight").chunk(2)  # (F, d) each
        found |= {
            f"{theirs}self_attn.q_proj.weight": q,  # (d, d)
            f"{theirs}self_attn.k_proj.weight": k,  # (K, d)
            f"{theirs}self_attn.v_proj.weight": v,
            f"{theirs}self_attn.o_proj.weight": left.pop(f"{ours}attn_out.weight"),
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.down_proj.weight": left.pop(f"{ours}ff_out.weight"),
        }
        for name, other in NORM_NAMES.items():
            if f"{ours}{name}.weight" in left:
                found[f"{theirs}{other}.weight"] = left.pop(f"{ours}{name}.weight")
    if left:
        raise ValueError(f"the checkpoint has a weight that its config does not: {min(left)}")
    return found


def from_hf_weights(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename transformers' weights to OLMo's names, as a model of this config has them."""
    left = dict(weights)
    found = {"wte.weight": _take(left, "model.embed_tokens.weight")}
    head = left.pop("lm_head.weight", None)
    if not config.weight_tying:
        if head is None:
            raise ValueError(
                "expected lm_head.weight, since tie_word_embeddings is false; found none"
            )
        found["ff_out.weight"] = head
    if config.layer_norm_with_affine:
        found["ln_f.weight"] = _take(left, "model.norm.weight")
    for i in range(config.n_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        q, k, v = (_take(left, f"{theirs}self_attn.{name}_proj.weight") for name in "qkv")
        if config.block_type == BlockType.sequential:
            found[f"{ours}att_proj.weight"] = torch.cat((q, k, v))
        else:
            for name, tensor in zip("qkv", (q, k, v), strict=True):
                found[f"{ours}{name}_proj.weight"] = tensor
        up, gate = (_take(left, f"{theirs}mlp.{name}_proj.weight") for name in ("up", "gate"))
        found[f"{ours}ff_proj.weight"] = torch.cat((up, gate))
        found[f"{ours}attn_out.weight"] = _take(left, f"{theirs}self_attn.o_proj.weight")
        found[f"{ours}ff_out.weight"] = _take(left, f"{theirs}mlp.down_proj.weight")
        if config.layer_norm_with_affine:
            for name, other in NORM_NAMES.items():
                found[f"{ours}{name}.weight"] = _take(left, f"{theirs}{other}.weight")
    left = {n: w for n, w in left.items() if not n.endswith("rotary_emb.inv_freq")}
    if left:
        raise ValueError(f"expected the weights that config.json describes, found {min(left)}")
    renamed = {f"transformer.{name}": tensor for name, tensor in found.items()}
    return regroup_state_dict(renamed, config.block_group_size)[0]


def _take(weights: dict[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise ValueError(f"expected the weight {name}, which config.json implies; found none")
    return weights.pop(name)


# --- folders ------------------------------------------------------------------------------------


def write_hf_folder(
    folder: Path, weights: Mapping[str, Tensor], config_yaml: str, tokenizer: Path
) -> None:
    """Write the folder that `AutoModelForCausalLM.from_pretrained` reads; equal input, equal bytes.

    `config_yaml` is the checkpoint's own, `tokenizer` a tokenizer.json. A model that was trained on
    answers only (data.label_mask_paths) gets a chat template.

    Raises ValueError for a model that transformers cannot express, or another model's tokenizer.
    """
    (folder / "config.yaml").write_text(config_yaml)
    config = ModelConfig.load(folder / "config.yaml", key="model", untrusted=True)
    hf_weights = to_hf_weights(weights, config)
    dtypes = {tensor.dtype for tensor in hf_weights.values()}
    if len(dtypes) > 1:
        raise ValueError(f"expected weights of one dtype, found {sorted(map(str, dtypes))}")
    settings = build_config_json(config, dtypes.pop())
    _write_json(folder / "config.json", settings)
    ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    _write_json(folder / "generation_config.json", ends)
    if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    _write_json(
        folder / "tokenizer_config.json",
        build_tokenizer_config(tokenizer, config, is_instruction_tuned(config_yaml)),
    )
    save_tensors(hf_weights, folder / "model.safetensors")


def is_instruction_tuned(config_yaml: str) -> bool:
    """Whether a run was trained with label masks: on the assistant's answers only."""
    data = (yaml.safe_load(config_yaml) or {}).get("data") or {}
    return bool(data.get("label_mask_paths"))


def build_tokenizer_config(tokenizer: Path, config: ModelConfig, chat: bool) -> dict[str, Any]:
    """The content of tokenizer_config.json for a tokenizer.json; `chat` adds the template.

    Raises ValueError if the tokenizer lacks the end-of-text or padding id, or has more tokens than
    the model's embedding has rows.
    """
    from tokenizers import Tokenizer

    known = Tokenizer.from_file(str(tokenizer))
    rows = config.embedding_size or config.vocab_size
    if known.get_vocab_size() > rows:
        raise ValueError(
            f"expected a tokenizer of at most {rows:,} tokens, the rows of the model's embedding, "
            f"found {known.get_vocab_size():,} in {tokenizer}: it is another model's tokenizer"
        )
    names = {}
    for key in ("eos_token", "pad_token"):
        number = getattr(config, f"{key}_id")
        names[key] = known.id_to_token(number)
        if names[key] is None:
            raise ValueError(f"model.{key}_id is {number}, but {tokenizer} has no token {number}")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_sequence_length,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    return settings | ({"chat_template": CHAT_TEMPLATE} if chat else {})


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder has transformers' layout."""
    return (folder / "config.json").exists() and not (folder / "model.pt").exists()


def read_hf_folder(folder: Path) -> tuple[dict[str, Tensor], str]:
    """The weights by OLMo's names, and the config.yaml, of a folder that transformers reads.

    A folder that we did not write has no config.yaml: it is made from config.json. In a folder that
    we wrote, both must agree.

    Raises ValueError for another architecture, and for weights or settings that do not fit.
    """
    try:
        settings = dict(json.loads((folder / "config.json").read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}/config.json is not readable as JSON: {error}") from error
    own_config = folder / "config.yaml"
    if own_config.exists():
        config_yaml = own_config.read_text()
        config = ModelConfig.load(own_config, key="model", untrusted=True)
        # Compare parsed models, since each version of transformers writes other keys.
        expected = build_config_json(config)
        found = build_config_json(parse_config_json(settings, config.vocab_size))
        if changed := sorted(key for key in expected if found.get(key) != expected[key]):
            raise ValueError(
                f"{folder}: config.json says {changed[0]}={found.get(changed[0])}, config.yaml "
                f"{expected[changed[0]]}; remove config.yaml if config.json is right"
            )
    else:
        tokenizer, size = folder / "tokenizer.json", None
        if tokenizer.exists():
            from tokenizers import Tokenizer

            size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
        config = parse_config_json(settings, size)
        cfg = TrainConfig().update_with(model=config)
        if tokenizer.exists():
            cfg = cfg.update_with(tokenizer=cfg.tokenizer.update_with(identifier=str(tokenizer)))
        values = cfg.asdict_for_saving()
        config_yaml = to_yaml({key: values[key] for key in ("model", "tokenizer")})
    try:
        return from_hf_weights(_weights(folder), config), config_yaml
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the files that its index names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    found: dict[str, Tensor] = {}
    for name in names:
        if not (folder / untrusted.check_part(name, str(index))).is_file():
            raise ValueError(f"expected the weights in {name}, found no such file")
        try:
            found |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"cannot read {name}: {error}") from error
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
