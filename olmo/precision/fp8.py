"""A linear layer whose matrix products run in 8-bit floating point (Micikevicius et al. 2022,
arXiv:2209.05433).

A tensor x is represented as x8 * s. x8 is in e4m3 (3 bits of mantissa, up to 448) for activations
and weights, and in e5m2 (2 bits, up to 57344) for gradients with one scale per tensor, since they
have a wider range. s is float32, one for the tensor (tensorwise) or one for each row of a product
(rowwise). Sums are float32. The layer's own weight stays float32, so checkpoints do not change.

Shapes: M tokens, K inputs, N outputs of a layer; y (M, N) = x (M, K) @ w (N, K)^T. g is the
gradient of y. s, sx, sw, sg are scales; x8, w8, g8 quantized tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo.model.linear import get_product_dtype

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# (a, scale of a, b, scale of b, output dtype, fast accumulation) -> a @ b
ScaledProduct = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype, bool], Tensor]
MIN_SCALE = torch.finfo(torch.float32).tiny  # the scale of zeros: x / s stays defined


def compute_dequant_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The s of x = x8 · s for which `amax` becomes the largest number of `dtype`."""
    return (amax.float() / torch.finfo(dtype).max).clamp(min=MIN_SCALE)


def compute_amax(x: Tensor, dim: int | None = None) -> Tensor:
    """The largest magnitude: of the whole tensor, (), or along `dim`, which keeps length 1."""
    return x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in `dtype`, saturated at its largest number.

    Infinity and NaN become NaN, and so does every product with them, so that the check for finite
    gradients sees it.
    """
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-largest, largest).to(dtype)


def quantize_dynamic(
    x: Tensor, dtype: torch.dtype, dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """x in `dtype`, and its scale, measured now: one, or one for each slice across `dim`."""
    scale = compute_dequant_scale(compute_amax(x, dim), dtype)
    return quantize(x, scale, dtype), scale


def scaled_mm(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out: torch.dtype, fast: bool = False
) -> Tensor:
    """(a * sa) @ (b * sb) by torch._scaled_mm; a (I, J), b (J, L), both in 8 bits.

    sa is () or (I, 1), sb () or (1, L). CUDA requires J and L to be multiples of 16: both are
    padded with zeros. `fast`: partial sums keep fewer bits (14 on Hopper), which is faster.
    """
    columns = b.shape[1]
    inner, outer = -a.shape[1] % 16, -columns % 16
    if a.is_cuda and inner:  # padding by zero columns would be a copy
        a, b = F.pad(a, (0, inner)), F.pad(b, (0, 0, 0, inner))
    if a.is_cuda and outer:
        b = F.pad(b, (0, outer))
        sb = sb if sb.dim() == 0 else F.pad(sb, (0, outer), value=1.0)
    # The kernels need a row-major and b column-major.
    a, b = a.contiguous(), b.t().contiguous().t()
    # On CUDA rowwise products have bfloat16 outputs only.
    out_dtype = out if sa.dim() == 0 or not a.is_cuda else torch.bfloat16
    # A transposed view of a length-1 side counts as contiguous and keeps its strides, which the
    # kernel refuses: new views have dense ones.
    if sa.dim():
        sa, sb = sa.reshape(-1).view(-1, 1), sb.reshape(-1).view(1, -1)
    y = torch._scaled_mm(
        a, b, scale_a=sa, scale_b=sb, out_dtype=out_dtype, use_fast_accum=fast and a.is_cuda
    )
    return cast_to(y[:, :columns], out)


def emulated_mm(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out: torch.dtype, fast: bool = False
) -> Tensor:
    """As `scaled_mm`, in float32 from the dequantized values: the reference for tests."""
    with torch.autocast(a.device.type, enabled=False):
        return cast_to((a.float() * sa) @ (b.float() * sb), out)


def cast_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; x itself, where it has that type.

    Not plain `x.to(dtype)`: where that returns x, and is the last operation in the forward of an
    autograd.Function, torch 2.11 compiles the function without its backward, and every gradient
    is zero.
    """
    return x if x.dtype == dtype else x.to(dtype)


@dataclass(frozen=True)
class ProductSettings:
    """How a layer's three products (output, input gradient, weight gradient) are computed."""

    product: ScaledProduct
    rowwise: bool = False
    exact_weight_gradient: bool = False  # the weight gradient by a product in 16 or 32 bits


