"""What has a backward of ours computes the same compiled: the output, and each gradient.

torch 2.11 compiled the 8-bit layers' forward and left out their backward, without a word. So this
runs on the oldest and the newest torch that we claim, and compares gradients, not only losses.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import small_run
import torch
from torch import Tensor, nn

from olmo.config import CompilerConfig, FP8Backend, FP8Config, FP8Recipe, FP8Scaling
from olmo.distributed.parallelize import parallelize
from olmo.distributed.world import World
from olmo.model import OLMo, loss
from olmo.optim.build import build_optimizer
from olmo.optim.master_weights import MasterWeights
from olmo.precision import fp8
from olmo.precision.converters import build_converter, convert_to_float8
from olmo.precision.fp8 import (
    DelayedScaling,
    ProductSettings,
    emulated_mm,
    float8_linear,
    scaled_mm,
)
from olmo.train.step import clear_gradients, forward_backward
from olmo.train.validate import check_device

CPU, BF16 = torch.device("cpu"), torch.bfloat16
# Of Dynamo and AOTAutograd, which decide what a backward is; kernels are inductor's, and slow.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def off(found: Tensor, expected: Tensor) -> float:
    """The relative error: 1 for zeros."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def results(layer: Callable[[Tensor], Tensor], weights: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of each weight."""
    weights.zero_grad()
    own = x.clone().requires_grad_()
    y = layer(own)
    y.float().square().sum().backward()
    return [y.detach(), own.grad, *(p.grad.clone() for p in weights.parameters())]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recipe", FP8Recipe)
@pytest.mark.parametrize("product", [scaled_mm, emulated_mm], ids=["native", "emulate"])
def test_a_layer_in_8_bits(product: fp8.ScaledProduct, recipe: FP8Recipe, autocast: bool):
    name = FP8Backend.native if product is scaled_mm else FP8Backend.emulate
    if why := build_converter(name).find_problem(CPU, FP8Config(backend=name, recipe=recipe)):
        pytest.skip(why)
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 48), torch.randn(64, 32)
    rowwise = recipe is not FP8Recipe.tensorwise
    settings = ProductSettings(product, rowwise, recipe is FP8Recipe.rowwise_with_gw_hp)
    for scaling in list(FP8Scaling)[: 1 if rowwise else 2]:
        states = [
            DelayedScaling(2, CPU) if scaling is FP8Scaling.delayed else None
            for _ in ("eager", "compiled")
        ]

        def in_float8(x: Tensor, delayed: DelayedScaling | None) -> Tensor:
            with torch.autocast("cpu", BF16, enabled=autocast):
                return float8_linear(x, layer.weight, layer.bias, settings, delayed)

        compiled = torch.compile(in_float8, fullgraph=True, backend=BACKEND)
        eager = results(lambda x, s=states: in_float8(x, s[0]), layer, x)
        found = results(lambda x, s=states, c=compiled: c(x, s[1]), layer, x)
        errors = list(map(off, found, eager))
        assert max(errors) < (0.03 if autocast else 1e-5), errors
        if scaling is FP8Scaling.delayed:
            torch.testing.assert_close(
                states[1].current_amax, states[0].current_amax, rtol=0.03, atol=0
            )


def test_quantized_tensors_have_the_dtype_of_the_product(monkeypatch: pytest.MonkeyPatch):
    """Under autocast a norm's float32 output becomes bfloat16 first: half of the bytes to read."""
    taken: list[tuple[torch.dtype, bool]] = []
    quantize = fp8.quantize

    def noted(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        taken.append(x.dtype)
        return quantize(x, scale, dtype)

    fast: list[bool] = []

    def product(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out: Any, is_fast: bool) -> Tensor:
        fast.append(is_fast)
        return emulated_mm(a, sa, b, sb, out)

    monkeypatch.setattr(fp8, "quantize", noted)
    layer = nn.Linear(32, 48, bias=False)
    for rowwise in (False, True):
        taken.clear(), fast.clear()
        with torch.autocast("cpu", BF16):
            y = float8_linear(
                torch.randn(64, 32), layer.weight, None, ProductSettings(product, rowwise)
            )
        assert taken == [BF16, torch.float32], "the input, the weight"
        y.float().sum().backward()
        # Fast accumulation in forward alone: gradients span more binary orders.
        assert fast == [True, False, False]


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "biased": {"bias": True},
    "z-loss": {"z_multiplier": 0.1},
}


