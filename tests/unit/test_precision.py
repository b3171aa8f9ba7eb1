"""8-bit linear layers: every backend beside the oracle and beside full precision."""

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_run
import torch
from torch import Tensor, nn

from olmo.config import FP8Backend, FP8Config, FP8Recipe
from olmo.precision import msamp
from olmo.precision.converters import build_converter, convert_to_float8
from olmo.precision.fp8 import E4M3, DelayedScaling, compute_dequant_scale, quantize

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BACKENDS, RECIPES = list(FP8Backend), list(FP8Recipe)
# Least signal to noise in dB beside float32, of the output and of the gradients: two products one
# after the other with 3 bits of mantissa, and 2 for gradients where there is one scale a tensor.
FORWARD_DB, BACKWARD_DB = 24.0, 17.0


class Two(nn.Module):
    def __init__(self, inputs: int = 64, inner: int = 96, outputs: int = 48) -> None:
        super().__init__()
        self.ff_proj, self.ff_out = nn.Linear(inputs, inner), nn.Linear(inner, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ff_out(torch.relu(self.ff_proj(x)))


def run(config: FP8Config | None, x: Tensor, compiled: bool = False, **sizes: int) -> list[Tensor]:
    """The output and the gradients of x and of each parameter; skips what this torch has not."""
    torch.manual_seed(1)
    model = Two(**sizes)
    if config is not None:
        if why := build_converter(config.backend).find_problem(CPU, config):
            pytest.skip(why)
        convert_to_float8(model, config, CPU)
    x = x.clone().requires_grad_()
    y = (torch.compile(model, fullgraph=True) if compiled else model)(x)
    y.pow(2).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def decibel(found: Tensor, exact: Tensor) -> float:
    noise = (found - exact).pow(2).sum()
    return float(10 * torch.log10(exact.pow(2).sum() / noise))


@pytest.mark.parametrize(("name", "recipe"), list(itertools.product(BACKENDS, RECIPES)))
def test_close_to_full_precision(name: FP8Backend, recipe: FP8Recipe):
    x = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
    found = run(FP8Config(backend=name, recipe=recipe), x)
    forward, *backward = map(decibel, found, run(None, x))
    assert forward > FORWARD_DB and min(backward) > BACKWARD_DB
    assert max(forward, *backward) < 45, "that is more than 8 bits can do: nothing was quantized"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_native_equals_the_oracle_in_odd_sizes(recipe: FP8Recipe, rows: int):
    x = torch.randn(rows, 50, generator=torch.Generator().manual_seed(rows))
    sizes = {"inputs": 50, "inner": 34, "outputs": 7}
    native = run(FP8Config(recipe=recipe), x, **sizes)
    oracle = run(FP8Config(backend="emulate", recipe=recipe), x, **sizes)
    for a, b in zip(native, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Signal to noise beside the oracle in dB, of output and gradients. The same 8 bits leave but the
# rounding of float32 sums. By rows torchao rounds its scales to powers of two and so gets other 8
# bits: what is between it and the oracle is the noise of both.
SAME_BITS_DB, OTHER_BITS_DB = 100.0, 14.0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["native", "torchao"])
@pytest.mark.parametrize("sizes", [(64, 96, 48, 32), (50, 34, 7, 37), (16, 16, 16, 1)], ids=str)
def test_every_backend_agrees_with_the_oracle(name: str, recipe: FP8Recipe, sizes: tuple):
    inputs, inner, outputs, rows = sizes
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
    shape = {"inputs": inputs, "inner": inner, "outputs": outputs}
    oracle = run(FP8Config(backend="emulate", recipe=recipe), x, **shape)
    found = run(FP8Config(backend=name, recipe=recipe), x, **shape)
    rounded = name == "torchao" and recipe is not FP8Recipe.tensorwise
    assert min(map(decibel, found, oracle)) > (OTHER_BITS_DB if rounded else SAME_BITS_DB)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_zeros_and_values_that_are_not_finite(name: FP8Backend, recipe: FP8Recipe):
    config = FP8Config(backend=name, recipe=recipe)
    for tensor in run(config, torch.zeros(16, 64)):
        assert tensor.isfinite().all()
    x = torch.zeros(16, 64)
    for value in (torch.inf, -torch.inf, torch.nan):
        x[3, 5] = value
        output, *gradients = run(config, x)
        assert not output.isfinite().all(), "the finite check must see it"
        assert not all(g.isfinite().all() for g in gradients), "it looks at gradients"
    # What lies far beyond the others is not lost, and drowns them where they share a scale.
    x = torch.ones(16, 64)
    x[3, 5] = 1e6
    assert run(config, x)[0].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["dynamic", "delayed"])
