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
import torch.nn.functional as F
from torch import Tensor

from olmo.config import TrainConfig
from olmo.config.enums import CrossEntropy as CrossEntropy
from olmo.model.product import by_onednn

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
        chunk: rows at a time; by default as many as make logits of 16 MiB on a CPU, and as many
            as fill a GPU.

    The product runs in autocast's type where autocast is on, all else in float32.
    """
    chunk = chunk or _rows(x, weight)
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


def _rows(x: Tensor, weight: Tensor) -> int:
    """How many rows make a chunk: as many chunks as there must be, all of one size.

    A GPU's products want 8192 rows, in multiples of 128, to fill it; their logits, in bfloat16 and
    what is made of them, take 3.3 GB then with 50,304 ids. A smaller card takes a 32nd of itself.
    It is the card's size that counts, not what is free: a resumed run must compute the same bits.
    """
    if x.device.type == "cuda":
        room = torch.cuda.get_device_properties(x.device).total_memory // 32
        multiple, most = 128, min(8192, room // (8 * weight.shape[0]))
    else:
        multiple, most = 1, 16 * 2**20 // (4 * weight.shape[0])
    most = max(most // multiple * multiple, multiple, 64)
    even = -(-len(x) // -(-len(x) // most))
    return -(-even // multiple) * multiple


def losses(
    by: CrossEntropy,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    z_multiplier: float,
) -> LossSums:
    """As `linear_cross_entropy`, which is `chunked`, or computed by another."""
    if by is CrossEntropy.chunked:
        return linear_cross_entropy(x, weight, labels, bias, scale, z_multiplier)
    zero = torch.zeros((), device=x.device)
    if by is CrossEntropy.torch:
        assert not z_multiplier, "refused by find_loss_problem"
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        options = torch.nn.LinearCrossEntropyOptions(  # type: ignore[attr-defined]
            # Its own choice of rows goes by the width alone: one or two at a time, for d96.
            batch_chunk_size=_rows(x, weight),
            chunking_method=None,
            acc_dtype=torch.float32,
            allow_retain_graph=torch.compiler.is_compiling(),
        )
        # Its sum has the type of x, which in 16 bits is 0.4 % off: there each row's loss is asked
        # for, and the head computed once more in backward.
        reduction = "sum" if dtype == torch.float32 else "none"
        with torch.autocast(kind, enabled=False):
            each = F.linear_cross_entropy(  # type: ignore[attr-defined]
                (x * scale if scale != 1.0 else x).to(dtype),
                weight.to(dtype),
                labels,
                linear_bias=None if bias is None else (bias * scale).to(dtype),
                reduction=reduction,
                options=options,
            )
            ce = each.float().sum()
        return LossSums(ce, ce.detach(), zero)
    logits = F.linear(x, weight, bias).float()  # (N, V)
    if scale != 1.0:
        logits = logits * scale
    ce = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    if not z_multiplier:
        return LossSums(ce, ce.detach(), zero)
    z = z_multiplier * (logits.logsumexp(-1).square() * (labels != IGNORE)).sum()
    return LossSums(ce + z, ce.detach(), z.detach())


def find_loss_problem(cfg: TrainConfig) -> str | None:
    """None where cfg.cross_entropy can be had, else one sentence with the remedy."""
    if cfg.cross_entropy is not CrossEntropy.torch:
        return None
    if not hasattr(F, "linear_cross_entropy"):
        return (
            f"torch {torch.__version__} has no F.linear_cross_entropy, 2.13 has; "
            "leave cross_entropy out"
        )
    if cfg.softmax_auxiliary_loss:
        return "it has no z-loss; leave cross_entropy or softmax_auxiliary_loss out"
    return None


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
        # Inductor writes better GPU code for the loop than there is, and worse for the CPU, where
        # it copies the head's gradient for each chunk.
        whole = x.device.type == "cpu" and torch.compiler.is_compiling()
        compute = _one_operation if whole else _compute
        w = weight.to(dtype)
        ce, z, dx, dw, db = compute(x, w, bias, labels, scale, z_multiplier, chunk, learns)
        ctx.biased = bias is not None
        ctx.save_for_backward(dx, dw.to(weight.dtype), db)
        return ce + z, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = ctx.saved_tensors
        rest = (None,) * 5
        # In place, so that no second gradient of the head is held; backward runs once.
        return dx.mul_(grad), dw.mul_(grad), db.mul_(grad) if ctx.biased else None, *rest


def _compute(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    z_multiplier: float,
    chunk: int,
    learns: bool,
) -> tuple[Tensor, ...]:
    """Cross-entropy and z-loss, and what ce + z changes by with x, w and bias (empty, if not asked
    for). Products are in w's type, all else in float32."""
    ce, z, dx, dw, db = _zeros(x, w, bias, learns)
    compiled = torch.compiler.is_compiling()
    softmax, minus_at = (_softmax, _minus_at) if compiled else (_softmax_, _minus_at_)
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk].to(w.dtype)
        its_labels = labels[start : start + chunk]
        logits = by_onednn(rows, w).float()  # (C, V)
        if bias is not None:
            logits += bias
        if scale != 1.0:
            logits *= scale
        counts = (its_labels != IGNORE).float()[:, None]  # (C, 1)
        places = its_labels.clamp(min=0)[:, None]
        shares, lse, right = softmax(logits, places)
        ce = ce + ((lse - right) * counts).sum()
        slope = scale * counts
        if z_multiplier:
            z = z + z_multiplier * (lse.square() * counts).sum()
            slope = slope * (1 + 2 * z_multiplier * lse)
        if not learns:
            continue
        # d(ce + z) / d(rows @ w.T + bias) is slope * dlogits. The factor of a row goes to the
        # narrow side of each product, so that the logits are not read and written for it.
        hit = scale * counts / torch.where(slope == 0, 1.0, slope)
        dlogits = minus_at(shares, places, hit)
        if bias is not None:
            db += (dlogits.T @ slope)[:, 0]
        dlogits = dlogits.to(w.dtype)
        dx[start : start + chunk] = by_onednn(dlogits, w.T) * slope
        rows = rows * slope.to(w.dtype)
        if w.dtype == torch.float32:
            dw.addmm_(dlogits.T, rows)
        else:  # sums of many chunks want more than half precision
            dw += dlogits.T @ rows
        del logits, shares, dlogits  # before the next chunk's are made
    return ce, z, dx, dw, db


