"""F.linear, with faster paths on a CPU: oneDNN for large products and for a single row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN = torch.backends.mkldnn.is_available()
# Below this many rows or columns of the weight, oneDNN's call overhead exceeds what it saves.
_MIN_SIZE = 512


def get_product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with x runs in: autocast's under autocast, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: by oneDNN for float32 on a CPU, else by torch."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def use_column_major_weights(model: nn.Module) -> None:
    """Store weights with more outputs than inputs in column-major order, for generation on a CPU.

    torch's product of a single row reads such weights faster than any product reads row-major ones.
    Results are equal up to rounding. The conversion costs as much as about ten tokens.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.out_features > layer.in_features:
            weight = layer.weight.data
            if weight.dtype == torch.float32 and weight.device.type == "cpu":
                layer.weight.data = weight.t().contiguous().t()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., d_in) @ weight (d_out, d_in).T + bias. In training it is F.linear itself:
    no trained bit depends on this function.

    In generation x is a single row: the cost is that of reading the weight, and torch's product
    takes a fifth longer for it than oneDNN's.
    """
    if (
        not torch.is_grad_enabled()
        and x.numel() == x.shape[-1]  # a single row
        and min(weight.shape) >= _MIN_SIZE
        and weight.is_contiguous()
        and not torch.is_autocast_enabled(x.device.type)
    ):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)
