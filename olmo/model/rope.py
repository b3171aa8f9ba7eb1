"""Position encodings: rotary embeddings (RoPE) and ALiBi's linear biases, with cached tables.

Shapes: B batch, H heads, H_kv heads of keys and values, T positions, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from olmo.config import ModelConfig


class BufferCache(dict[str, Tensor]):
    """Tables that all blocks share and that are not in the model's state_dict.

    They are not module buffers: `model.to(torch.bfloat16)` would cast those, and positions need
    float32. `OLMo._apply` moves them with the model. A compiled forward pass stores nothing here:
    the next step would find another tensor than it was compiled with, and recompile the model.
    """

    def get_on(self, device: torch.device, name: str) -> Tensor | None:
        """The table `name`, on `device`, or None."""
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
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), as in GPT-NeoX: dimension i is
    rotated with dimension i + D/2.

        rotate(x) = x * cos + (-second half, first half) * sin
                  = x * cos + (second half, first half) * (-sin, sin)

    The second form saves a negation of half of x; so the first half of the sine table is stored
    negated. Both tables are float32, (max_sequence_length, D), and computed on the CPU, so they are
    the same on every device.
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
        """Signed sines and cosines of positions start..end-1, each (end - start, D)."""
        sin, cos = self.cache.get_on(device, "rope_sin"), self.cache.get_on(device, "rope_cos")
        if sin is None or cos is None or sin.shape[0] < end:
            sin, cos = self._compute(max(end, self.length), device)
        return sin[start:end], cos[start:end]

    def forward(self, q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Rotate q (B, H, T, D) and k (B, H_kv, T, D), from position `start` on."""
        with torch.autocast(q.device.type, enabled=False):
            sin, cos = self.tables(start, start + q.shape[-2], q.device)
            return self._rotate(q, sin, cos), self._rotate(k, sin, cos)

    def _rotate(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        x_full = x.float() if self.full_precision else x
        sin, cos = sin.to(x_full.dtype), cos.to(x_full.dtype)
        first, second = x_full.chunk(2, dim=-1)
        return (x_full * cos + torch.cat((second, first), dim=-1) * sin).to(x.dtype)


def alibi_bias(
    length: int, n_heads: int, bias_max: float, device: torch.device | str = "cpu"
) -> Tensor:
    """ALiBi (Press et al. 2022, arXiv:2108.12409): -slope * |i - j|, to add to the scores.

    The slope of head h, from 1, is 2 ** -(h * bias_max / n_heads). (1, H, T, T), T is `length`.
    """
    positions = torch.arange(length, dtype=torch.float32, device=device)
    distance = (positions[None, :] - positions[:, None]).abs()  # (T, T)
    heads = torch.arange(1, n_heads + 1, dtype=torch.float32, device=device)
    slopes = 1.0 / 2 ** (heads * (bias_max / n_heads))  # (H,)
    return -distance[None, None] * slopes[None, :, None, None]