def _softmax_(logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(logits), in their place; log sum exp(logits) and the logits at places, (C, 1)."""
    right = logits.gather(1, places)
    highest = logits.amax(dim=-1, keepdim=True)
    shares = torch.softmax(logits, dim=-1, out=logits)
    return shares, highest - shares.amax(dim=-1, keepdim=True).log(), right


def _minus_at_(shares: Tensor, places: Tensor, hit: Tensor) -> Tensor:
    """shares (C, V) less hit (C, 1) at places (C, 1), in their place."""
    return shares.scatter_add_(1, places, -hit)


# The same for a compiler. Written so, one kernel reads a chunk's bfloat16 logits twice and writes
# their gradient once; no share is written, and no logits are kept for a kernel that comes later.


def _softmax(logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    right = torch.where(_at(places, logits), logits, 0.0).sum(dim=-1, keepdim=True)
    highest = logits.amax(dim=-1, keepdim=True)
    lse = highest + (logits - highest).exp().sum(dim=-1, keepdim=True).log()
    return (logits - lse).exp(), lse, right


def _minus_at(shares: Tensor, places: Tensor, hit: Tensor) -> Tensor:
    return shares - hit * _at(places, shares)


def _at(places: Tensor, like: Tensor) -> Tensor:
    """Whether a column is the place of its row, (C, V)."""
    return torch.arange(like.shape[1], device=like.device) == places


def _zeros(x: Tensor, w: Tensor, bias: Tensor | None, learns: bool) -> tuple[Tensor, ...]:
    """Room for what `_compute` returns; that of dx holds anything."""
    ce = torch.zeros((), dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if learns else x.new_empty(0)
    dw = torch.zeros(w.shape if learns else (0,), dtype=torch.float32, device=x.device)
    db = torch.zeros(len(w) if learns and bias is not None else 0, device=x.device)
    return ce, torch.zeros_like(ce), dx, dw, db


_one_operation = torch.library.custom_op(
    "olmo::linear_cross_entropy",
    _compute,
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor w, Tensor? bias, Tensor labels, float scale, float z_multiplier, "
        "int chunk, bool learns) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)


@_one_operation.register_fake
def _shapes(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    z_multiplier: float,
    chunk: int,
    learns: bool,
) -> tuple[Tensor, ...]:
    return _zeros(x, w, bias, learns)
