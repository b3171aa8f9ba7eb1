"""Chooses the attention kernel, once per run, and says why.

A kernel of `olmo.model.attention.KERNELS` is available if

1. none of its known limits forbids it (device, type, head size, mask, dropout), and
2. a trial on the device, forward and backward with the model's heads and type, agrees with the
   formula. This finds packages that were built for another torch, or whose arguments changed.

A kernel that the config requests and that is not available is an error. Without a request the
first available one of `list_candidates` is used, and the log names those skipped, with reasons.
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
    build_document_mask,
    compute_attention,
    dense_document_mask,
    load_package,
)


class MaskType(StrEnum):
    """What limits attention besides causality."""

    causal = "causal"  # nothing
    documents = "documents"  # positions attend to their own document only
    any = "any"  # an arbitrary tensor: padding, ALiBi, a bias from the data


class AttentionSetting(NamedTuple):
    """All that decides whether a kernel is available."""

    device: torch.device
    dtype: torch.dtype
    n_heads: int
    n_kv_heads: int
    head_size: int
    mask: MaskType = MaskType.causal
    dropout: bool = False

    def __str__(self) -> str:
        mask = "" if self.mask is MaskType.causal else f", mask {self.mask}"
        return f"{get_gpu_name(self.device)}, {self.dtype}, head size {self.head_size}{mask}"


class KernelChoice(NamedTuple):
    backend: Backend
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


# The kernels that model.flash_attention=true may select.
FLASH_KERNELS = tuple(backend for backend, kernel in KERNELS.items() if kernel.is_flash)


def choose_kernel(
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    backend: Backend | str | None = None,
    mask: MaskType = MaskType.causal,
    with_trial: bool = True,
) -> KernelChoice:
    """The kernel for this model on this device, and the reason.

    Args:
        dtype: the type that attention runs in: autocast's under autocast.
        backend: the requested kernel; None: the fastest.
        mask: the masks that batches will have.
        with_trial: False checks known limits only. A trial's result is cached.

    Raises:
        ValueError: `backend`, or what config.flash_attention requests, is not available.
    """
    setting = AttentionSetting(
        torch.device(device),
        dtype,
        config.n_heads,
        config.effective_n_kv_heads,
        config.d_model // config.n_heads,
        MaskType.any if config.alibi else mask,
        config.attention_dropout > 0,
    )
    if backend is not None:
        backend = Backend(backend)
        if problem := find_kernel_problem(backend, setting, with_trial):
            raise ValueError(
                f"attention backend {backend} is not available: {problem} ({setting}). "
                "Leave `attention` out to use the fastest that works"
            )
        return KernelChoice(backend, "requested" + _describe_fallback(backend))
    skipped: dict[str, list[Backend]] = {}  # problem -> kernels
    for candidate in list_candidates(setting):
        if config.flash_attention and candidate not in FLASH_KERNELS:
            continue
        problem = find_kernel_problem(candidate, setting, with_trial)
        if problem is None:
            reason = f"the fastest for {setting}"
            if config.flash_attention:
                reason = f"model.flash_attention=true; the fastest flash kernel for {setting}"
            elif candidate is Backend.sdpa:
                reason = f"PyTorch's own choice on {setting.device.type}, the others are for GPUs"
            if skipped:
                reason += f"; skipped: {_format_problems(skipped)}"
            return KernelChoice(candidate, reason + _describe_fallback(candidate))
        skipped.setdefault(problem, []).append(candidate)
    request = "model.flash_attention=true" if config.flash_attention else "attention"
    packages = {name: kernel for name, kernel in KERNELS.items() if kernel.package}
    missing = [
        k.install.split(" is ")[0] for name, k in packages.items() if not _is_installed(name)
    ]
    raise ValueError(
        f"{request} is not available: {_format_problems(skipped)} (missing packages: "
        f"{', '.join(missing) or 'none'}; GPU: {get_gpu_name(setting.device)}; head size: "
        f"{setting.head_size}; type: {dtype}; mask: {setting.mask}; torch {torch.__version__}). "
        "Set model.flash_attention: false, or --model.flash_attention=false: another kernel "
        "computes the same"
    )


def list_candidates(setting: AttentionSetting) -> list[Backend]:
    """The kernels to try on this device, fastest first.

    On GPUs the order follows published benchmarks and PyTorch's notes; it was not measured here.
    """
    if setting.device.type != "cuda":
        # No flash kernel works here. They are listed for the error of model.flash_attention=true,
        # which names each one's problem.
        return [Backend.sdpa, Backend.math, *FLASH_KERNELS]
    major = get_capability(setting.device)[0]
    # Within one generation of FlashAttention PyTorch's own kernels come first: the packages are not
    # known to be faster, and all of them take strided views of a fused projection.
    fused = [Backend.flash, Backend.fa2, Backend.cudnn]
    if major == 9:
        fused = [Backend.cudnn, Backend.fa3, Backend.fa4, Backend.flash, Backend.fa2]
    elif major >= 10:
        fused = [Backend.fa4, Backend.cudnn, Backend.flash, Backend.fa2]
    masked = [Backend.flex] if setting.mask is MaskType.documents else []
    return [*fused, *masked, Backend.efficient, Backend.math]


def find_kernel_problem(
    backend: Backend, setting: AttentionSetting, with_trial: bool = True
) -> str | None:
    """None where `backend` works, forward and backward, else one sentence with the remedy."""
    problem = _find_unmet_requirement(backend, setting)
    return run_trial(backend, setting) if problem is None and with_trial else problem


def _find_unmet_requirement(backend: Backend, setting: AttentionSetting) -> str | None:
    """The known limit that forbids a kernel here, as one sentence, or None."""
    device, dtype, head_size = setting.device, setting.dtype, setting.head_size
    kernel = KERNELS[backend]
    if kernel.needs_cuda and device.type != "cuda":
        return f"it is a kernel for NVIDIA GPUs, and this runs on {device.type}"
    if kernel.package and (problem := _find_package_problem(backend)):
        return problem
    if kernel.capabilities is not None:
        major, minor = get_capability(device)
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it works in bfloat16 and float16, not in {dtype}; set precision: amp_bf16"
        lowest, highest = kernel.capabilities
        if major < lowest:
            name = {8: "an Ampere GPU", 9: "a Hopper GPU"}[lowest]
            return (
                f"it needs {name} ({lowest}.0) or newer, and {get_gpu_name(device)} has "
                f"{major}.{minor}"
            )
        if major > highest:
            return f"it is for Hopper GPUs (9.0), and {get_gpu_name(device)} has {major}.{minor}"
        if head_size % 8:
            return f"it needs a head size that is a multiple of 8, not {head_size}"
        if backend is Backend.cudnn and head_size > 128 and (major, minor) != (9, 0):
            return (
                "cuDNN has head sizes over 128 on Hopper GPUs (9.0) only; this is "
                f"{head_size} on {get_gpu_name(device)} ({major}.{minor})"
            )
        if head_size > 256:
            return f"it has head sizes up to 256, not {head_size}; raise model.n_heads"
    if setting.mask is MaskType.documents and not kernel.masks_documents:
        return "it has no mask between documents; fa2, fa3, fa4, flex and efficient do"
    if setting.mask is MaskType.any and not kernel.takes_bias:
        return "it takes no mask or bias from the data or ALiBi; efficient and math do"
    if setting.dropout and not kernel.has_dropout:
        return "it has no dropout; set model.attention_dropout: 0"
    return None


def _find_package_problem(backend: Backend) -> str | None:
    """Why a kernel's package cannot be used, with the remedy, or None."""
    if not _is_installed(backend):
        return f"the package {KERNELS[backend].install}"
    try:
        load_package(backend).flash_attn_func  # noqa: B018
    except Exception as error:  # built for another torch or CUDA, it may raise anything
        return (
            f"its package {KERNELS[backend].package} cannot be used ({_first_line(error)}); "
            f"install it again, for torch {torch.__version__}"
        )
    return None


