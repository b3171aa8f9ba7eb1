"""Inputs and outputs of every module at chosen steps, to compare two trainers layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def traced(model: nn.Module, folder: Path) -> Iterator[None]:
    """Write the first forward pass inside the block to `folder`, in OLMo's format; uncompiled.

    model.transformer.wte_0_input.pt and …_output.pt hold the first argument and the result of that
    module's first call. The model itself comes last and ends the trace. Logits are missing: the
    head's product is part of the loss, not a call of a module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    calls: dict[str, int] = {}

    def write(name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        call = calls.get(name, 0)
        calls[name] = call + 1
        first = arguments[0] if arguments else torch.empty(0)
        torch.save(_detach(first), folder / f"{name}_{call}_input.pt")
        torch.save(_detach(output), folder / f"{name}_{call}_output.pt")
        if module is model:
            remove()

    hooks = [
        module.register_forward_hook(partial(write, name))
        for name, module in model.named_modules(prefix="model")
    ]

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        remove()


def _detach(value: Any) -> Any:
    """Without the graph, in plain tuples, which load with weights_only=True."""
    if isinstance(value, Tensor):
        return value.detach()
    return tuple(map(_detach, value)) if isinstance(value, tuple) else value
