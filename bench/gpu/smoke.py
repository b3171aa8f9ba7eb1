"""Checks what this device computes: a line of JSON for each check, with the largest error.

Attention by each kernel; the loss, and layers in 8 bits, compiled beside eager, with gradients; a
small model's step compiled, with master weights, and with CUDA graphs over two microbatches.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from olmo.config import CompilerConfig, ModelConfig, TrainConfig
from olmo.distributed.parallelize import parallelize
from olmo.distributed.world import World
from olmo.model import OLMo
from olmo.model.attention import Backend
from olmo.model.kernel_choice import AttentionSetting, MaskType, find_kernel_problem
from olmo.model.loss import CrossEntropy, compute_loss
from olmo.optim.build import build_optimizer
from olmo.optim.master_weights import MasterWeights
from olmo.precision.fp8 import ProductSettings, float8_linear, scaled_mm
from olmo.train.step import clear_gradients, forward_backward

BF16 = torch.bfloat16


def check(
    what: str, limit: float, expected: list[Tensor], compute: Callable[[], list[Tensor]]
) -> None:
    """Print the record of a check, which passes with an error of at most `limit`."""
    try:
        error = largest_error(compute(), expected)
        print_record(what, error <= limit, limit=limit, error=error)
    except Exception as error:
        print_record(what, False, limit=limit, error=None, why=first_line(error))


def print_record(what: str, passed: bool | None, **facts: Any) -> None:
    print(json.dumps({"what": what, **facts, "passed": passed}), flush=True)


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of a tensor: 1 where it is zeros, 2 where it has a NaN."""
    errors = [
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(found, expected, strict=True)
    ]
    return max(2.0 if math.isnan(error) else error for error in errors)


def check_attention(device: torch.device, kind: str) -> None:
    dtype = BF16 if kind == "cuda" else torch.float32
    for head_size in (64, 128, 192) if kind == "cuda" else (16,):
        masks = (
            (MaskType.causal, MaskType.documents) if head_size in (16, 128) else (MaskType.causal,)
        )
        for backend, mask in itertools.product(Backend, masks):
            why = find_kernel_problem(
                backend, AttentionSetting(device, dtype, 8, 8, head_size, mask)
            )
            # A kernel that is not available here neither passes nor fails.
            passed = None if why and "off the formula" not in why else not why
            what = f"attention by {backend}, head size {head_size}, mask {mask}"
            print_record(what, passed, why=why)


def with_gradients(
    call: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor]
) -> list[Tensor]:
    """The output, then the gradients of x and of each weight."""
    own = x.detach().clone().requires_grad_()
    for weight in weights:
        weight.grad = None
    y = call(own)
    y.float().square().sum().backward()
    return [y.detach(), own.grad, *(w.grad.clone() for w in weights)]  # type: ignore[union-attr]


def check_loss(device: torch.device, kind: str) -> None:
    rows, d, vocabulary = (20_480, 1024, 50_304) if kind == "cuda" else (40, 16, 64)
    torch.manual_seed(0)
    x = torch.randn(rows, d, device=device)
    weight = (torch.randn(vocabulary, d, device=device) / d**0.5).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    labels[::7] = -100

    def head(by: CrossEntropy) -> Callable[[Tensor], Tensor]:
        def total(x: Tensor) -> Tensor:
            with torch.autocast(kind, BF16):
                return compute_loss(by, x, weight, labels, None, 1.0, 0.0).total[None] / rows

        return total

    plain = with_gradients(head(CrossEntropy.plain), x, [weight])
    chunked = with_gradients(head(CrossEntropy.chunked), x, [weight])
    check("loss, chunked beside plain", 0.02, plain, lambda: chunked)
    compiled = torch.compile(head(CrossEntropy.chunked), fullgraph=True)
    check("loss, compiled beside plain", 0.02, plain, lambda: with_gradients(compiled, x, [weight]))


def check_fp8(device: torch.device, kind: str) -> None:
    rows, d, wide = (4096, 1024, 8192) if kind == "cuda" else (64, 32, 48)
    torch.manual_seed(0)
    x = torch.randn(rows, d, device=device)
    weight = (torch.randn(wide, d, device=device) / d**0.5).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        with torch.autocast(kind, BF16):
            return float8_linear(x, weight, None, ProductSettings(scaled_mm))

    def exact(x: Tensor) -> Tensor:
        return nn.functional.linear(x, weight)

    eager = with_gradients(layer, x, [weight])
    check("8 bits beside float32", 0.12, with_gradients(exact, x, [weight]), lambda: eager)
    compiled = torch.compile(layer, fullgraph=True)
    check(
        "8 bits, compiled beside eager", 0.03, eager, lambda: with_gradients(compiled, x, [weight])
    )


def check_steps(device: torch.device, kind: str) -> None:
    sizes = {"d_model": 1024, "n_heads": 8, "n_layers": 2, "max_sequence_length": 1024}
    vocabulary = {"vocab_size": 50_280, "embedding_size": 50_304}
    if kind == "cpu":
        sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_sequence_length": 32}
        vocabulary = {"vocab_size": 250, "embedding_size": 256}
    dropout = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0)
    model_config = ModelConfig(**sizes, **vocabulary, **dropout, rope=True, eos_token_id=0)
    torch.manual_seed(0)
    fresh = OLMo(model_config)
    length = model_config.max_sequence_length
    ids = torch.randint(0, 250, (4, length))
    batch = {"input_ids": ids, "index": torch.arange(4)}

    def step(masters: bool = False, **compiler: Any) -> list[Tensor]:
        cfg = TrainConfig(
            model=model_config,
            precision="amp_bf16",
            device_train_microbatch_size=2,
            master_weights=masters,
            compile=CompilerConfig(fullgraph=True, **compiler) if compiler else None,
        )
        model = copy.deepcopy(fresh).to(device).train()
        model.use_attention(device, BF16)
        parallelize(cfg, model, World(0, 0, 1, device, ""))
        optimizer = build_optimizer(cfg, model)
        if masters:
            MasterWeights(model, optimizer)
        for _ in range(3):  # a graph is captured at the second call, and replayed from then on
            clear_gradients(optimizer, cfg)
            ce = forward_backward(model, batch, cfg, device, 1).ce
        held = [p for group in optimizer.param_groups for p in group["params"]]
        found = [ce.detach().clone(), *(p.grad.detach().clone() for p in held)]
        torch.compiler.reset()
        return found

    eager = step()
    check("a step, compiled beside eager", 0.05, eager, lambda: step(mode=None))
    check("a step with master weights", 0.1, eager, lambda: step(masters=True))
    if kind == "cuda":
        graphs = {"mode": "reduce-overhead"}
        check("a step of two microbatches by CUDA graphs", 0.05, eager, lambda: step(**graphs))


def main() -> None:
    kind = json.loads(sys.argv[1])["kind"]
    device = torch.device(kind)
    for part in (check_attention, check_fp8, check_loss, check_steps):
        try:
            part(device, kind)
        except Exception as error:  # the other parts may still run
            print_record(part.__name__, False, why=first_line(error))


if __name__ == "__main__":
    main()