@pytest.mark.parametrize("formulation", ["cpu", "gpu"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_the_chunked_loss(
    formulation: str, head: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
):
    """On a CPU it is one operation to the compiler; for a GPU the compiler sees what is inside."""
    if formulation == "gpu":
        monkeypatch.setattr(loss, "_chunked_loss_op", loss._chunked_loss)
    torch.manual_seed(0)
    options = dict(HEADS[head])
    weights, x = nn.Linear(16, 50, bias=options.pop("bias", False)), torch.randn(40, 16)
    labels = torch.randint(0, 50, (40,))
    labels[7:20] = loss.IGNORE_INDEX

    def head_of(x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16, enabled=autocast):
            found = loss.linear_cross_entropy(
                x, weights.weight, labels, weights.bias, chunk=16, **options
            )
        return found.total[None]

    eager = results(head_of, weights, x)
    found = results(torch.compile(head_of, fullgraph=True, backend=BACKEND), weights, x)
    errors = list(map(off, found, eager))
    assert max(errors) < (0.02 if autocast else 1e-5), errors


LLAMA = {"block_type": "llama", "n_kv_heads": 1, "attention_layer_norm": True, "include_bias": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32, packed": {"optimizer": {"packed_state": True}},
    "masters": {"precision": "amp_bf16", "master_weights": True},
    "masters, fp8": {"precision": "amp_bf16", "master_weights": True, "fp8": {}},
    "fp8 delayed": {"precision": "amp_bf16", "fp8": {"scaling": "delayed"}},
    "fp8 torchao": {"precision": "amp_bf16", "fp8": {"backend": "torchao"}},
    "checkpointing, fp8": {"activation_checkpointing": "whole_layer", "fp8": {}},
    "documents, llama": {"data": {"generate_doc_lengths": True}, "model": LLAMA},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_of_the_trainer(name: str, tmp_path: Any):
    """Two microbatches, clipping and the update: gradients, and weights afterwards."""
    cfg = small_run.config(tmp_path, **SETTINGS[name])
    try:
        check_device(cfg, CPU, sharded=False)
    except ValueError as why:
        pytest.skip(str(why))
    torch.manual_seed(0)
    fresh = OLMo(cfg.model)
    for p in fresh.parameters():  # large enough for gradients of every weight to count
        nn.init.normal_(p, std=0.2)
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {
        "input_ids": torch.randint(2, 60, (8, 16), generator=generator),
        "index": torch.arange(8),
    }
    if cfg.data.generate_doc_lengths:
        batch["doc_lens"] = torch.tensor([[9, 7, 0]] * 4 + [[3, 8, 5]] * 4)
    found = []
    for compiler in (None, CompilerConfig(backend=BACKEND, fullgraph=True)):
        cfg.compile = compiler
        model = copy.deepcopy(fresh).train()
        if cfg.fp8 is not None:
            convert_to_float8(model, cfg.fp8, CPU)
        parallelize(cfg, model, World(0, 0, 1, CPU, ""))
        optimizer = build_optimizer(cfg, model)
        master_weights = MasterWeights(model, optimizer) if cfg.master_weights else None
        clear_gradients(optimizer, cfg)
        losses = forward_backward(model, batch, cfg, CPU, 1)
        gradients = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
        optimizer.clip_grads_and_collect_metrics(1)
        optimizer.step()
        if master_weights is not None:
            master_weights.copy_to_model()
        found.append([losses.ce, *gradients, *model.state_dict().values()])
    errors = list(map(off, found[1], found[0]))
    exact = cfg.precision == "fp32" and cfg.fp8 is None
    # In 8 bits a rounding that falls the other way goes on through the layers.
    assert max(errors) < (1e-4 if exact else 0.3), errors
