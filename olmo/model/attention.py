"""Attention: the kernels that can compute it (KERNELS), and the function that calls one of them.

`olmo.model.kernel_choice` reads the table, tries the kernels on the device, and picks one. This
module only calls the one that was picked, and gives each the mask in the form that it takes.

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
    """How a kernel is called, and what it supports."""

    # The backend of F.scaled_dot_product_attention that it is, if it is one.
    sdpa_backend: SDPBackend | None = None
    # Or a module with flash_attn_func and flash_attn_varlen_func. In all three packages (read in
    # flash-attn 2.8.3, flash-attn-4 4.0.0b36 and FlashAttention 3's source) the arguments used here
    # have the same names: q, k, v as (B, T, H, D), causal, deterministic; for documents
    # (B * T, H, D) with cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k. Others differ even
    # in their position, so all but q, k, v are passed by name.
    package: str | None = None
    install: str = ""  # what is missing without the package, and how to install it
    needs_cuda: bool = True
    # Lowest and highest major compute capability. Kernels with such a range also need 16-bit types
    # and head sizes that are multiples of 8, up to 256.
    capabilities: tuple[int, int] | None = None
    masks_documents: bool = True  # supports a mask between documents
    takes_bias: bool = False  # supports any mask, and a bias that is added to the scores
    has_dropout: bool = True  # supports dropout of attention weights
    is_flash: bool = False  # is one that model.flash_attention=true may select


ANY = 99  # no highest major
KERNELS = {
    Backend.sdpa: Kernel(needs_cuda=False, takes_bias=True),
    Backend.math: Kernel(SDPBackend.MATH, needs_cuda=False, takes_bias=True),
    Backend.efficient: Kernel(SDPBackend.EFFICIENT_ATTENTION, takes_bias=True),
    Backend.cudnn: Kernel(
        SDPBackend.CUDNN_ATTENTION, capabilities=(8, ANY), masks_documents=False, is_flash=True
    ),
    Backend.flash: Kernel(
        SDPBackend.FLASH_ATTENTION, capabilities=(8, ANY), masks_documents=False, is_flash=True
    ),
    Backend.fa2: Kernel(
        package="flash_attn",
        install="flash-attn 2 is missing: uv pip install flash-attn --no-build-isolation",
        capabilities=(8, ANY),
        is_flash=True,
    ),
    Backend.fa3: Kernel(
        package="flash_attn_interface",
        install="FlashAttention 3 is missing: python setup.py install in hopper/ of "
        "github.com/Dao-AILab/flash-attention",
        capabilities=(9, 9),
        has_dropout=False,
        is_flash=True,
    ),
    Backend.fa4: Kernel(
        package="flash_attn.cute",
        install="flash-attn-4 is missing: uv pip install --pre flash-attn-4",
        capabilities=(9, ANY),
        has_dropout=False,
        is_flash=True,
    ),
    Backend.flex: Kernel(needs_cuda=False, has_dropout=False),
}
# Used for a mask or bias that the chosen kernel does not take: the efficient kernel if it can, else
# plain products.
_BIAS_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_loaded_packages: dict[Backend, Any] = {}


class DocumentMask(NamedTuple):
    """A causal mask within documents, for kernels that skip the masked part of the work.

    Built once per forward pass for all blocks, with the one field that the kernel takes. Other
    kernels take `dense_document_mask`.
    """

    cu_seqlens: Tensor | None
    """For packages: cumulative lengths of the documents in the flattened batch, from 0 to B * T,
    (documents + 1,) int32. Length 0 is allowed."""

    block_mask: Any
    """For flex: its BlockMask."""


Bias = Tensor | DocumentMask


def compute_attention(
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
        backend: the kernel, from `choose_kernel`. For a tensor as bias, one that takes it is used
            instead where this one does not.
        bias: a tensor that broadcasts to (B, H, T, S): a float one is added to the scores, a bool
            one is True where a query may attend to a key. Or a DocumentMask made for `backend`. It
            must include the causal mask.
        causal: without a bias, query t attends to keys up to t, and T must be S.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, H, T, D)
    """
    kernel = KERNELS[backend]
    if kernel.package and not isinstance(bias, Tensor):
        return _call_package(q, k, v, backend, bias, causal, dropout)
    if backend is Backend.flex and isinstance(bias, DocumentMask):
        return _call_flex(q, k, v, bias)
    assert not isinstance(bias, DocumentMask), f"{backend} takes dense_document_mask"
    context: Callable[[], Any] = nullcontext
    if backend is not Backend.sdpa:
        allowed = _BIAS_BACKENDS
        if kernel.sdpa_backend and (bias is None or backend is Backend.math):
            allowed = [kernel.sdpa_backend]
        context = functools.partial(sdpa_kernel, allowed)
    if (
        q.is_cuda
        and q.shape[1] != k.shape[1]
        and (bias is not None or backend in (Backend.efficient, Backend.flex))
    ):
        # The memory-efficient kernel has no grouped-query attention: repeat keys and values.
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


