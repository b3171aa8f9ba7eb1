"""Converts linear layers to compute in 8 bits, by one of three backends, where it is available.

    native    torch's scaled product (torch._scaled_mm), nothing more to install
    torchao   torchao's Float8Linear
    emulate   float32 products of the quantized values: the reference for tests

Parameters, optimizer and checkpoints are the same with each of them and without. A converted layer
computes in 8 bits in training mode only; in evaluation mode it computes as before.
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
from olmo.precision.fp8 import (
    E4M3,
    DelayedScaling,
    ProductSettings,
    emulated_mm,
    float8_linear,
    scaled_mm,
)


class Float8Converter(Protocol):
    """The code behind a name in `fp8.backend`."""

    def find_problem(self, device: torch.device, config: FP8Config) -> str | None:
        """None where it works, else one sentence with the remedy."""
        ...

    def convert(self, model: nn.Module, config: FP8Config) -> None:
        """Make the layers that `config.modules` names compute in 8 bits."""
        ...

    def after_step(self) -> None:
        """Call once a step, after its last backward."""
        ...


class ForwardConverter:
    """`native` and `emulate`: replaces a layer's forward; the layer and its parameters stay."""

    def __init__(self, settings: ProductSettings) -> None:
        self.settings = settings
        self.delayed: list[DelayedScaling] = []

    def find_problem(self, device: torch.device, config: FP8Config) -> str | None:
        if config.scaling is FP8Scaling.delayed and config.recipe is not FP8Recipe.tensorwise:
            return "delayed scaling needs one scale per tensor; set fp8.recipe: tensorwise"
        if self.settings.product is emulated_mm:
            return None
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return (
                f"{torch.cuda.get_device_name(device)} has no 8-bit products (they need an Ada or "
                "Hopper GPU); leave fp8 out"
            )
        rowwise = config.recipe is not FP8Recipe.tensorwise
        try:  # a small product: which scales a build of torch supports is not documented
            a = torch.ones(16, 16, device=device).to(E4M3)
            scale = torch.ones((16, 1) if rowwise else (), device=device)
            scaled_mm(a, scale, a, scale.t() if rowwise else scale, torch.bfloat16)
        except (RuntimeError, NotImplementedError) as error:
            reason = (
                str(error).splitlines()[0].rpartition("report a bug to PyTorch. ")[2].rstrip(".")
            )
            remedy = "fp8.recipe: tensorwise" if rowwise else "fp8.backend: emulate"
            return f"torch {torch.__version__} on {device.type}: {reason}; set {remedy}"
        return None

    def convert(self, model: nn.Module, config: FP8Config) -> None:
        settings = replace(
            self.settings,
            rowwise=config.recipe is not FP8Recipe.tensorwise,
            exact_weight_gradient=config.recipe is FP8Recipe.rowwise_with_gw_hp,
        )
        for _, layer in select_layers(model, config):
            delayed = None
            if config.scaling is FP8Scaling.delayed:
                delayed = DelayedScaling(config.history, layer.weight.device)
                self.delayed.append(delayed)
            forward = partial(_forward, layer, settings, delayed)
            layer.forward = forward  # type: ignore[method-assign]

    def after_step(self) -> None:
        for delayed in self.delayed:
            delayed.step()


def _forward(
    layer: nn.Linear, settings: ProductSettings, delayed: DelayedScaling | None, x: Tensor
) -> Tensor:
    if not layer.training:
        return F.linear(x, layer.weight, layer.bias)
    return float8_linear(x, layer.weight, layer.bias, settings, delayed)


class TorchAOConverter:
    """`torchao`: replaces a layer by torchao's, with the same parameters under the same names."""

    def find_problem(self, device: torch.device, config: FP8Config) -> str | None:
        if importlib.util.find_spec("torchao") is None:
            return "the package torchao is missing: uv pip install torchao"
        if config.scaling is not FP8Scaling.dynamic:
            return "torchao measures each tensor; set fp8.scaling: dynamic, or fp8.backend: native"
        return build_converter(FP8Backend.native).find_problem(device, config)

    def convert(self, model: nn.Module, config: FP8Config) -> None:
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear

        settings = Float8LinearConfig.from_recipe_name(config.recipe.value)
        for name, layer in select_layers(model, config):
            parent, _, child = name.rpartition(".")
            converted = Float8Linear.from_float(layer, settings)
            converted.forward = partial(_forward_in_training, converted, converted.forward)
            setattr(model.get_submodule(parent), child, converted)

    def after_step(self) -> None:
        pass


def _forward_in_training(
    layer: nn.Linear, forward: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    return forward(x) if layer.training else F.linear(x, layer.weight, layer.bias)


def select_layers(model: nn.Module, config: FP8Config) -> list[tuple[str, nn.Linear]]:
    """Names and layers to convert, in the model's order.

    Raises:
        ValueError: config.modules has a name that no linear layer of the model has.
    """
    linear = [(n, module) for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    available = {name.rpartition(".")[2] for name, _ in linear}
    if unknown := sorted(set(config.modules) - available):
        raise ValueError(
            f"fp8.modules: expected some of {', '.join(sorted(available))}, found {unknown[0]}"
        )
    return [(name, layer) for name, layer in linear if name.rpartition(".")[2] in config.modules]


def build_converter(name: FP8Backend) -> Float8Converter:
    """The converter of a backend, whether or not it works here."""
    if name is FP8Backend.torchao:
        return TorchAOConverter()
    return ForwardConverter(
        ProductSettings(scaled_mm if name is FP8Backend.native else emulated_mm)
    )


def get_converter(config: FP8Config, device: torch.device) -> Float8Converter:
    """The converter of the config's backend.

    Raises:
        ValueError: it is not available here; with the reason and the remedy.
    """
    converter = build_converter(config.backend)
    if problem := converter.find_problem(device, config):
        raise ValueError(f"fp8.backend: {config.backend} is not available: {problem}")
    return converter


def convert_to_float8(
    model: nn.Module, config: FP8Config, device: torch.device
) -> tuple[Float8Converter, str]:
    """Convert the layers that config.modules names. Returns the converter, whose `after_step` must
    be called, and a description for the log.

    Raises:
        ValueError: as `get_converter` and `select_layers`.
    """
    converter = get_converter(config, device)
    n_layers = len(select_layers(model, config))
    converter.convert(model, config)
    return converter, (
        f"{n_layers} linear layers ({', '.join(config.modules)}) in 8 bits by {config.backend}, "
        f"{config.recipe}, {config.scaling} scaling"
    )
