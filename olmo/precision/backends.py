"""The ways to train in 8 bits, behind one interface, and why one is not available here.

    native    torch's scaled product, nothing more to install
    torchao   torchao's Float8Linear
    emulate   float32 products of what the 8 bits stand for: the oracle, for tests

Whatever the backend, weights, optimizer and checkpoints stay what they are without it. A layer
that is being evaluated computes as if there were none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo.config import FP8Backend, FP8Config, FP8Recipe, FP8Scaling
from olmo.precision.fp8 import E4M3, Delayed, Recipe, emulated, linear, scaled


class Backend(Protocol):
    def why_not(self, device: torch.device, config: FP8Config) -> str | None:
        """None where it works, else one sentence with the remedy."""
        ...

    def prepare(self, model: nn.Module, config: FP8Config) -> None:
        """Make the layers that `config.modules` names compute in 8 bits."""
        ...

    def after_step(self) -> None:
        """Once a step, when its gradients are there."""
        ...


class Patched:
    """`native` and `emulate`: a layer's forward is replaced, its parameters stay its own."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.delayed: list[Delayed] = []

    def why_not(self, device: torch.device, config: FP8Config) -> str | None:
        if config.scaling is FP8Scaling.delayed and config.recipe is not FP8Recipe.tensorwise:
            return "delayed scaling is for one scale a tensor; set fp8.recipe: tensorwise"
        if self.recipe.product is emulated:
            return None
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return (
                f"{torch.cuda.get_device_name(device)} has no 8-bit products (it takes an Ada or "
                "Hopper GPU); leave fp8 out"
            )
        by_rows = config.recipe is not FP8Recipe.tensorwise
        try:  # what this build of torch can do is best asked by doing it
            a = torch.ones(16, 16, device=device).to(E4M3)
            scale = torch.ones((16, 1) if by_rows else (), device=device)
            scaled(a, scale, a, scale.t() if by_rows else scale, torch.bfloat16)
        except (RuntimeError, NotImplementedError) as error:
            reason = (
                str(error).splitlines()[0].rpartition("report a bug to PyTorch. ")[2].rstrip(".")
            )
            remedy = "fp8.recipe: tensorwise" if by_rows else "fp8.backend: emulate"
            return f"torch {torch.__version__} on {device.type}: {reason}; set {remedy}"
        return None

    def prepare(self, model: nn.Module, config: FP8Config) -> None:
        recipe = replace(
            self.recipe,
            rowwise=config.recipe is not FP8Recipe.tensorwise,
            exact_weight_gradient=config.recipe is FP8Recipe.rowwise_with_gw_hp,
        )
        for layer in chosen(model, config):
            delayed = None
            if config.scaling is FP8Scaling.delayed:
                delayed = Delayed(config.history, layer.weight.device)
                self.delayed.append(delayed)
            layer.forward = partial(_forward, layer, recipe, delayed)  # type: ignore[method-assign]

    def after_step(self) -> None:
        for delayed in self.delayed:
            delayed.step()


def _forward(layer: nn.Linear, recipe: Recipe, delayed: Delayed | None, x: Tensor) -> Tensor:
    if not layer.training:
        return F.linear(x, layer.weight, layer.bias)
    return linear(x, layer.weight, layer.bias, recipe, delayed)


class TorchAO:
    """torchao's layers take the place of ours; their parameters, and names, are the same."""

    def why_not(self, device: torch.device, config: FP8Config) -> str | None:
        if importlib.util.find_spec("torchao") is None:
            return "the package torchao is missing: pip install torchao"
        if config.scaling is not FP8Scaling.dynamic:
            return "torchao measures each tensor; set fp8.scaling: dynamic, or fp8.backend: native"
        return Patched(Recipe(scaled)).why_not(device, config)

    def prepare(self, model: nn.Module, config: FP8Config) -> None:
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear

        settings = Float8LinearConfig.from_recipe_name(config.recipe.value)
        for name, layer in list(named(model, config)):
            parent = model.get_submodule(name.rpartition(".")[0])
            theirs = Float8Linear.from_float(layer, settings)
            in_eight_bits = theirs.forward
            theirs.forward = partial(_training_only, theirs, in_eight_bits)
            setattr(parent, name.rpartition(".")[2], theirs)

    def after_step(self) -> None:
        pass


def _training_only(layer: nn.Linear, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(x) if layer.training else F.linear(x, layer.weight, layer.bias)


def named(model: nn.Module, config: FP8Config) -> list[tuple[str, nn.Linear]]:
    """The layers that compute in 8 bits, in the model's order, by their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.modules
    ]


def chosen(model: nn.Module, config: FP8Config) -> list[nn.Linear]:
    """As `named`; ValueError where there are none, or fp8.modules names what is not there."""
    found = named(model, config)
    there = {name.rpartition(".")[2] for name, _ in found}
    if missing := sorted(set(config.modules) - there):
        kinds = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        raise ValueError(
            f"fp8.modules: expected some of {', '.join(sorted(kinds))}, found {missing[0]}"
        )
    return [layer for _, layer in found]


def backend(name: FP8Backend) -> Backend:
    kinds: dict[FP8Backend, Callable[[], Backend]] = {
        FP8Backend.native: lambda: Patched(Recipe(scaled)),
        FP8Backend.emulate: lambda: Patched(Recipe(emulated)),
        FP8Backend.torchao: TorchAO,
    }
    return kinds[name]()


def available(config: FP8Config, device: torch.device) -> Backend:
    """The backend that the config names; ValueError with the reason where it is not available."""
    found = backend(config.backend)
    if problem := found.why_not(device, config):
        raise ValueError(f"fp8.backend: {config.backend} is not available: {problem}")
    return found


def prepare(model: nn.Module, config: FP8Config, device: torch.device) -> tuple[Backend, str]:
    """Make a model train in 8 bits: the backend, and what was done, in words.

    Raises:
        ValueError: as `available`, or `config.modules` names layers that the model does not have.
    """
    found = available(config, device)
    layers = len(chosen(model, config))
    found.prepare(model, config)
    return found, (
        f"{layers} linear layers ({', '.join(config.modules)}) in 8 bits by {config.backend}, "
        f"{config.recipe}, {config.scaling} scaling"
    )
