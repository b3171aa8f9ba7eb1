"""Linear layers whose matrix products run in 8-bit floating point (Micikevicius et al. 2022,
arXiv:2209.05433).

A tensor x is kept as x8 * s: x8 in e4m3 (values and weights: 3 bits of mantissa, up to 448) or,
for gradients with one scale a tensor, in e5m2 (2 bits, up to 57344: they spread wider); s in
float32, for the whole tensor or for each row of a product. Sums are float32. Weights stay in
float32 outside: what is saved is what it always was.

Shapes: M tokens, K inputs, N outputs of a layer; y (M, N) = x (M, K) @ w (N, K)^T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Product = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype, bool], Tensor]
TINY = torch.finfo(torch.float32).tiny


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The s with which values up to `amax` just fit into `dtype`."""
    return (amax.float() / torch.finfo(dtype).max).clamp(min=TINY)


def amax_of(x: Tensor, dim: int | None = None) -> Tensor:
    """The largest magnitude: of all, (), or along `dim`, which stays with length 1."""
    return x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in `dtype`; what lies beyond its range becomes its largest number.

    Infinities and NaN become NaN, and so does every product with them: the finite check sees it.
    """
    top = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-top, top).to(dtype)


def scaled(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out: torch.dtype, fast: bool = False
) -> Tensor:
    """(a * sa) @ (b * sb) by torch's scaled product; a (I, J), b (J, L), both 8 bits wide.

    sa is () or (I, 1), sb () or (1, L). CUDA requires J and L to be multiples of 16: zeros fill
    them up. `fast`: partial sums keep fewer bits (14 on Hopper), which makes the product faster.
    """
    columns = b.shape[1]
    inner, outer = -a.shape[1] % 16, -columns % 16
    if a.is_cuda and inner:  # a pad of width zero would be a copy
        a, b = F.pad(a, (0, inner)), F.pad(b, (0, 0, 0, inner))
    if a.is_cuda and outer:
        b = F.pad(b, (0, outer))
        sb = sb if sb.dim() == 0 else F.pad(sb, (0, outer), value=1.0)
    # The kernels read a by rows and b by columns.
    a, b = a.contiguous(), b.t().contiguous().t()
    narrow = out if sa.dim() == 0 or not a.is_cuda else torch.bfloat16  # by rows: bfloat16 only
    if sa.dim():  # dense, also where a side is 1 and a transposed view would pass for it
        sa, sb = sa.reshape(-1).view(-1, 1), sb.reshape(-1).view(1, -1)
    y = torch._scaled_mm(
        a, b, scale_a=sa, scale_b=sb, out_dtype=narrow, use_fast_accum=fast and a.is_cuda
    )
    return as_type(y[:, :columns], out)


def emulated(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out: torch.dtype, fast: bool = False
) -> Tensor:
    """The same, computed in float32 from what the 8 bits stand for: the oracle."""
    with torch.autocast(a.device.type, enabled=False):
        return as_type((a.float() * sa) @ (b.float() * sb), out)


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`.

    Not `x.to(dtype)`: where that changes nothing, and it ends the forward of an autograd.Function,
    torch 2.11 compiles the function without its backward, and every gradient is zero.
    """
    return x if x.dtype == dtype else x.to(dtype)


@dataclass(frozen=True)
class Recipe:
    """How a layer's three products are computed."""

    product: Product
    rowwise: bool = False
    exact_weight_gradient: bool = False  # w's gradient by a product in the layer's own precision


