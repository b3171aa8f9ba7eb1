"""Products with a weight, on a CPU by the library that is faster at them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN = torch.backends.mkldnn.is_available()
_WIDE = 512
"""Below so many rows or columns oneDNN takes longer to begin than it saves."""


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; in float32 on a CPU by oneDNN, elsewhere as torch chooses."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def by_columns(model: nn.Module) -> None:
    """Lay a model's float32 weights that widen by columns, where it will only generate, on a CPU.

    The values are the same and products are equal up to rounding, but torch's product of a single
    row reads such weights faster than any reads them by rows. It takes as long as some ten tokens.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.out_features > layer.in_features:
            weight = layer.weight.data
            if weight.dtype == torch.float32 and weight.device.type == "cpu":
                layer.weight.data = weight.t().contiguous().t()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., d_in) @ weight (d_out, d_in).T + bias, as `F.linear`, and bit for bit so in training.

    A single row that learns nothing, which is a token that is generated, costs what reading the
    weight costs, and torch's own product takes a fifth longer for that than oneDNN's.
    """
    if (
        not torch.is_grad_enabled()
        and x.numel() == x.shape[-1]
        and min(weight.shape) >= _WIDE
        and weight.is_contiguous()
        and not torch.is_autocast_enabled(x.device.type)
    ):
        return by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)
