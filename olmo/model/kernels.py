"""Which kernel computes attention, and why; chosen once, by trying it.

A kernel is had if nothing that is known speaks against it and a trial on the device, forward and
backward, at the model's heads and type, agrees with the formula. What is asked for and cannot be
had is an error; where nothing is asked for, the first that can be had is taken, and what was
passed over is named with the reason.
"""

from __future__ import annotations

import functools
import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from olmo.config import ModelConfig
from olmo.model.attention import (
    KERNELS,
    Backend,
    Bias,
    attention,
    document_mask,
    documents,
    load,
)


class Mask(StrEnum):
    """Who may look at whom, beyond that nobody looks ahead."""

    causal = "causal"  # everybody
    documents = "documents"  # those of one document
    any = "any"  # what a tensor says: padding, ALiBi, a bias of the data's


class Setting(NamedTuple):
    """What attention is to compute, and where."""

    device: torch.device
    dtype: torch.dtype
    n_heads: int
    n_kv_heads: int
    head_size: int
    mask: Mask = Mask.causal
    dropout: bool = False

    def __str__(self) -> str:
        masked = "" if self.mask is Mask.causal else f", mask {self.mask}"
        return f"{gpu(self.device)}, {self.dtype}, head size {self.head_size}{masked}"


class Choice(NamedTuple):
    backend: Backend
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


# The kinds of kernel that model.flash_attention=true may stand for.
FLASH = tuple(backend for backend, kernel in KERNELS.items() if kernel.flash)


def choose(
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    backend: Backend | str | None = None,
    mask: Mask = Mask.causal,
    tries: bool = True,
) -> Choice:
    """The kernel for this model on this device, and why.

    Args:
        dtype: what attention runs in, that is autocast's type where autocast is on.
        backend: insist on this one.
        mask: what batches will come with.
        tries: try it; False goes by what is known alone.

    Raises:
        ValueError: config.flash_attention, or `backend`, asks for what is not available here.
    """
    setting = Setting(
        torch.device(device),
        dtype,
        config.n_heads,
        config.effective_n_kv_heads,
        config.d_model // config.n_heads,
        Mask.any if config.alibi else mask,
        config.attention_dropout > 0,
    )
    if backend is not None:
        backend = Backend(backend)
        if problem := find_kernel_problem(backend, setting, tries):
            raise ValueError(
                f"attention backend {backend} is not available: {problem} ({setting}). "
                "Leave `attention` out to have the fastest that works"
            )
        return Choice(backend, "asked for" + _elsewhere(backend, setting))
    passed: dict[str, list[Backend]] = {}
    for candidate in order(setting):
        if config.flash_attention and candidate not in FLASH:
            continue
        problem = find_kernel_problem(candidate, setting, tries)
        if problem is None:
            reason = f"the fastest for {setting}"
            if config.flash_attention:
                reason = f"model.flash_attention=true; the fastest of its kind for {setting}"
            elif candidate is Backend.sdpa:
                reason = f"PyTorch's own pick on {setting.device.type}, the others are for GPUs"
            if passed:
                reason += f"; passed over: {_listed(passed)}"
            return Choice(candidate, reason + _elsewhere(candidate, setting))
        passed.setdefault(problem, []).append(candidate)
    wish = "model.flash_attention=true" if config.flash_attention else "attention"
    packages = {name: kernel for name, kernel in KERNELS.items() if kernel.package}
    missing = [p.install.split(" is ")[0] for name, p in packages.items() if not _is_there(name)]
    raise ValueError(
        f"{wish} is not available: {_listed(passed)} (missing packages: "
        f"{', '.join(missing) or 'none'}; GPU: {gpu(setting.device)}; head size: "
        f"{setting.head_size}; type: {dtype}; mask: {setting.mask}; torch {torch.__version__}). "
        "Override it with --model.flash_attention=false, which computes the same by another kernel"
    )


def order(setting: Setting) -> list[Backend]:
    """The kernels worth a try here, fastest first, by what others published and PyTorch's own
    notes; on the GPU nothing of it was measured here."""
    if setting.device.type != "cuda":
        cannot = list(FLASH)  # named where they are asked for
        return [Backend.sdpa, Backend.math, *cannot]
    major = capability(setting.device)[0]
    # cuDNN and flash of PyTorch take views of a packed projection; the packages do so as well, but
    # are not known to be faster than these at the same generation.
    fused = [Backend.flash, Backend.fa2, Backend.cudnn]
    if major == 9:
        fused = [Backend.cudnn, Backend.fa3, Backend.fa4, Backend.flash, Backend.fa2]
    elif major >= 10:
        fused = [Backend.fa4, Backend.cudnn, Backend.flash, Backend.fa2]
    masked = [Backend.flex] if setting.mask is Mask.documents else []
    return [*fused, *masked, Backend.efficient, Backend.math]


def find_kernel_problem(backend: Backend, setting: Setting, tries: bool = True) -> str | None:
    """None where `backend` works, forward and backward, else one sentence with the remedy."""
    problem = _known(backend, setting)
    return trial(backend, setting) if problem is None and tries else problem