def test_compiled_in_one_graph_it_computes_the_same(scaling: str):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    config = FP8Config(scaling=scaling)
    for a, b in zip(run(config, x, compiled=True), run(config, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_names_and_weights_stay_and_evaluation_is_exact(name: FP8Backend):
    torch.manual_seed(1)
    plain, eight = Two(), Two()
    eight.load_state_dict(plain.state_dict())
    parameters = list(eight.parameters())
    found = convert_to_float8(eight, FP8Config(backend=name), CPU)[1]
    assert found == f"2 linear layers (ff_proj, ff_out) in 8 bits by {name}, tensorwise, " + (
        "dynamic scaling"
    )
    assert list(eight.state_dict()) == list(plain.state_dict())
    assert all(a is b for a, b in zip(eight.parameters(), parameters, strict=True))
    assert all(p.dtype == torch.float32 for p in eight.parameters())
    x = torch.randn(8, 64)
    assert not torch.equal(eight(x), plain(x))
    assert torch.equal(eight.eval()(x), plain(x))


def test_under_autocast_the_result_has_its_type():
    model = Two()
    convert_to_float8(model, FP8Config(), CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(8, 64))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model.ff_proj.weight.grad.dtype == torch.float32


def test_delayed_scaling_goes_by_earlier_steps():
    delayed = DelayedScaling(2, CPU)
    one, four = torch.full((4,), 1.0), torch.full((4,), -4.0)
    assert delayed.scale(0, one, E4M3) == compute_dequant_scale(torch.tensor(1.0), E4M3), (
        "nothing seen yet"
    )
    delayed.step()
    scale = delayed.scale(0, four, E4M3)
    assert scale == compute_dequant_scale(torch.tensor(1.0), E4M3)
    assert (quantize(four, scale, E4M3).float() * scale == -1.0).all(), "cut, not infinite"
    delayed.step()
    assert delayed.scale(0, one, E4M3) == compute_dequant_scale(torch.tensor(4.0), E4M3)
    delayed.step()
    delayed.step()
    assert delayed.scale(0, four, E4M3) == compute_dequant_scale(torch.tensor(1.0), E4M3), (
        "two steps back"
    )
    assert delayed.state_dict() == {}


def test_only_configured_layers_are_converted():
    config = FP8Config(modules=["ff_out"])
    model = Two()
    assert convert_to_float8(model, config, CPU)[1].startswith("1 linear layers (ff_out)")
    x = torch.randn(8, 64)
    assert torch.equal(
        model.ff_proj(x), nn.functional.linear(x, model.ff_proj.weight, model.ff_proj.bias)
    )
    with pytest.raises(ValueError, match=r"expected some of ff_out, ff_proj, found attn_out"):
        convert_to_float8(Two(), FP8Config(modules=["ff_out", "attn_out"]), CPU)


def test_find_problem(monkeypatch: pytest.MonkeyPatch):
    delayed = FP8Config(scaling="delayed")
    for name in BACKENDS:
        assert build_converter(name).find_problem(CPU, FP8Config(backend=name)) is None
    rowwise = FP8Config(scaling="delayed", recipe="rowwise")
    assert "recipe: tensorwise" in (
        build_converter(FP8Backend.native).find_problem(CPU, rowwise) or ""
    )
    assert "scaling: dynamic" in (
        build_converter(FP8Backend.torchao).find_problem(CPU, delayed) or ""
    )

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("not built")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_scaled_mm", refuse)
        why = build_converter(FP8Backend.native).find_problem(CPU, FP8Config())
        assert why and "not built" in why and "emulate" in why
        with pytest.raises(
            ValueError, match=r"fp8.backend: native is not available: torch .*not built"
        ):
            convert_to_float8(Two(), FP8Config(), CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    why = build_converter(FP8Backend.torchao).find_problem(CPU, FP8Config(backend="torchao"))
    assert why == "the package torchao is missing: uv pip install torchao"


@pytest.mark.parametrize("name", ["native", "torchao"])
def test_the_trainer_refuses_what_this_torch_lacks(tmp_path: Path, name: str):
    """In 2.11 torch's product with a scale for each row is for GPUs alone, in 2.13 it is not."""
    by_rows = {"backend": name, "recipe": "rowwise"}
    why = build_converter(FP8Backend(name)).find_problem(CPU, FP8Config(**by_rows))
    if why is None:
        assert small_run.run(tmp_path, fp8=by_rows, max_duration=1) == 0
        return
    assert tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), why
    assert "per-tensor scaling" in why and "set fp8.recipe: tensorwise" in why
    with pytest.raises(ValueError, match=f"fp8.backend: {name} is not available: {re.escape(why)}"):
        small_run.run(tmp_path, fp8=by_rows)


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["dynamic", "delayed"])
def test_training_in_8_bits_ends_where_bf16_does(tmp_path: Path, scaling: str):
    losses = {}
    every = {"modules": ["att_proj", "attn_out", "ff_proj", "ff_out"], "scaling": scaling}
    for name, fp8 in {"bf16": None, "fp8": every}.items():
        changes = {"max_duration": 200, "save_interval_unsharded": 200, "eval_interval": 200}
        model = {"d_model": 64, "n_heads": 2}
        ran = small_run.run(
            tmp_path,
            precision="amp_bf16",
            fp8=fp8,
            model=model,
            save_folder=str(tmp_path / name),
            optimizer={"learning_rate": 3e-3},
            **changes,
        )
        assert ran == 0
        rows = small_run.metrics(tmp_path / name)
        name_of_loss = "train/CrossEntropyLoss"
        losses[name] = [row[name_of_loss] for row in rows if name_of_loss in row]
    ends = {name: sum(values[-20:]) / 20 for name, values in losses.items()}
    assert ends["bf16"] < 0.8 * losses["bf16"][0], "there was something to learn"
    assert losses["fp8"] != losses["bf16"]
    assert ends["fp8"] == pytest.approx(ends["bf16"], rel=0.01)


def test_find_msamp_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    adamw = small_run.config(tmp_path, use_msamp=True)
    lion = small_run.config(tmp_path, use_msamp=True, optimizer={"name": "lionw"})
    remedy = "optimizer.packed_state: true"
    assert (
        "AdamW only, not lionw" in (why := msamp.find_msamp_problem(lion) or "") and remedy in why
    )
    assert "the package msamp" in (why := msamp.find_msamp_problem(adamw) or "") and remedy in why
    assert (ROOT / "envs" / "msamp.txt").exists() and "envs/msamp.txt" in why
    with pytest.raises(ValueError, match="use_msamp: the package msamp"):
        small_run.run(tmp_path, use_msamp=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert f"needs torch 2.1, and this is torch {torch.__version__}" in (
        msamp.find_msamp_problem(adamw) or ""
    )
    monkeypatch.setattr(torch, "__version__", "2.1.2")
    assert "needs a CUDA GPU" in (msamp.find_msamp_problem(adamw) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert msamp.find_msamp_problem(adamw) is None


def test_how_msamp_is_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """It needs another torch; its place is taken by a stand-in that is as strict as its source."""
    clipped: list[float] = []

    def initialize(model: nn.Module, optimizer: object, opt_level: str) -> tuple:
        assert type(optimizer) is torch.optim.AdamW and opt_level == "O2"
        return model, optimizer

    def clip_grad_norm_(parameters: list, max_norm: float) -> Tensor:
        clipped.append(max_norm)
        return nn.utils.get_total_norm([p.grad for p in parameters])

    stand_in = SimpleNamespace(initialize=initialize, clip_grad_norm_=clip_grad_norm_)
    monkeypatch.setitem(sys.modules, "msamp", stand_in)
    monkeypatch.setattr(msamp, "find_msamp_problem", lambda cfg: None)
    for name in ("ours", "msamp"):
        where = {"save_folder": str(tmp_path / name), "use_msamp": name == "msamp"}
        assert small_run.run(tmp_path, max_grad_norm=1e9, **where) == 0
    assert clipped == [1e9] * 10
    ours, theirs = (small_run.metrics(tmp_path / name) for name in ("ours", "msamp"))
    key = "train/CrossEntropyLoss"
    assert [row.get(key) for row in theirs] == pytest.approx([row.get(key) for row in ours])
    saved = small_run.state(tmp_path / "msamp")["files"]
    assert saved["optim.pt"]["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
