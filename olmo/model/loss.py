"""Cross-entropy from hidden states, without holding all logits in memory.

The logits are the largest tensor of a step: 6.6 GB in float32 for 32,768 tokens and 50,304 ids, and
as much again for their gradient. Here one chunk of rows at a time is projected to logits, its loss
and its gradients are computed, and the logits are freed. The forward pass computes the gradients
too, so that backward need not project the chunks a second time. (The same idea: Liger-Kernel's
fused linear cross-entropy, Hsu et al. 2024, arXiv:2410.10989.)

Shapes: N labels, d d_model, V rows of the head, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo.config import TrainConfig
from olmo.config.enums import CrossEntropy as CrossEntropy
from olmo.model.linear import get_product_dtype, onednn_linear

IGNORE_INDEX = -100  # as in F.cross_entropy


class LossSums(NamedTuple):
    """Sums over the labels that are not ignored, float32 scalars."""

    total: Tensor
    """ce + z; the only one with a gradient."""

    ce: Tensor
    """Cross-entropy, in nats."""

    z: Tensor
    """z-loss: z_multiplier * logsumexp(logits)² (Chowdhery et al. 2022, arXiv:2204.02311); or 0."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    z_multiplier: float = 0.0,
    chunk: int | None = None,
) -> LossSums:
    """The loss of logits = scale * (x @ weight.T + bias), chunk by chunk.

    Args:
        x: (N, d).
        weight: (V, d).
        labels: (N,), int64; -100 is ignored.
        bias: (V,).
        chunk: rows per chunk; by default as many as make logits of 16 MiB on a CPU, and as many
            as fill a GPU.

    Products run in autocast's dtype under autocast, all else in float32.
    """
    chunk = chunk or _choose_chunk(x, weight)
    dtype = get_product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        total, z = _LinearCrossEntropy.apply(
            x, weight, bias, labels, dtype, scale, z_multiplier, chunk
        )
    # Without a z-loss nothing is subtracted: inductor would return the same tensor for both, and
    # the total could not be differentiated.
    ce = total.detach() - z.detach() if z_multiplier else total.detach()
    return LossSums(total, ce, z.detach())