class DelayedScaling(nn.Module):
    """Scales of a layer's x, w and g from their largest magnitudes in earlier steps.

    It saves a pass over each tensor (measure, then quantize) compared to dynamic scaling. Values
    above the recent maximum are saturated. The history is not in checkpoints: a resumed run starts
    with an empty one.
    """

    current_amax: Tensor  # (3,): of x, w and g in this step so far
    amax_history: Tensor  # (length, 3): of the last steps, the newest first

    def __init__(self, length: int, device: torch.device) -> None:
        super().__init__()
        current, history = torch.zeros(3, device=device), torch.zeros(length, 3, device=device)
        self.register_buffer("current_amax", current, persistent=False)
        self.register_buffer("amax_history", history, persistent=False)

    def scale(self, which: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The scale for x, which is the layer's x (0), w (1) or g (2); records x's magnitude.

        Without a history, as in the first step, it is x's own."""
        amax = compute_amax(x.detach()).float()
        self.current_amax[which].copy_(torch.maximum(self.current_amax[which], amax))
        recent = self.amax_history[:, which].amax()
        return compute_dequant_scale(torch.where(recent > 0, recent, amax), dtype)

    def step(self) -> None:
        """Move this step's magnitudes into the history; call after the last backward."""
        self.amax_history.copy_(self.amax_history.roll(1, 0))
        self.amax_history[0].copy_(self.current_amax)
        self.current_amax.zero_()


class Float8LinearFunction(torch.autograd.Function):
    """y = x @ w^T with all three products in 8 bits.

    Forward uses fast accumulation, backward does not: gradients have a wider range than
    activations, and small ones would be lost.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        w: Tensor,
        settings: ProductSettings,
        delayed: DelayedScaling | None,
        out: torch.dtype,
    ) -> Tensor:
        """x (M, K) in dtype `out`, w (N, K) in any dtype → y (M, N) in `out`."""
        ctx.settings, ctx.delayed, ctx.out, ctx.weight_type = settings, delayed, out, w.dtype
        if settings.rowwise:
            x8, sx = quantize_dynamic(x, E4M3, dim=1)  # sx (M, 1)
            w8, sw = quantize_dynamic(w, E4M3, dim=1)  # sw (N, 1)
            # Backward sums along other dimensions, so it needs other scales: x and w are saved
            # unquantized, which takes two (bfloat16) to four times (float32) the memory.
            ctx.save_for_backward(x, w)
            return settings.product(x8, sx, w8.t(), sw.t(), out, True)
        if delayed is None:
            x8, sx = quantize_dynamic(x, E4M3)
            w8, sw = quantize_dynamic(w, E4M3)
        else:
            sx, sw = delayed.scale(0, x, E4M3), delayed.scale(1, w, E4M3)
            x8, w8 = quantize(x, sx, E4M3), quantize(w, sw, E4M3)
        ctx.save_for_backward(x8, sx, w8, sw, x if settings.exact_weight_gradient else None)
        return settings.product(x8, sx, w8.t(), sw, out, True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        """g (M, N) → the gradients of x (M, K) and w (N, K)."""
        settings, out = ctx.settings, ctx.out
        product = settings.product
        if settings.rowwise:
            x, w = ctx.saved_tensors
            g8, sg = quantize_dynamic(g, E4M3, dim=1)  # sg (M, 1): sums over N
            w8, sw = quantize_dynamic(w, E4M3, dim=0)  # sw (1, K)
            gx = product(g8, sg, w8, sw, out, False)
            if not settings.exact_weight_gradient:
                g8, sg = quantize_dynamic(g, E4M3, dim=0)  # sg (1, N): sums over M
                x8, sx = quantize_dynamic(x, E4M3, dim=0)  # sx (1, K)
                sg = sg.t()
        else:
            x8, sx, w8, sw, x = ctx.saved_tensors
            if ctx.delayed is None:
                g8, sg = quantize_dynamic(g, E5M2)
            else:
                sg = ctx.delayed.scale(2, g, E5M2)
                g8 = quantize(g, sg, E5M2)
            gx = product(g8, sg, w8, sw, out, False)
        if settings.exact_weight_gradient:
            gw = g.to(out).t() @ x
        else:
            gw = product(g8.t(), sg, x8, sx, out, False)
        return gx, gw.to(ctx.weight_type), None, None, None


def float8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: ProductSettings,
    delayed: DelayedScaling | None = None,
) -> Tensor:
    """F.linear in 8 bits: x (…, K), weight (N, K), bias (N,) → (…, N).

    The result has autocast's type under autocast, else x's.
    """
    out = get_product_dtype(x)
    # Cast to autocast's type first, as for any other product. A norm's output is float32: measuring
    # and quantizing it would read twice the bytes.
    flat = cast_to(x.reshape(-1, x.shape[-1]), out)
    y = Float8LinearFunction.apply(flat, weight, settings, delayed, out).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(out)
