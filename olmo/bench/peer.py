"""The training steps of other trainers, run in their own Python and timed beside ours.

    python olmo/bench/peer.py    reads a request, then a line a turn (timing.serve_turns)

Run by its path: AI2's package is called `olmo`, too, so nothing of ours is imported but timing.py
in this folder. A peer's step is what its own trainer does with one microbatch on one device:
forward, loss, backward, clipping, learning rate, update, metrics.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import timing
import torch
from timing import Unavailable, Workload
from torch import Tensor, nn

FLASH_ATTN = "flash-attn"


def ai2_olmo(request: dict[str, Any], device: torch.device) -> Workload:
    """AI2's model, loss, clipping and optimizer, as in its Trainer.train_step.

    Its Trainer needs a GPU and a process group, so the parts of a step are called here one by one.
    `flash-attn` sets its flash_attention and its fused_loss, both from that package.
    """
    flash = request["attention"] == FLASH_ATTN
    config = request["train"]
    config["model"] |= {"flash_attention": flash, "init_device": "cpu"}
    sys.meta_path.append(StubFinder())
    modules = ("config", "model", "optim", "train")
    config_, model_, optim_, train = (importlib.import_module(f"olmo.{name}") for name in modules)
    cfg = config_.TrainConfig.new(**config)
    model = model_.OLMo(cfg.model)
    timing.fill_weights(model)
    model.to(device).train()
    if request["compile"]:
        for block in model.transformer.blocks:  # as its scripts/train.py does
            block.compile(mode=request["compile"])
    optim, scheduler = optim_.build_optimizer(cfg, model), optim_.build_scheduler(cfg)
    trainer = object.__new__(train.Trainer)
    trainer.cfg, trainer.dist_model = cfg, model
    trainer.loss_fn = train.fused_loss_fn if flash else train.cross_entropy_loss
    labels_per_token = 1 - 1 / cfg.model.max_sequence_length  # its loss is divided by tokens

    def step(number: int, ids: Tensor) -> float:
        optim.zero_grad(set_to_none=True)
        ids = ids.to(device)
        with autocast(request, device):
            loss, ce, _ = trainer.train_micro_batch({"input_ids": ids}, ids.numel())
        loss.backward()
        metrics = optim.clip_grads_and_collect_metrics(number, collect_param_metrics=False)
        now = (number, cfg.max_duration)
        for group in optim.param_groups:
            group["lr"] = scheduler.get_lr(cfg.optimizer.learning_rate, *now)
            group["max_grad_norm"] = scheduler.get_max_grad_norm(cfg.max_grad_norm, *now)
        optim.step()
        # Its trainer reads the loss and each metric in every step, which waits for the device.
        if torch.isnan(ce):
            raise ValueError("nan loss encountered")
        for value in metrics.values():
            value.item()
        return ce.item() / labels_per_token

    return Workload(step, ids_of_request(request), device)


def transformers_olmo(request: dict[str, Any], device: torch.device) -> Workload:
    """transformers' OlmoForCausalLM with the step of its Trainer: the model's loss (a mean over
    labels), clipping, torch's fused AdamW."""
    if importlib.util.find_spec("transformers") is None:
        raise Unavailable("the package transformers is not installed in this Python")
    transformers = importlib.import_module("transformers")
    config = request["train"]
    shape = config["model"]
    supported = {
        "rope": True,
        "include_bias": False,
        "layer_norm_type": "default",
        "layer_norm_with_affine": False,
        "attention_layer_norm": False,
        "block_type": "sequential",
        "n_kv_heads": None,
        "clip_qkv": None,
        "rope_theta": 10_000,
        "layer_norm_eps": 1e-5,
        "norm_after": False,
        "scale_logits": False,
        "activation_type": "swiglu",
        **dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0),
    }
    for name, value in supported.items():
        if shape.get(name, value) != value:
            raise Unavailable(
                f"{name}: transformers' Olmo supports {value} only, found {shape[name]}"
            )
    attention = {"sdpa": "sdpa", "math": "eager", FLASH_ATTN: "flash_attention_2"}
    tied = shape["weight_tying"]
    cfg = transformers.OlmoConfig(
        vocab_size=shape["embedding_size"],
        hidden_size=shape["d_model"],
        intermediate_size=(shape["mlp_hidden_size"] or shape["mlp_ratio"] * shape["d_model"]) // 2,
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        max_position_embeddings=shape["max_sequence_length"],
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention[request["attention"]],
    )
    model = transformers.OlmoForCausalLM(cfg)
    load_transformers_weights(model, cfg, tied)
    model.to(device).train()
    if request["compile"]:
        model.compile(mode=request["compile"])
    adamw = config["optimizer"]
    optim = torch.optim.AdamW(
        model.parameters(),
        lr=adamw["learning_rate"],
        weight_decay=adamw["weight_decay"],
        betas=adamw["betas"],
        eps=adamw["eps"],
        fused=True,
    )

    def step(number: int, ids: Tensor) -> Tensor:
        optim.zero_grad(set_to_none=True)
        ids = ids.to(device)
        with autocast(request, device):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config["max_grad_norm"])
        optim.step()
        return loss.detach()

    return Workload(step, ids_of_request(request), device)