def _choose_chunk(x: Tensor, weight: Tensor) -> int:
    """Rows per chunk: the fewest chunks that fit, all of the same size.

    On a GPU a product needs about 8192 rows, in multiples of 128, to use all of it; with 50,304 ids
    their logits and what is computed from them take 3.3 GB. On smaller GPUs a chunk takes a 32nd of
    the memory. The total memory decides, not the free memory: a resumed run must compute the same
    bits.
    """
    if x.device.type == "cuda":
        budget = torch.cuda.get_device_properties(x.device).total_memory // 32
        multiple, most = 128, min(8192, budget // (8 * weight.shape[0]))
    else:
        multiple, most = 1, 16 * 2**20 // (4 * weight.shape[0])
    most = max(most // multiple * multiple, multiple, 64)
    n_chunks = -(-len(x) // most)  # rounded up
    even = -(-len(x) // n_chunks)
    return -(-even // multiple) * multiple


def compute_loss(
    method: CrossEntropy,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    z_multiplier: float,
) -> LossSums:
    """The loss by any method: `chunked` is `linear_cross_entropy`, which has the arguments."""
    if method is CrossEntropy.chunked:
        return linear_cross_entropy(x, weight, labels, bias, scale, z_multiplier)
    zero = torch.zeros((), device=x.device)
    if method is CrossEntropy.torch:
        assert not z_multiplier, "refused by find_loss_problem"
        dtype = get_product_dtype(x)
        options = torch.nn.LinearCrossEntropyOptions(  # type: ignore[attr-defined]
            # torch's own choice depends on d alone: one or two rows per chunk for d = 96.
            batch_chunk_size=_choose_chunk(x, weight),
            chunking_method=None,
            acc_dtype=torch.float32,
            allow_retain_graph=torch.compiler.is_compiling(),
        )
        # torch's sum has the dtype of x: 0.4 % off in 16 bits. There it returns the loss of a row
        # instead, to be summed here; the price is that backward computes the head again.
        reduction = "sum" if dtype == torch.float32 else "none"
        with torch.autocast(x.device.type, enabled=False):
            row_losses = F.linear_cross_entropy(  # type: ignore[attr-defined]
                (x * scale if scale != 1.0 else x).to(dtype),
                weight.to(dtype),
                labels,
                linear_bias=None if bias is None else (bias * scale).to(dtype),
                reduction=reduction,
                options=options,
            )
            ce = row_losses.float().sum()
        return LossSums(ce, ce.detach(), zero)
    logits = F.linear(x, weight, bias).float()  # (N, V)
    if scale != 1.0:
        logits = logits * scale
    ce = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    if not z_multiplier:
        return LossSums(ce, ce.detach(), zero)
    z = z_multiplier * (logits.logsumexp(-1).square() * (labels != IGNORE_INDEX)).sum()
    return LossSums(ce + z, ce.detach(), z.detach())


def find_loss_problem(cfg: TrainConfig) -> str | None:
    """None where cfg.cross_entropy works, else one sentence with the remedy."""
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
        with_grad = any(ctx.needs_input_grad)
        # Compiled for a GPU, inductor fuses the loop's operations. For a CPU it copies the head's
        # gradient in each chunk, so there the loop is one custom operation that it does not see.
        opaque = x.device.type == "cpu" and torch.compiler.is_compiling()
        compute = _chunked_loss_op if opaque else _chunked_loss
        w = weight.to(dtype)
        ce, z, dx, dw, db = compute(x, w, bias, labels, scale, z_multiplier, chunk, with_grad)
        ctx.biased = bias is not None
        ctx.save_for_backward(dx, dw.to(weight.dtype), db)
        return ce + z, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = ctx.saved_tensors
        rest = (None,) * 5
        # In place, so that no second (V, d) gradient is allocated; backward may run only once.
        return dx.mul_(grad), dw.mul_(grad), db.mul_(grad) if ctx.biased else None, *rest


def _chunked_loss(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    z_multiplier: float,
    chunk: int,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    """Cross-entropy, z-loss, and the gradients of ce + z: (), (), (N, d), (V, d), (V,).

    Gradients are empty without with_grad. Products are in w's dtype, all else in float32.
    """
    ce, z, dx, dw, db = _allocate_outputs(x, w, bias, with_grad)
    compiled = torch.compiler.is_compiling()
    softmax, subtract_at = (_softmax, _subtract_at) if compiled else (_softmax_, _subtract_at_)
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk].to(w.dtype)
        chunk_labels = labels[start : start + chunk]
        logits = onednn_linear(rows, w).float()  # (C, V)
        if bias is not None:
            logits += bias
        if scale != 1.0:
            logits *= scale
        counts = (chunk_labels != IGNORE_INDEX).float()[:, None]  # (C, 1)
        columns = chunk_labels.clamp(min=0)[:, None]
        probs, lse, label_logits = softmax(logits, columns)
        ce = ce + ((lse - label_logits) * counts).sum()
        slope = scale * counts
        if z_multiplier:
            z = z + z_multiplier * (lse.square() * counts).sum()
            slope = slope * (1 + 2 * z_multiplier * lse)
        if not with_grad:
            continue
        # d(ce + z) / d(rows @ w.T + bias) = slope * dlogits, where dlogits = probs, less `target`
        # at the label. `slope` (C, 1) multiplies the narrow (C, d) side of each product: applied to
        # dlogits, it would cost a read and a write of (C, V).
        target = scale * counts / torch.where(slope == 0, 1.0, slope)
        dlogits = subtract_at(probs, columns, target)
        if bias is not None:
            db += (dlogits.T @ slope)[:, 0]
        dlogits = dlogits.to(w.dtype)
        dx[start : start + chunk] = onednn_linear(dlogits, w.T) * slope
        rows = rows * slope.to(w.dtype)
        if w.dtype == torch.float32:
            dw.addmm_(dlogits.T, rows)
        else:  # a sum over chunks needs float32
            dw += dlogits.T @ rows
        del logits, probs, dlogits  # free them before the next chunk allocates its own
    return ce, z, dx, dw, db


def _softmax_(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(logits) (C, V), in place; logsumexp and the logits at `columns`, (C, 1) each."""
    label_logits = logits.gather(1, columns)
    highest = logits.amax(dim=-1, keepdim=True)
    probs = torch.softmax(logits, dim=-1, out=logits)
    # The largest probability is exp(highest - logsumexp): no second pass over the logits.
    return probs, highest - probs.amax(dim=-1, keepdim=True).log(), label_logits


def _subtract_at_(probs: Tensor, columns: Tensor, target: Tensor) -> Tensor:
    """probs (C, V) minus target (C, 1) at columns (C, 1), in place."""
    return probs.scatter_add_(1, columns, -target)


# The same two functions for the compiler. Written like this, inductor makes one kernel that reads a
# chunk's bfloat16 logits twice and writes their gradient once. Probabilities are never written, and
# no logits are kept for a later kernel.


def _softmax(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    label_logits = torch.where(_is_label(columns, logits), logits, 0.0).sum(dim=-1, keepdim=True)
    highest = logits.amax(dim=-1, keepdim=True)
    lse = highest + (logits - highest).exp().sum(dim=-1, keepdim=True).log()
    return (logits - lse).exp(), lse, label_logits


def _subtract_at(probs: Tensor, columns: Tensor, target: Tensor) -> Tensor:
    return probs - target * _is_label(columns, probs)


def _is_label(columns: Tensor, like: Tensor) -> Tensor:
    """Whether a column is its row's label, (C, V)."""
    return torch.arange(like.shape[1], device=like.device) == columns


def _allocate_outputs(
    x: Tensor, w: Tensor, bias: Tensor | None, with_grad: bool
) -> tuple[Tensor, ...]:
    """The outputs of `_chunked_loss`: zeros, and an uninitialised dx."""
    ce = torch.zeros((), dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if with_grad else x.new_empty(0)
    dw = torch.zeros(w.shape if with_grad else (0,), dtype=torch.float32, device=x.device)
    db = torch.zeros(len(w) if with_grad and bias is not None else 0, device=x.device)
    return ce, torch.zeros_like(ce), dx, dw, db


_chunked_loss_op = torch.library.custom_op(
    "olmo::linear_cross_entropy",
    _chunked_loss,
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor w, Tensor? bias, Tensor labels, float scale, float z_multiplier, "
        "int chunk, bool with_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)


@_chunked_loss_op.register_fake
def _fake_chunked_loss(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    z_multiplier: float,
    chunk: int,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    return _allocate_outputs(x, w, bias, with_grad)
