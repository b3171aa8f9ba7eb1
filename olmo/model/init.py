"""How weights start: OLMo's init functions and its order of draws.

Every draw is float32 on the CPU and then goes to where the weight lives, so that one seed gives
one model on every device, and a model built on `meta` and materialised later the same one too.
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
from olmo.model.product import linear


class Role(Enum):
    """What a weight does, which is what its spread depends on."""

    embedding = "token embedding"
    position = "learned position embedding"
    head = "output projection to the vocabulary"
    into = "projection from the residual stream"
    attention_out = "attention's projection to the residual stream"
    feed_forward_out = "feed-forward's projection to the residual stream"


def spread(
    config: ModelConfig, role: Role, fan_in: int, layer: int = 0
) -> tuple[float, float | None]:
    """Standard deviation of a weight, and at how many of them the normal is cut (None: nowhere).

    `fan_in` is the width of the weight's input (d_model for embeddings), `layer` counts from 0.

    - normal: init_std everywhere.
    - mitchell: 1/sqrt(fan_in), what goes out shrinking with depth: 1/sqrt(2 fan_in (layer + 1)).
    - full_megatron: init_std, what goes out 1/sqrt(2 n_layers) of it (metaseq, Llama 2).
    - fan_in: 1/sqrt(fan_in); kaiming_normal: sqrt(2/fan_in) (He et al. 2015, arXiv:1502.01852).
      OLMo declares these two and does not implement them.
    """
    kind = InitFnType(config.init_fn)
    goes_out = role in (Role.attention_out, Role.feed_forward_out)
    cut = config.init_cutoff_factor
    if kind in (InitFnType.mitchell, InitFnType.full_megatron):
        cut = cut or 3.0
    if role is Role.embedding and config.emb_init_std:
        return config.emb_init_std, cut

    if kind is InitFnType.normal:
        std = config.init_std
    elif kind is InitFnType.mitchell:
        std = 1 / math.sqrt(2 * fan_in * (layer + 1) if goes_out else fan_in)
    elif kind is InitFnType.full_megatron:
        std = config.init_std
        if goes_out:
            std /= math.sqrt(2.0 * config.n_layers)
        elif role is Role.head:
            std = 1 / math.sqrt(fan_in)
        elif role is Role.embedding and config.scale_emb_init:
            std *= math.sqrt(config.d_model)
    elif kind is InitFnType.fan_in:
        std = 1 / math.sqrt(fan_in)
    else:
        std = math.sqrt(2 / fan_in)
    return std, cut


@torch.no_grad()
def init_normal(
    module: nn.Linear | nn.Embedding, std: float, init_cutoff_factor: float | None = None
) -> None:
    """Draw the weight from N(0, std²), cut at ± init_cutoff_factor * std if given; bias to zero."""
    weight = module.weight
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    draw: Tensor = (
        weight if on_cpu else torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    )
    if init_cutoff_factor is None:
        nn.init.normal_(draw, std=std)
    else:
        cut = init_cutoff_factor * std
        nn.init.trunc_normal_(draw, std=std, a=-cut, b=cut)
    if not on_cpu:
        weight.copy_(draw)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def reset(
    module: nn.Linear | nn.Embedding, config: ModelConfig, role: Role, layer: int = 0
) -> None:
    """Draw `module` anew as config.init_fn says."""
    fan_in = module.in_features if isinstance(module, nn.Linear) else module.embedding_dim
    std, cut = spread(config, role, fan_in, layer)
    init_normal(module, std, cut)


_first_filling: ContextVar[bool] = ContextVar("_first_filling", default=True)


@contextmanager
def unfilled() -> Iterator[None]:
    """Build layers without drawing anything, for weights that come from elsewhere."""
    token = _first_filling.set(False)
    try:
        yield
    finally:
        _first_filling.reset(token)


class Linear(nn.Linear):
    """nn.Linear that takes the same numbers from the CPU's generator wherever it is built.

    PyTorch draws a first filling when a layer is built. It is overwritten, but it moves the
    generator on, and with it every weight that OLMo draws after the same seed.
    """

    def reset_parameters(self) -> None:
        if not _first_filling.get():
            return
        if self.weight.device.type == "cpu":
            super().reset_parameters()
        else:
            nn.Linear(self.in_features, self.out_features, self.bias is not None, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding that takes the same numbers from the CPU's generator wherever it is built."""

    def reset_parameters(self) -> None:
        if not _first_filling.get():
            return
        if self.weight.device.type == "cpu":
            super().reset_parameters()
        else:
            nn.Embedding(self.num_embeddings, self.embedding_dim, device="cpu")