def _known(backend: Backend, setting: Setting) -> str | None:
    """What speaks against a kernel before it is tried."""
    device, dtype, head_size = setting.device, setting.dtype, setting.head_size
    kernel = KERNELS[backend]
    if kernel.cuda and device.type != "cuda":
        return f"it is a kernel for NVIDIA GPUs, and this runs on {device.type}"
    if kernel.package and (problem := _package(backend)):
        return problem
    if kernel.capability is not None:
        major, minor = capability(device)
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it works in bfloat16 and float16, not in {dtype}; set precision: amp_bf16"
        least, most = kernel.capability
        if major < least:
            name = {8: "an Ampere GPU", 9: "a Hopper GPU"}[least]
            return f"it needs {name} ({least}.0) or newer, and {gpu(device)} is of {major}.{minor}"
        if major > most:
            return f"it is for Hopper GPUs (9.0), and {gpu(device)} is of {major}.{minor}"
        if head_size % 8:
            return f"it needs a head size that is a multiple of 8, not {head_size}"
        if backend is Backend.cudnn and head_size > 128 and (major, minor) != (9, 0):
            return (
                "cuDNN has head sizes over 128 on Hopper GPUs (9.0) only; this is "
                f"{head_size} on {gpu(device)}, of {major}.{minor}"
            )
        if head_size > 256:
            return f"it goes up to head size 256, and this is {head_size}; raise model.n_heads"
    if setting.mask is Mask.documents and not kernel.documents:
        return "it takes no mask between documents; fa2, fa3, fa4, flex and efficient do"
    if setting.mask is Mask.any and not kernel.bias:
        return "it takes no mask or bias of the data's or of ALiBi; efficient and math do"
    if setting.dropout and not kernel.dropout:
        return "it drops no attention weights; set model.attention_dropout: 0"
    return None


def _package(backend: Backend) -> str | None:
    """What is wrong with a kernel's package, with the remedy."""
    if not _is_there(backend):
        return f"the package {KERNELS[backend].install}"
    try:
        load(backend).flash_attn_func  # noqa: B018
    except Exception as error:  # built for another torch or CUDA: anything may go wrong
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"its package {KERNELS[backend].package} cannot be used ({reason}); install it again, "
            f"for torch {torch.__version__}"
        )
    return None


def _is_there(backend: Backend) -> bool:
    """Whether a kernel's package is installed. Looking imports nothing of flash-attn's.

    flash-attn 2 and flash-attn-4 share a folder, `flash_attn`, which is there with either: it has
    an __init__ of its own only with the former, and `cute` only with the latter.
    """
    top, _, inner = (KERNELS[backend].package or "").partition(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return False
    if inner:
        places = spec.submodule_search_locations or []
        return any((Path(place) / inner).is_dir() for place in places)
    return spec.origin is not None


@functools.cache
def trial(backend: Backend, setting: Setting) -> str | None:
    """Forward and backward on a little data, beside the formula: what went wrong, or None.

    It draws from a generator of its own, so that a run's random numbers stay what they were.
    """
    B, T = 2, 144
    # Documents of several lengths, one of them empty, and what lies beyond the last one.
    doc_lens = torch.tensor([[50, 80, 0], [7, 100, 37]], device=setting.device)
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int) -> Tensor:
        x = torch.randn(B, heads, T, setting.head_size, generator=generator)
        return x.to(setting.device, setting.dtype)

    inputs = [drawn(setting.n_heads), drawn(setting.n_kv_heads), drawn(setting.n_kv_heads)]
    towards = drawn(setting.n_heads)
    mask: Tensor | None = None
    bias: Bias | None = None
    if setting.mask is not Mask.causal or backend is Backend.flex:
        lengths = doc_lens if setting.mask is not Mask.causal else doc_lens.new_full((B, 1), T)
        mask = document_mask(lengths, T)
        bias = mask if setting.mask is Mask.any else documents(lengths, T, backend)

    def computed(by: Backend, dtype: torch.dtype, bias: Bias | None) -> list[Tensor]:
        qkv = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        y = attention(qkv[0], qkv[1], qkv[2], by, bias)
        return [y.detach(), *torch.autograd.grad(y, qkv, towards.to(dtype))]

    try:
        with torch.inference_mode(False), torch.enable_grad():
            found = computed(backend, setting.dtype, bias)
            exact = computed(Backend.math, torch.float32, mask)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"a trial of it failed ({reason}); leave it out"
    for name, ours, theirs in zip(("its output", "dq", "dk", "dv"), found, exact, strict=True):
        off = float((ours.float() - theirs).abs().max() / theirs.abs().max())
        if not off < 0.05:  # NaN too
            return f"in a trial {name} was {off:.0%} off what the formula says; leave it out"
    return None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"none ({device.type})"


def _elsewhere(backend: Backend, setting: Setting) -> str:
    """Who computes what the chosen kernel does not."""
    if backend in (Backend.math, Backend.sdpa, Backend.efficient):
        return ""
    return "; padding or a bias, should they come, by the efficient kernel"


def _listed(passed: dict[str, list[Backend]]) -> str:
    return "; ".join(f"{', '.join(names)} ({problem})" for problem, names in passed.items())
