"""What each module was given and gave, for chosen steps: to compare two trainers layer by layer."""

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
    """Write the first forward pass inside to `folder`, as OLMo does, and compile nothing there.

    model.transformer.wte_0_input.pt and …_output.pt hold the first argument and the result of the
    first call of that module; the model itself comes last. The head is no call (its product is
    part of the loss), so its logits are not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    calls: dict[str, int] = {}

    def write(name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        call = calls.get(name, 0)
        calls[name] = call + 1
        given = arguments[0] if arguments else torch.empty(0)
        torch.save(_plain(given), folder / f"{name}_{call}_input.pt")
        torch.save(_plain(output), folder / f"{name}_{call}_output.pt")
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


def _plain(value: Any) -> Any:
    """Tensors apart from the graph, in plain tuples: what loads without running code."""
    if isinstance(value, Tensor):
        return value.detach()
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value
