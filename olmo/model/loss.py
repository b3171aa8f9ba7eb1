"""Cross-entropy straight from the hidden states, without ever holding all logits.

The logits are the largest tensor of a step: B*T*V, 6.6 GB in float32 for 32,768 tokens and 50,304
ids, once for themselves and once for their gradient. Here a chunk of rows at a time is projected,
its loss and its gradient computed, and forgotten. The gradient is there after the forward pass,
so that the projection is not computed again, as it would be by recomputing chunks.

Shapes: N labels, d d_model, V rows of the head, C chunk of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100


class LossSums(NamedTuple):
    """Sums over the labels that count, float32 scalars."""

    total: Tensor
    """ce + z, the only one to differentiate."""

    ce: Tensor
    """Cross-entropy, in nats."""

    z: Tensor
    """z_multiplier * log(sum exp(logits))² (PaLM, Chowdhery et al. 2022), 0 without one."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    z_multiplier: float = 0.0,
    chunk: int | None = None,
) -> LossSums:
    """The losses of logits = scale * (x @ weight.T + bias).

    Args:
        x: (N, d).
        weight: (V, d).
        labels: (N,), int64; -100 does not count.
        bias: (V,).
        chunk: rows at a time; by default as many as make logits of 8 MiB on a CPU, whose caches
            they then fit, and of 512 MiB elsewhere.

    The product runs in autocast's type where autocast is on, all else in float32.
    """
    if chunk is None:
        limit = (8 if x.device.type == "cpu" else 512) * 2**20
        chunk = max(64, limit // (4 * weight.shape[0]))
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        total, z = _LinearCrossEntropy.apply(
            x, weight, bias, labels, dtype, scale, z_multiplier, chunk
        )
    # Without a z-loss nothing is subtracted: inductor would return one tensor for both, which
    # then cannot be differentiated.
    ce = total.detach() - z.detach() if z_multiplier else total.detach()
    return LossSums(total, ce, z.detach())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        dtype: torch.dtype,
        scale: float,
        z_multiplier: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        learns = any(ctx.needs_input_grad)
        w = weight.to(dtype)
        ce = torch.zeros((), dtype=torch.float32, device=x.device)
        z = torch.zeros_like(ce)
        dx: list[Tensor] = []
        dw: Tensor | None = None
        db: Tensor | None = None
        for rows, its_labels in zip(x.split(chunk), labels.split(chunk), strict=True):
            rows = rows.to(dtype)
            logits = (rows @ w.T).float()  # (C, V)
            if bias is not None:
                logits = logits + bias.float()
            if scale != 1.0:
                logits = logits * scale
            counts = its_labels != IGNORE
            places = its_labels.clamp(min=0)[:, None]
            lse = logits.logsumexp(dim=-1)  # (C,)
            ce = ce + ((lse - logits.gather(1, places)[:, 0]) * counts).sum()
            slope = counts.float()
            if z_multiplier:
                z = z + z_multiplier * (lse.square() * counts).sum()
                slope = slope * (1 + 2 * z_multiplier * lse)
            if not learns:
                continue
            ids = torch.arange(logits.shape[1], device=x.device)
            hit = (ids == places) & counts[:, None]
            dlogits = (logits - lse[:, None]).exp() * slope[:, None] - hit.float()
            if bias is not None:
                part = dlogits.sum(0) * scale
                db = part if db is None else db + part
            dlogits = (dlogits * scale).to(dtype)
            dx.append((dlogits @ w).to(x.dtype))
            product = (dlogits.T @ rows).float()  # (V, d)
            dw = product if dw is None else dw + product
        if learns:
            dw = None if dw is None else dw.to(weight.dtype)
            ctx.save_for_backward(torch.cat(dx), dw, db)
        return ce + z, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = ctx.saved_tensors
        rest = (None, None, None, None, None)
        return dx * grad, dw * grad, None if db is None else db * grad, *rest