def load_package(backend: Backend) -> Any:
    """Import a kernel's package. Raises whatever the import raises."""
    if backend not in _loaded_packages:
        package = KERNELS[backend].package
        assert package is not None
        _loaded_packages[backend] = importlib.import_module(package)
    return _loaded_packages[backend]


def _call_package(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: Backend,
    documents: DocumentMask | None,
    causal: bool,
    dropout: float,
) -> Tensor:
    module = load_package(backend)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, H, D)
    options: dict[str, Any] = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    if KERNELS[backend].has_dropout:
        options["dropout_p"] = dropout
    if documents is None:
        out = module.flash_attn_func(q, k, v, causal=causal, **options)
    else:
        B, T = q.shape[:2]
        out = module.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)),  # (B * T, H, D)
            cu_seqlens_q=documents.cu_seqlens,
            cu_seqlens_k=documents.cu_seqlens,
            # An upper bound is enough. The true maximum would have to be copied from the device,
            # which waits for it.
            max_seqlen_q=T,
            max_seqlen_k=T,
            causal=True,
            **options,
        )
        out = (out[0] if isinstance(out, tuple) else out).unflatten(0, (B, T))
    # FlashAttention 4, and old builds of 3, return (output, log-sum-exp of each row).
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _call_flex(q: Tensor, k: Tensor, v: Tensor, documents: DocumentMask) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # It is a fused kernel only when compiled. Otherwise (on the CPU here) all scores are in memory:
    # B * H * T * S numbers.
    compute: Any = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        compute = _compiled_flex()
    gqa = q.shape[1] != k.shape[1]
    return compute(q, k, v, block_mask=documents.block_mask, enable_gqa=gqa)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def causal_bias(length: int, device: torch.device | str = "cpu") -> Tensor:
    """0 on and below the diagonal, float32's lowest number above: (1, 1, length, length)."""
    lowest = torch.finfo(torch.float32).min
    bias = torch.full((length, length), lowest, dtype=torch.float32, device=device)
    return bias.triu(diagonal=1)[None, None]


def build_document_mask(doc_lens: Tensor, length: int, backend: Backend | None) -> Bias:
    """A mask that allows attention to earlier positions of the same document only, in the form that
    `backend` takes.

    Args:
        doc_lens: (B, max documents), lengths in each row, padded with 0. Positions after the last
            document form one more.
        length: T.
    """
    if backend is not None and KERNELS[backend].package:
        rest = length - doc_lens.sum(dim=1, keepdim=True)
        lengths = torch.cat((doc_lens, rest), dim=1).flatten()  # (B * (max documents + 1),)
        return DocumentMask(F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), None)
    if backend is not Backend.flex:
        return dense_document_mask(doc_lens, length)
    from torch.nn.attention.flex_attention import create_block_mask

    ids = _document_ids(doc_lens, length)

    def may_attend(b: Tensor, _: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (ids[b, t] == ids[b, s]) & (t >= s)

    device = str(doc_lens.device)
    block_mask = create_block_mask(may_attend, len(doc_lens), None, length, length, device)
    return DocumentMask(None, block_mask)


def dense_document_mask(doc_lens: Tensor, length: int) -> Tensor:
    """The same as a bool tensor, (B, 1, length, length), True where a query may attend to a key."""
    ids = _document_ids(doc_lens, length)
    positions = torch.arange(length, device=doc_lens.device)
    same = ids[:, :, None] == ids[:, None, :]  # (B, T, T)
    return (same & (positions[:, None] >= positions[None, :]))[:, None]


def _document_ids(doc_lens: Tensor, length: int) -> Tensor:
    """The index of each position's document in its row, (B, length)."""
    ends = doc_lens.cumsum(dim=1)  # (B, docs)
    positions = torch.arange(length, device=doc_lens.device)
    return torch.searchsorted(ends, positions.expand(len(ends), -1).contiguous(), right=True)
