"""Layer norms over the last dimension: OLMo's three types, with or without weight and bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo.config import LayerNormType, ModelConfig


class LayerNormBase(nn.Module):
    """The base class: `weight` (size,) and `bias` (size,), each of which may be None.

    Args:
        config: its layer_norm_eps, layer_norm_with_affine and bias_for_layer_norm are used.
        size: of the last dimension; d_model by default.
        elementwise_affine: whether there is a weight; None: config.layer_norm_with_affine.
    """

    def __init__(
        self,
        config: ModelConfig,
        size: int | None = None,
        elementwise_affine: bool | None = None,
    ) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps
        self.normalized_shape = (size or config.d_model,)
        affine = config.layer_norm_with_affine if elementwise_affine is None else elementwise_affine
        biased = config.bias_for_layer_norm
        biased = config.include_bias if biased is None else biased
        shape, device = self.normalized_shape, config.init_device
        weight = nn.Parameter(torch.ones(shape, device=device)) if affine else None
        bias = nn.Parameter(torch.zeros(shape, device=device)) if affine and biased else None
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        size: int | None = None,
        elementwise_affine: bool | None = None,
    ) -> LayerNormBase:
        """The norm of config.layer_norm_type."""
        norm_type = LayerNormType(config.layer_norm_type)
        if norm_type is LayerNormType.rms:
            return RMSLayerNorm(config, size, elementwise_affine)
        low_precision = norm_type is LayerNormType.low_precision
        return LayerNorm(config, size, low_precision, elementwise_affine)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}, affine={self.weight is not None}"


class LayerNorm(LayerNormBase):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016, arXiv:1607.06450).

    With `low_precision` it computes in autocast's dtype; without, in float32 under autocast.
    """

    def __init__(
        self,
        config: ModelConfig,
        size: int | None = None,
        low_precision: bool = False,
        elementwise_affine: bool | None = None,
    ) -> None:
        super().__init__(config, size, elementwise_affine)
        self.low_precision = low_precision

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if not (self.low_precision and torch.is_autocast_enabled(kind)):
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        dtype = torch.get_autocast_dtype(kind)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


class RMSLayerNorm(LayerNormBase):
    """x / sqrt(mean(x²) + eps) * weight + bias (Zhang & Sennrich 2019, arXiv:1910.07467).

    The normalisation is float32; its result is cast to x's dtype before the weight is applied.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x32 = x.float()
            x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
            x = x32.to(x.dtype)
        if self.weight is None:
            return x
        return self.weight * x if self.bias is None else self.weight * x + self.bias
