"""The training step of others, in their own Python, for ours to be held against.

    python olmo/bench/peer.py < a request, then a line a turn (side.serve)

Run by its path: AI2's package is called `olmo` as ours is, so nothing of ours is imported but
side.py, which lies beside this file. A peer's step is what its own trainer does with one microbatch
on one device: forward, loss, backward, clipping, learning rate, update, metrics.
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

import torch
from side import Training, Unavailable, fill, ids_of, serve, weights_of
from torch import Tensor, nn

FLASH_ATTN = "flash-attn"


def ai2_olmo(request: dict[str, Any], device: torch.device) -> Training:
    """AI2's model, loss, clipping and optimizer, as its Trainer.train_step has them.

    Its Trainer wants a GPU and a process group; what it does with a batch is called here piece by
    piece. `flash-attn` is its flash_attention and its fused_loss, both from that package.
    """
    flash = request["attention"] == FLASH_ATTN
    settings = request["train"]
    settings["model"] |= {"flash_attention": flash, "init_device": "cpu"}
    sys.meta_path.append(Absent())
    rooms = ("config", "model", "optim", "train")
    config, model_, optim_, train = (importlib.import_module(f"olmo.{room}") for room in rooms)
    cfg = config.TrainConfig.new(**settings)
    model = model_.OLMo(cfg.model)
    fill(model)
    model.to(device).train()
    if request["compile"]:
        for block in model.transformer.blocks:  # as its scripts/train.py does
            block.compile(mode=request["compile"])
    optim, scheduler = optim_.build_optimizer(cfg, model), optim_.build_scheduler(cfg)
    trainer = object.__new__(train.Trainer)
    trainer.cfg, trainer.dist_model = cfg, model
    trainer.loss_fn = train.fused_loss_fn if flash else train.cross_entropy_loss
    labels_per_token = 1 - 1 / cfg.model.max_sequence_length  # it divides by tokens, not by labels

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
        # It reads the loss and each metric every step, and so waits for the device.
        if torch.isnan(ce):
            raise ValueError("nan loss encountered")
        for value in metrics.values():
            value.item()
        return ce.item() / labels_per_token

    return Training(step, ids_in(request), device)


def transformers_olmo(request: dict[str, Any], device: torch.device) -> Training:
    """transformers' OlmoForCausalLM, with the step of its Trainer: the model's own loss (the mean
    over labels), clipping, torch's fused AdamW."""
    if importlib.util.find_spec("transformers") is None:
        raise Unavailable("there is no package transformers in this Python")
    transformers = importlib.import_module("transformers")
    shape, settings = request["train"]["model"], request["train"]
    known = {
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
    for name, value in known.items():
        if shape.get(name, value) != value:
            raise Unavailable(f"{name}: {shape[name]} is not what transformers' Olmo has ({value})")
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
    fill_transformers(model, cfg, tied)
    model.to(device).train()
    if request["compile"]:
        model.compile(mode=request["compile"])
    adamw = settings["optimizer"]
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
        nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        optim.step()
        return loss.detach()

    return Training(step, ids_in(request), device)


def fill_transformers(model: nn.Module, cfg: Any, tied: bool) -> None:
    """The weights that `side.fill` gives a model with OLMo's names."""
    named = dict(transformers_weights(cfg))
    head = "lm_head.weight"
    if tied:
        del named[head]
    found = model.load_state_dict(named, strict=False)
    missing = set(found.missing_keys) - ({head} if tied else set())
    if missing or found.unexpected_keys:
        raise Unavailable(
            f"transformers' Olmo has other weights than expected: {sorted(missing)} and not "
            f"{found.unexpected_keys}; this was written for transformers 5.24"
        )


def transformers_weights(cfg: Any) -> Iterator[tuple[str, Tensor]]:
    """Names of transformers, and the parts of OLMo's packed matrices that stand there."""
    d, width = cfg.hidden_size, cfg.intermediate_size
    yield "model.embed_tokens.weight", weights_of("transformer.wte.weight", (cfg.vocab_size, d))
    yield "lm_head.weight", weights_of("transformer.ff_out.weight", (cfg.vocab_size, d))
    for i in range(cfg.num_hidden_layers):
        theirs, ours = f"model.layers.{i}", f"transformer.blocks.{i}"
        packed = weights_of(f"{ours}.att_proj.weight", (3 * d, d)).chunk(3)
        for name, part in zip("qkv", packed, strict=True):
            yield f"{theirs}.self_attn.{name}_proj.weight", part
        yield f"{theirs}.self_attn.o_proj.weight", weights_of(f"{ours}.attn_out.weight", (d, d))
        up, gate = weights_of(f"{ours}.ff_proj.weight", (2 * width, d)).chunk(2)
        yield f"{theirs}.mlp.up_proj.weight", up
        yield f"{theirs}.mlp.gate_proj.weight", gate
        yield f"{theirs}.mlp.down_proj.weight", weights_of(f"{ours}.ff_out.weight", (d, width))


def ids_in(request: dict[str, Any]) -> Callable[[int], Tensor]:
    model, instances = request["train"]["model"], request["train"]["global_train_batch_size"]
    sizes = (instances, model["max_sequence_length"], model["vocab_size"])
    return lambda number: ids_of(*sizes, number)


def autocast(request: dict[str, Any], device: torch.device) -> Any:
    """As the trainers do it: matrix products in the precision's type."""
    halves = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
    if (dtype := halves.get(request["train"]["precision"])) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for packages that AI2's modules import and a step never calls (buckets, data
    sets, progress bars) where they are not installed: so its sources alone can be timed."""

    NAMES = """boto3 botocore cached_path datasets google importlib_resources olmo_data packaging
        requests rich safetensors sklearn tokenizers torchmetrics wandb"""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] in self.NAMES.split():
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class AbsentModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return absent(name)


class AbsentType(type):
    """A class that can be inherited from, called and added to, and does nothing."""

    def __getattr__(cls, name: str) -> Any:
        return absent(name)

    def __add__(cls, other: Any) -> Any:
        return other


def absent(name: str) -> AbsentType:
    if name.startswith("__"):
        raise AttributeError(name)
    return AbsentType(name, (), {"__init__": lambda self, *args, **kwargs: None})


STEPS = {"ai2-olmo": ai2_olmo, "transformers": transformers_olmo}


def build(request: dict[str, Any]) -> Training:
    if request["path"]:
        sys.path.insert(0, request["path"])
    if request["attention"] == FLASH_ATTN and importlib.util.find_spec("flash_attn") is None:
        raise Unavailable(
            "attention flash-attn is computed by the package of that name, which this Python lacks"
        )
    device = torch.device("cuda", 0) if request["kind"] == "cuda" else torch.device("cpu")
    return STEPS[request["whose"]](request, device)


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose other modules are ours
    serve(build)
