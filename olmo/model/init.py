"""Weight initialisation: OLMo's init functions (olmo/initialization.py), and layers whose
construction draws the same random numbers on every device.

Weights are drawn in float32 on the CPU and then copied to their device, so that one seed gives the
same model on every device, and also when it is built on `meta` and materialised later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum

import torch
from torch import Tensor, nn

from olmo.config import InitFnType, ModelConfig
from olmo.model.linear import linear


class WeightRole(Enum):
    """What a weight is used for; its standard deviation depends on it."""

    embedding = "token embedding"
    position = "learned position embedding"
    head = "output projection to the vocabulary"
    input = "projection from the residual stream"
    attention_out = "attention's projection to the residual stream"
    feed_forward_out = "feed-forward's projection to the residual stream"


def weight_std(
    config: ModelConfig, role: WeightRole, fan_in: int, layer: int = 0
) -> tuple[float, float | None]:
    """Standard deviation of a weight, and the multiple of it at which the normal distribution is
    truncated (None: it is not).

    Output projections are those that write to the residual stream.

    - normal: init_std for all weights.
    - mitchell: 1/sqrt(fan_in); output projections 1/sqrt(2 fan_in (layer + 1)).
    - full_megatron: init_std; output projections init_std/sqrt(2 n_layers) (metaseq, Llama 2).
    - fan_in: 1/sqrt(fan_in); kaiming_normal: sqrt(2/fan_in) (He et al. 2015, arXiv:1502.01852).
      OLMo declares these two and does not implement them.

    Args:
        fan_in: width of the weight's input; d_model for embeddings.
        layer: index of the block, from 0.
    """
    init_fn = InitFnType(config.init_fn)
    is_output = role in (WeightRole.attention_out, WeightRole.feed_forward_out)
    cutoff = config.init_cutoff_factor
    if init_fn in (InitFnType.mitchell, InitFnType.full_megatron):
        cutoff = cutoff or 3.0
    if role is WeightRole.embedding and config.emb_init_std:
        return config.emb_init_std, cutoff

    if init_fn is InitFnType.normal:
        std = config.init_std
    elif init_fn is InitFnType.mitchell:
        std = 1 / math.sqrt(2 * fan_in * (layer + 1) if is_output else fan_in)
    elif init_fn is InitFnType.full_megatron:
        std = config.init_std
        if is_output:
            std /= math.sqrt(2.0 * config.n_layers)
        elif role is WeightRole.head:
            std = 1 / math.sqrt(fan_in)
        elif role is WeightRole.embedding and config.scale_emb_init:
            std *= math.sqrt(config.d_model)
    elif init_fn is InitFnType.fan_in:
        std = 1 / math.sqrt(fan_in)
    else:
        std = math.sqrt(2 / fan_in)
    return std, cutoff


@torch.no_grad()
def init_normal(
    module: nn.Linear | nn.Embedding, std: float, init_cutoff_factor: float | None = None
) -> None:
    """Draw the weight from N(0, std²), truncated at ±init_cutoff_factor * std; zero the bias."""
    weight = module.weight
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    draw: Tensor = (
        weight if on_cpu else torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    )
    if init_cutoff_factor is None:
        nn.init.normal_(draw, std=std)
    else:
        limit = init_cutoff_factor * std
        nn.init.trunc_normal_(draw, std=std, a=-limit, b=limit)
    if not on_cpu:
        weight.copy_(draw)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def init_weights(
    module: nn.Linear | nn.Embedding, config: ModelConfig, role: WeightRole, layer: int = 0
) -> None:
    """Draw the weights of `module` as config.init_fn says."""
    fan_in = module.in_features if isinstance(module, nn.Linear) else module.embedding_dim
    std, cutoff = weight_std(config, role, fan_in, layer)
    init_normal(module, std, cutoff)


_draws_at_build: ContextVar[bool] = ContextVar("_draws_at_build", default=True)


@contextmanager
def skip_init() -> Iterator[None]:
    """Build layers without drawing their weights, which will be loaded."""
    token = _draws_at_build.set(False)
    try:
        yield
    finally:
        _draws_at_build.reset(token)


class Linear(nn.Linear):
    """nn.Linear that advances the CPU's random generator by the same amount on every device.

    PyTorch draws weights when a layer is built. They are overwritten later, but drawing them
    advances the generator, and so changes all weights that OLMo draws after the same seed.
    """

    def reset_parameters(self) -> None:
        if not _draws_at_build.get():
            return
        if self.weight.device.type == "cpu":
            super().reset_parameters()
        else:
            nn.Linear(self.in_features, self.out_features, self.bias is not None, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding that advances the CPU's random generator by the same amount on every device."""

    def reset_parameters(self) -> None:
        if not _draws_at_build.get():
            return
        if self.weight.device.type == "cpu":
            super().reset_parameters()
        else:
            nn.Embedding(self.num_embeddings, self.embedding_dim, device="cpu")