def _is_installed(backend: Backend) -> bool:
    """Whether a kernel's package is installed; finds out without importing it.

    flash-attn 2 and flash-attn-4 install into the same folder, `flash_attn`. It has an __init__.py
    only from the former, and the subfolder `cute` only from the latter.
    """
    top, _, inner = (KERNELS[backend].package or "").partition(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return False
    if inner:
        return any((Path(p) / inner).is_dir() for p in spec.submodule_search_locations or [])
    return spec.origin is not None


@functools.cache
def run_trial(backend: Backend, setting: AttentionSetting) -> str | None:
    """Compare a kernel's output and gradients with the formula's, on a small input.

    Returns None where they agree, else one sentence. It has a random generator of its own, so the
    run's random numbers do not change.
    """
    B, T = 2, 144
    # Documents of several lengths, one of them empty, and positions after the last document.
    doc_lens = torch.tensor([[50, 80, 0], [7, 100, 37]], device=setting.device)
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        x = torch.randn(B, heads, T, setting.head_size, generator=generator)
        return x.to(setting.device, setting.dtype)

    inputs = [draw(setting.n_heads), draw(setting.n_kv_heads), draw(setting.n_kv_heads)]
    grad_output = draw(setting.n_heads)
    mask: Tensor | None = None
    bias: Bias | None = None
    if setting.mask is not MaskType.causal or backend is Backend.flex:
        lengths = doc_lens if setting.mask is not MaskType.causal else doc_lens.new_full((B, 1), T)
        mask = dense_document_mask(lengths, T)
        bias = mask if setting.mask is MaskType.any else build_document_mask(lengths, T, backend)

    def compute(by: Backend, dtype: torch.dtype, bias: Bias | None) -> list[Tensor]:
        qkv = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        y = compute_attention(qkv[0], qkv[1], qkv[2], by, bias)
        return [y.detach(), *torch.autograd.grad(y, qkv, grad_output.to(dtype))]

    try:
        with torch.inference_mode(False), torch.enable_grad():
            results = compute(backend, setting.dtype, bias)
            expected = compute(Backend.math, torch.float32, mask)
    except Exception as error:
        return f"its trial failed ({_first_line(error)}); use another kernel"
    for name, a, b in zip(("its output", "dq", "dk", "dv"), results, expected, strict=True):
        difference = float((a.float() - b).abs().max() / b.abs().max())
        if not difference < 0.05:  # written so that NaN fails
            return f"in its trial {name} is {difference:.0%} off the formula; use another kernel"
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@functools.cache
def get_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, major and minor: (8, 0) A100, (9, 0) H100, (10, 0) B200."""
    return torch.cuda.get_device_capability(device)


def get_gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"none ({device.type})"


def _describe_fallback(backend: Backend) -> str:
    if KERNELS[backend].takes_bias:
        return ""
    return "; batches with padding or a bias use the efficient kernel"


def _format_problems(problems: dict[str, list[Backend]]) -> str:
    return "; ".join(f"{', '.join(names)} ({problem})" for problem, names in problems.items())
