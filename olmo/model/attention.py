"""Attention behind one function, whoever computes it. Who does is chosen in olmo.model.kernels.

Shapes: B batch, H heads, H_kv heads of keys and values, T queries, S keys, D head size.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from olmo.config.enums import AttentionBackend

Backend = AttentionBackend


@dataclass(frozen=True)
class Kernel:
    """What computes attention, and where it can; `olmo.model.kernels` asks, and tries it."""

    sdpa: SDPBackend | None = None  # of F.scaled_dot_product_attention
    # A module with flash_attn_func and flash_attn_varlen_func. Of their arguments those used here
    # have the same names in all three (read in flash-attn 2.8.3, flash-attn-4 4.0.0b36 and
    # FlashAttention 3's source): q, k, v as (B, T, H, D), causal, deterministic; for documents
    # (B * T, H, D) and cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k. The third argument
    # after q, k, v is not.
    package: str | None = None
    install: str = ""  # where the package comes from
    cuda: bool = True  # it is for NVIDIA GPUs alone
    capability: tuple[int, int] | None = None  # of these, lowest and highest major; then only
    # in 16 bits, for head sizes that are multiples of 8 up to 256
    documents: bool = True  # it takes a mask between documents
    bias: bool = False  # it takes any mask or bias
    dropout: bool = True  # it drops attention weights
    flash: bool = False  # it is one of those that model.flash_attention=true may stand for


ANY = 99  # the highest major
KERNELS = {
    Backend.sdpa: Kernel(cuda=False, bias=True),
    Backend.math: Kernel(SDPBackend.MATH, cuda=False, bias=True),
    Backend.efficient: Kernel(SDPBackend.EFFICIENT_ATTENTION, bias=True),
    Backend.cudnn: Kernel(
        SDPBackend.CUDNN_ATTENTION, capability=(8, ANY), documents=False, flash=True
    ),
    Backend.flash: Kernel(
        SDPBackend.FLASH_ATTENTION, capability=(8, ANY), documents=False, flash=True
    ),
    Backend.fa2: Kernel(
        package="flash_attn",
        install="flash-attn 2 is missing: pip install flash-attn --no-build-isolation",
        capability=(8, ANY),
        flash=True,
    ),
    Backend.fa3: Kernel(
        package="flash_attn_interface",
        install="FlashAttention 3 is missing: python setup.py install in hopper/ of "
        "github.com/Dao-AILab/flash-attention",
        capability=(9, 9),
        dropout=False,
        flash=True,
    ),
    Backend.fa4: Kernel(
        package="flash_attn.cute",
        install="flash-attn-4 is missing: pip install --pre flash-attn-4",
        capability=(9, ANY),
        dropout=False,
        flash=True,
    ),
    Backend.flex: Kernel(cuda=False, dropout=False),
}
# What a mask, or a head-by-head bias, is computed by where the chosen kernel takes none.
_WITH_BIAS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_loaded: dict[Backend, Any] = {}


class Documents(NamedTuple):
    """Who may look at whom where documents lie one after another, for kernels that skip the rest.

    Made once a forward pass for all blocks, in the form that its kernel takes; the others take
    `document_mask`.
    """

    starts: Tensor | None
    """For the packages: where each document begins in the flattened batch, and where the last one
    ends, (documents + 1,) int32. Documents of length 0 are allowed."""

    blocks: Any
    """For flex: its BlockMask."""


Bias = Tensor | Documents


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: Backend,
    bias: Bias | None = None,
    causal: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v.

    Args:
        q: (B, H, T, D).
        k, v: (B, H_kv, S, D); H is a multiple of H_kv.
        backend: from `kernels.choose`; a tensor for a bias makes CUDA use the kernels that take
            one.
        bias: broadcast to (B, H, T, S): float is added to the scores, bool says who may look
            at whom. With a bias, `causal` must be part of it. `Documents` for `backend`.
        causal: without a bias, query t sees keys up to t; then T = S.
        dropout: probability with which a weight is dropped.

    Returns:
        (B, H, T, D)
    """
    kernel = KERNELS[backend]
    if kernel.package and not isinstance(bias, Tensor):
        return _by_package(q, k, v, backend, bias, causal, dropout)
    if backend is Backend.flex and isinstance(bias, Documents):
        return _by_flex(q, k, v, bias)
    assert not isinstance(bias, Documents), f"{backend} takes document_mask"
    context: Callable[[], Any] = nullcontext
    if backend is not Backend.sdpa:
        takes_it = backend is Backend.math or bias is None
        own = [kernel.sdpa] if kernel.sdpa and takes_it else _WITH_BIAS
        context = functools.partial(sdpa_kernel, own)
    if (
        q.is_cuda
        and q.shape[1] != k.shape[1]
        and (bias is not None or backend in (Backend.efficient, Backend.flex))
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


def load(backend: Backend) -> Any:
    """The module of a package's kernels; ImportError, or whatever its import raises."""
    if backend not in _loaded:
        package = KERNELS[backend].package
        assert package is not None
        _loaded[backend] = importlib.import_module(package)
    return _loaded[backend]


def _by_package(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: Backend,
    documents: Documents | None,
    causal: bool,
    dropout: float,
) -> Tensor:
    module = load(backend)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, H, D)
    options: dict[str, Any] = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    if KERNELS[backend].dropout:
        options["dropout_p"] = dropout
    if documents is None:
        out = module.flash_attn_func(q, k, v, causal=causal, **options)
    else:
        B, T = q.shape[:2]
        out = module.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)),  # (B * T, H, D)
            cu_seqlens_q=documents.starts,
            cu_seqlens_k=documents.starts,
            # An upper bound will do; the longest itself would have to be fetched from the device.
            max_seqlen_q=T,
            max_seqlen_k=T,
            causal=True,
            **options,
        )
        out = (out[0] if isinstance(out, tuple) else out).unflatten(0, (B, T))
    # FlashAttention 4, and old builds of 3, also return each row's log sum exp.
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _by_flex(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # Only compiled is it a kernel; uncompiled, as on the CPU here, it holds every score.
    compute: Any = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        compute = _compiled_flex()
    gqa = q.shape[1] != k.shape[1]
    return compute(q, k, v, block_mask=documents.blocks, enable_gqa=gqa)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def causal_bias(length: int, device: torch.device | str = "cpu") -> Tensor:
    """0 on and below the diagonal, float32's lowest number above it, (1, 1, length, length)."""
    lowest = torch.finfo(torch.float32).min
    bias = torch.full((length, length), lowest, dtype=torch.float32, device=device)
    return bias.triu(diagonal=1)[None, None]


def documents(doc_lens: Tensor, length: int, backend: Backend | None) -> Bias:
    """Who may look at whom, in the form that `backend` takes: earlier in the same document.

    Args:
        doc_lens: (B, most documents) lengths, each row padded with zeros. What lies beyond the
            last document counts as one more.
    """
    if backend is not None and KERNELS[backend].package:
        rest = length - doc_lens.sum(dim=1, keepdim=True)
        every = torch.cat((doc_lens, rest), dim=1).flatten()
        return Documents(F.pad(every.cumsum(0), (1, 0)).to(torch.int32), None)
    if backend is not Backend.flex:
        return document_mask(doc_lens, length)
    from torch.nn.attention.flex_attention import create_block_mask

    document = _document_of(doc_lens, length)

    def may_look(b: Tensor, _: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (document[b, t] == document[b, s]) & (t >= s)

    device = str(doc_lens.device)
    blocks = create_block_mask(may_look, len(doc_lens), None, length, length, device)
    return Documents(None, blocks)


def document_mask(doc_lens: Tensor, length: int) -> Tensor:
    """True where a query may look: earlier in the same document. (B, 1, length, length), bool.

    Args:
        doc_lens: as for `documents`.
    """
    document = _document_of(doc_lens, length)
    positions = torch.arange(length, device=doc_lens.device)
    same = document[:, :, None] == document[:, None, :]  # (B, T, T)
    return (same & (positions[:, None] >= positions[None, :]))[:, None]


def _document_of(doc_lens: Tensor, length: int) -> Tensor:
    """The number of each position's document in its row, (B, length)."""
    ends = doc_lens.cumsum(dim=1)  # (B, docs)
    positions = torch.arange(length, device=doc_lens.device)
    return torch.searchsorted(ends, positions.expand(len(ends), -1).contiguous(), right=True)
