"""The gradients of one training step: forward and backward over microbatches.

As OLMo computes it: the cross-entropy is summed over the labels that count and divided by the
number of input tokens B*T. The reported loss is therefore (T-1)/T of the mean over labels, and
masked labels do not raise the weight of the others.

Shapes: B instances of this process, M of a microbatch, T tokens, V rows of the embedding.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo.config import TrainConfig
from olmo.data.batches import get_labels, select_model_inputs
from olmo.distributed.reduce import GradientReducer
from olmo.precision.autocast import autocast_context


@dataclass
class Losses:
    """Of one step and process, summed over labels and divided by B*T. Scalars on the device."""

    ce: Tensor  # cross-entropy, in nats
    z: Tensor | None  # None without softmax_auxiliary_loss


def keep_freed_memory() -> None:
    """What one step frees stays with the process, for the next (CPU, glibc).

    Otherwise each step's large tensors go back to the kernel, which zeroes every page before it is
    used again: a tenth of the CPU time of a small model's step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# Modes of torch.compile that replay CUDA graphs.
GRAPHS = ("reduce-overhead", "max-autotune")


@torch.no_grad()
def clear_gradients(optimizer: torch.optim.Optimizer, cfg: TrainConfig) -> None:
    """Before a step: no gradients.

    A CUDA graph returns gradients in its own memory, which its next replay overwrites; with a
    second microbatch torch ends the run for that reason. So if graphs are replayed, gradients have
    separate buffers that backward adds to. Otherwise backward allocates them, which saves a pass.
    """
    if cfg.compile is None or cfg.compile.mode not in GRAPHS:
        optimizer.zero_grad(set_to_none=True)
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        torch._foreach_zero_([p.grad for p in group["params"]])


def microbatches(batch: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Slices of `size` instances, the last one maybe smaller."""
    n = len(batch["input_ids"])
    for start in range(0, n, size):
        # Tensors have the instances first, and so do lists (metadata, max_doc_lens).
        yield {name: value[start : start + size] for name, value in batch.items()}


def forward_backward(
    model: nn.Module,
    batch: dict[str, Any],
    cfg: TrainConfig,
    device: torch.device,
    step: int,
    reducer: GradientReducer | None = None,
) -> Losses:
    """Gradients of this process's batch, added to the parameters' `.grad`: of the losses' sum over
    labels, divided by B*T.

    Args:
        batch: `input_ids` (B, T), `index` (B,) and the loader's other tensors, on the host.
        step: from 1 on; with the samples it decides the dropout masks.

    With `reducer` the averaging over processes has started when this returns: `reducer.finish()`
    """
    z_multiplier = (cfg.auxiliary_loss_multiplier or 0.0) if cfg.softmax_auxiliary_loss else 0.0
    tokens = batch["input_ids"].numel()
    drops = cfg.model.attention_dropout or cfg.model.residual_dropout or cfg.model.embedding_dropout
    ce, z = torch.zeros((), device=device), torch.zeros((), device=device)
    parts = list(microbatches(batch, cfg.device_train_microbatch_size))
    for i, micro in enumerate(parts):
        if reducer is not None and i == len(parts) - 1:
            reducer.prepare_for_backward()
        if drops:
            # What is dropped depends on the run, the step and the sample alone: not on what was
            # computed before, and so not on where the run was interrupted.
            torch.manual_seed(derive_seed(cfg.seed, step, micro["index"].tolist()[0]))
        micro = {
            k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v
            for k, v in micro.items()
            if k != "index"
        }
        if cfg.compile is not None and "doc_lens" in micro:
            # How many documents there are at most differs from batch to batch.
            micro["doc_lens"] = F.pad(micro["doc_lens"], (0, 1))  # two of them at least
            torch._dynamo.mark_dynamic(micro["doc_lens"], 1)
        with autocast_context(cfg, device):
            labels = get_labels(micro)
            loss = model(
                **select_model_inputs(micro), labels=labels, z_multiplier=z_multiplier
            ).loss
        (loss.total / tokens).backward()
        ce += loss.ce.detach() / tokens
        z += loss.z.detach() / tokens
    return Losses(ce, z if cfg.softmax_auxiliary_loss else None)


def derive_seed(seed: int, step: int, sample: int) -> int:
    """A seed for torch's generator, the same wherever and whenever this sample is computed."""
    digest = hashlib.blake2b(f"{seed}/{step}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