class Delayed(nn.Module):
    """Scales of a layer's x, w and gradient from the largest magnitudes of earlier steps.

    One pass over a tensor less than measuring it first; a value beyond what was seen lately is
    cut to the largest number. The history is not saved: a resumed run measures anew.
    """

    seen: Tensor
    history: Tensor

    def __init__(self, length: int, device: torch.device) -> None:
        super().__init__()
        # In this step so far, and in the last ones; for x, w and the gradient.
        self.register_buffer("seen", torch.zeros(3, device=device), persistent=False)
        self.register_buffer("history", torch.zeros(length, 3, device=device), persistent=False)

    def scale(self, which: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What to quantize x with; remembers how large x is."""
        amax = amax_of(x.detach()).float()
        self.seen[which].copy_(torch.maximum(self.seen[which], amax))
        before = self.history[:, which].amax()
        return scale_of(torch.where(before > 0, before, amax), dtype)

    def step(self) -> None:
        """Once a step, after its gradients."""
        self.history.copy_(self.history.roll(1, 0))
        self.history[0].copy_(self.seen)
        self.seen.zero_()


class Linear8(torch.autograd.Function):
    """y = x @ w^T with every product in 8 bits, forward and backward.

    Forward sums fast, backward exactly: gradients spread over more binary orders than activations,
    and small ones would be lost.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, w: Tensor, recipe: Recipe, delayed: Delayed | None, out: torch.dtype
    ) -> Tensor:
        """x (M, K) in `out`, w (N, K) in any precision → (M, N) in `out`."""
        ctx.recipe, ctx.delayed, ctx.out, ctx.weight_type = recipe, delayed, out, w.dtype
        if recipe.rowwise:
            sx, sw = scale_of(amax_of(x, 1), E4M3), scale_of(amax_of(w, 1), E4M3)
            x8, w8 = quantize(x, sx, E4M3), quantize(w, sw, E4M3)
            # Backward sums along other directions, and so needs other scales.
            ctx.save_for_backward(x, w)
            return recipe.product(x8, sx, w8.t(), sw.t(), out, True)
        if delayed is None:
            sx, sw = scale_of(amax_of(x), E4M3), scale_of(amax_of(w), E4M3)
        else:
            sx, sw = delayed.scale(0, x, E4M3), delayed.scale(1, w, E4M3)
        x8, w8 = quantize(x, sx, E4M3), quantize(w, sw, E4M3)
        ctx.save_for_backward(x8, sx, w8, sw, x if recipe.exact_weight_gradient else None)
        return recipe.product(x8, sx, w8.t(), sw, out, True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        """g (M, N) → the gradients of x (M, K) and w (N, K)."""
        recipe, out = ctx.recipe, ctx.out
        product = recipe.product
        if recipe.rowwise:
            x, w = ctx.saved_tensors
            sg, sw = scale_of(amax_of(g, 1), E4M3), scale_of(amax_of(w, 0), E4M3)
            gx = product(quantize(g, sg, E4M3), sg, quantize(w, sw, E4M3), sw, out, False)
            if recipe.exact_weight_gradient:
                gw = g.to(out).t() @ x
            else:
                sg, sx = scale_of(amax_of(g, 0), E4M3), scale_of(amax_of(x, 0), E4M3)
                g8, x8 = quantize(g, sg, E4M3), quantize(x, sx, E4M3)
                gw = product(g8.t(), sg.t(), x8, sx, out, False)
        else:
            x8, sx, w8, sw, x = ctx.saved_tensors
            if ctx.delayed is None:
                sg = scale_of(amax_of(g), E5M2)
            else:
                sg = ctx.delayed.scale(2, g, E5M2)
            g8 = quantize(g, sg, E5M2)
            gx = product(g8, sg, w8, sw, out, False)
            if recipe.exact_weight_gradient:
                gw = g.to(out).t() @ x
            else:
                gw = product(g8.t(), sg, x8, sx, out, False)
        return gx, gw.to(ctx.weight_type), None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    delayed: Delayed | None = None,
) -> Tensor:
    """As `F.linear`: x (…, K), weight (N, K), bias (N) → (…, N), under autocast in its type."""
    out = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        out = torch.get_autocast_dtype(x.device.type)
    # In autocast's type first, as any other product takes it: a norm's output is float32, and would
    # be written and read as such to measure it and to quantize it.
    flat = as_type(x.reshape(-1, x.shape[-1]), out)
    y = Linear8.apply(flat, weight, recipe, delayed, out).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(out)