def load_transformers_weights(model: nn.Module, cfg: Any, tied: bool) -> None:
    """Load the weights that `fill_weights` gives a model with OLMo's names. Raises Unavailable."""
    state = dict(transformers_weights(cfg))
    head = "lm_head.weight"
    if tied:
        del state[head]
    loaded = model.load_state_dict(state, strict=False)
    missing = set(loaded.missing_keys) - ({head} if tied else set())
    if missing or loaded.unexpected_keys:
        raise Unavailable(
            "expected the weights of transformers 5.24's Olmo; this one has also "
            f"{sorted(missing)} and lacks {loaded.unexpected_keys}"
        )


def transformers_weights(cfg: Any) -> Iterator[tuple[str, Tensor]]:
    """transformers' names, with the part of OLMo's packed matrix that belongs to each."""
    d, width = cfg.hidden_size, cfg.intermediate_size
    yield (
        "model.embed_tokens.weight",
        timing.synthetic_weight("transformer.wte.weight", (cfg.vocab_size, d)),
    )
    yield (
        "lm_head.weight",
        timing.synthetic_weight("transformer.ff_out.weight", (cfg.vocab_size, d)),
    )
    for i in range(cfg.num_hidden_layers):
        theirs, ours = f"model.layers.{i}", f"transformer.blocks.{i}"
        packed = timing.synthetic_weight(f"{ours}.att_proj.weight", (3 * d, d)).chunk(3)
        for name, part in zip("qkv", packed, strict=True):
            yield f"{theirs}.self_attn.{name}_proj.weight", part
        output = timing.synthetic_weight(f"{ours}.attn_out.weight", (d, d))
        yield f"{theirs}.self_attn.o_proj.weight", output
        up, gate = timing.synthetic_weight(f"{ours}.ff_proj.weight", (2 * width, d)).chunk(2)
        yield f"{theirs}.mlp.up_proj.weight", up
        yield f"{theirs}.mlp.gate_proj.weight", gate
        yield (
            f"{theirs}.mlp.down_proj.weight",
            timing.synthetic_weight(f"{ours}.ff_out.weight", (d, width)),
        )


def ids_of_request(request: dict[str, Any]) -> Callable[[int], Tensor]:
    model, instances = request["train"]["model"], request["train"]["global_train_batch_size"]
    sizes = (instances, model["max_sequence_length"], model["vocab_size"])
    return lambda number: timing.synthetic_ids(*sizes, number)


def autocast(request: dict[str, Any], device: torch.device) -> Any:
    """Autocast to the dtype of the precision, as the trainers do."""
    dtypes = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
    if (dtype := dtypes.get(request["train"]["precision"])) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports an empty module for each package that AI2's modules import and a step never calls,
    so that AI2's sources alone can be timed."""

    NAMES = """boto3 botocore cached_path datasets google importlib_resources olmo_data packaging
        requests rich safetensors sklearn tokenizers torchmetrics wandb"""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] in self.NAMES.split():
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = stub_class  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class StubType(type):
    """The type of a class that can be inherited from, called and added, and does nothing."""

    def __getattr__(cls, name: str) -> Any:
        return stub_class(name)

    def __add__(cls, other: Any) -> Any:
        return other


def stub_class(name: str) -> StubType:
    if name.startswith("__"):
        raise AttributeError(name)
    return StubType(name, (), {"__init__": lambda self, *args, **kwargs: None})


PEERS = {"ai2-olmo": ai2_olmo, "transformers": transformers_olmo}


def build(request: dict[str, Any]) -> Workload:
    if request["path"]:
        sys.path.insert(0, request["path"])
    if request["attention"] == FLASH_ATTN and importlib.util.find_spec("flash_attn") is None:
        raise Unavailable(
            "attention flash-attn is computed by the package flash-attn, which this Python lacks"
        )
    device = torch.device("cuda", 0) if request["kind"] == "cuda" else torch.device("cpu")
    return PEERS[request["whose"]](request, device)


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose other modules are ours
    timing.serve_turns(build)
