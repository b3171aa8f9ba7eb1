"""Positions: rotary embeddings (RoPE) and the linear biases of ALiBi, with their cached tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from olmo.config import ModelConfig


class BufferCache(dict[str, Tensor]):
    """Tables that all blocks share and that are no part of the model's state.

    They are no module buffers, because those follow `model.to(torch.bfloat16)` and would lose the
    float32 that the positions need. The model moves them when it is moved itself. A compiled
    forward pass stores nothing here: the next step would find another table than the one that it
    was compiled for, and compile the whole model again.
    """

    def on(self, device: torch.device, name: str) -> Tensor | None:
        """The table `name` on `device`."""
        table = self.get(name)
        if table is not None and table.device != device:
            table = table.to(device)
            self.store(name, table)
        return table

    def store(self, name: str, table: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self[name] = table

    def move(self, device: torch.device) -> None:
        """Move all tables to `device`."""
        for name, table in self.items():
            self[name] = table.to(device)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated as in GPT-NeoX.

    The tables are float32, (max_sequence_length, head size), computed on the CPU so that every
    device rotates by the same numbers. The first half of the sines has its sign turned: it is what
    the second half of a vector, negated, would be multiplied by, and the product is the same.
    """

    def __init__(self, config: ModelConfig, cache: BufferCache) -> None:
        super().__init__()
        self.head_size = config.d_model // config.n_heads
        self.theta = config.rope_theta
        self.full_precision = config.rope_full_precision
        self.length = config.max_sequence_length
        self.cache = cache
        if "rope_sin" not in cache:
            self._compute(self.length, torch.device("cpu"))

    def _compute(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.head_size, 2, dtype=torch.float32, device="cpu")
        frequencies = 1.0 / (self.theta ** (exponents / self.head_size))
        angles = torch.arange(length, dtype=torch.float32, device="cpu")[:, None] * frequencies
        angles = torch.cat((angles, angles), dim=-1)  # (length, D)
        sin, cos = angles.sin().to(device), angles.cos().to(device)
        sin[:, : self.head_size // 2].neg_()
        self.cache.store("rope_sin", sin)
        self.cache.store("rope_cos", cos)
        return sin, cos

    def tables(self, start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Signed sin, and cos, of positions start..end-1, each (end - start, D)."""
        sin, cos = self.cache.on(device, "rope_sin"), self.cache.on(device, "rope_cos")
        if sin is None or cos is None or sin.shape[0] < end:
            sin, cos = self._compute(max(end, self.length), device)
        return sin[start:end], cos[start:end]

    def forward(self, q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Rotate q (B, H, T, D) and k (B, H_kv, T, D), whose first position is `start`."""
        with torch.autocast(q.device.type, enabled=False):
            sin, cos = self.tables(start, start + q.shape[-2], q.device)
            return self._rotate(q, sin, cos), self._rotate(k, sin, cos)

    def _rotate(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        wide = x.float() if self.full_precision else x
        sin, cos = sin.to(wide.dtype), cos.to(wide.dtype)
        first, second = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat((second, first), dim=-1) * sin).to(x.dtype)


def alibi_bias(
    length: int, n_heads: int, bias_max: float, device: torch.device | str = "cpu"
) -> Tensor:
    """-slope * |i - j| to add to the scores, (1, n_heads, length, length).

    ALiBi (Press et al. 2022, arXiv:2108.12409), with slopes 2 ** -(h * bias_max / n_heads).
    """
    positions = torch.arange(length, dtype=torch.float32, device=device)
    distance = (positions[None, :] - positions[:, None]).abs()  # (T, T)
    heads = torch.arange(1, n_heads + 1, dtype=torch.float32, device=device)
    slopes = 1.0 / 2 ** (heads * (bias_max / n_heads))  # (H,)
    return -distance[None, None] * slopes[None, :, None, None]
