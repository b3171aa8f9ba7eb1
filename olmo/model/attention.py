"""Attention behind one function, and which of PyTorch's kernels computes it, with the reason.

Shapes: B batch, H heads, H_kv heads of keys and values, T queries, S keys, D head size.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from enum import StrEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from olmo.config import ModelConfig


class Backend(StrEnum):
    """Kernels of `F.scaled_dot_product_attention`."""

    sdpa = "sdpa"  # PyTorch's own pick; on the CPU a tiled kernel that takes masks too
    math = "math"  # plain products, every score in memory
    flash = "flash"  # FlashAttention 2, CUDA
    efficient = "efficient"  # xFormers' memory-efficient kernel, CUDA, float32 too
    cudnn = "cudnn"  # cuDNN's fused kernel, FlashAttention 3's speed on Hopper


class Choice(NamedTuple):
    backend: Backend
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


_KERNELS = {
    Backend.math: SDPBackend.MATH,
    Backend.flash: SDPBackend.FLASH_ATTENTION,
    Backend.efficient: SDPBackend.EFFICIENT_ATTENTION,
    Backend.cudnn: SDPBackend.CUDNN_ATTENTION,
}
# A mask or a head-by-head bias is more than the flash kernels take.
_WITH_BIAS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def choose(
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    backend: Backend | str | None = None,
) -> Choice:
    """The kernel for this model on this device, and why.

    Args:
        dtype: what attention runs in, that is autocast's type where autocast is on.
        backend: insist on this one.

    Raises:
        ValueError: config.flash_attention, or `backend`, asks for what cannot be had here.
    """
    device = torch.device(device)
    head_size = config.d_model // config.n_heads
    if backend is not None:
        backend = Backend(backend)
        if problem := why_not(backend, device, dtype, head_size):
            raise ValueError(f"attention backend {backend} cannot be had: {problem}")
        return Choice(backend, "asked for")
    if config.flash_attention:
        return _flash(device, dtype, head_size)
    if device.type != "cuda":
        return Choice(Backend.sdpa, f"PyTorch's own pick on {device.type}")
    for candidate in (Backend.cudnn, Backend.flash, Backend.efficient):
        if why_not(candidate, device, dtype, head_size) is None:
            return Choice(candidate, f"the fastest for {_circumstances(device, dtype, head_size)}")
    return Choice(Backend.math, f"no fused kernel for {_circumstances(device, dtype, head_size)}")


def _flash(device: torch.device, dtype: torch.dtype, head_size: int) -> Choice:
    """The kernel that model.flash_attention=true stands for, or why there is none."""
    for candidate in (Backend.cudnn, Backend.flash):
        if why_not(candidate, device, dtype, head_size) is None:
            where = _circumstances(device, dtype, head_size)
            return Choice(
                candidate, f"model.flash_attention=true; the fastest of its kind for {where}"
            )
    package = "installed" if importlib.util.find_spec("flash_attn") else "not installed"
    problem = why_not(Backend.flash, device, dtype, head_size)
    raise ValueError(
        f"model.flash_attention=true cannot be had: {problem} "
        f"(package: torch {torch.__version__}, flash-attn {package} and not needed; "
        f"GPU: {_gpu(device)}; head size: {head_size}; type: {dtype}). "
        "Override it with --model.flash_attention=false, which computes the same by another kernel"
    )


def why_not(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_size: int
) -> str | None:
    """None where `backend` works, forward and backward, else one sentence with the remedy."""
    if backend in (Backend.math, Backend.sdpa):
        return None
    if device.type != "cuda":
        return f"it is a kernel for NVIDIA GPUs, and this runs on {device.type}"
    major, minor = _capability(device)
    if backend is Backend.efficient:
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it works in bfloat16 and float16, not in {dtype}; set precision: amp_bf16"
    if major < 8:
        return f"it needs an Ampere GPU (8.0) or newer, and {_gpu(device)} is of {major}.{minor}"
    if head_size % 8:
        return f"it needs a head size that is a multiple of 8, not {head_size}"
    if backend is Backend.cudnn:
        if major != 9:
            return "cuDNN's kernel is the faster one on Hopper only"
        if head_size > 128:
            return f"cuDNN has no backward for head sizes over 128, and this is {head_size}"
        return None
    if head_size > 256:
        return f"it goes up to head size 256, and this is {head_size}; raise model.n_heads"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"none ({device.type})"


def _circumstances(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    return f"{_gpu(device)}, {dtype}, head size {head_size}"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: Backend,
    bias: Tensor | None = None,
    causal: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v.

    Args:
        q: (B, H, T, D).
        k, v: (B, H_kv, S, D); H is a multiple of H_kv.
        backend: from `choose`; a bias makes CUDA use the kernels that take one.
        bias: broadcast to (B, H, T, S): float is added to the scores, bool says who may look
            at whom. With a bias, `causal` must be part of it.
        causal: without a bias, query t sees keys up to t.
        dropout: probability with which a weight is dropped.

    Returns:
        (B, H, T, D)
    """
    context: Callable[[], Any] = nullcontext
    if backend is not Backend.sdpa:
        needs_more = bias is not None and backend is not Backend.math
        kernels = _WITH_BIAS if needs_more else [_KERNELS[backend]]
        context = functools.partial(sdpa_kernel, kernels)
    if (
        q.is_cuda
        and q.shape[1] != k.shape[1]
        and (bias is not None or backend is Backend.efficient)
    ):
        # The memory-efficient kernel wants as many heads of keys as of queries.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    with context():
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias,
            dropout_p=dropout,
            is_causal=causal and bias is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )


def causal_bias(length: int, device: torch.device | str = "cpu") -> Tensor:
    """0 on and below the diagonal, float32's lowest number above it, (1, 1, length, length)."""
    lowest = torch.finfo(torch.float32).min
    bias = torch.full((length, length), lowest, dtype=torch.float32, device=device)
    return bias.triu(diagonal=1)[None, None]


def document_mask(doc_lens: Tensor, length: int) -> Tensor:
    """True where a query may look: earlier in the same document. (B, 1, length, length), bool.

    Args:
        doc_lens: (B, most documents) lengths, each row padded with zeros. What lies beyond the
            last document counts as one more.
    """
    ends = doc_lens.cumsum(dim=1)  # (B, docs)
    positions = torch.arange(length, device=doc_lens.device)
    document = torch.searchsorted(ends, positions.expand(len(ends), -1).contiguous(), right=True)
    same = document[:, :, None] == document[:, None, :]  # (B, T, T)
    return (same & (positions[:, None] >= positions[None, :]))[:, None]
