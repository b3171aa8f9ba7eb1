"""Layer norms over the last dimension, in OLMo's three kinds, with or without weight and bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo.config import LayerNormType, ModelConfig


class LayerNormBase(nn.Module):
    """What the kinds share: `weight` (size,) and `bias` (size,), either of which may be None.

    Args:
        config: layer_norm_eps, layer_norm_with_affine and bias_for_layer_norm count here.
        size: of the last dimension; d_model by default.
        elementwise_affine: whether there is a weight; None asks config.layer_norm_with_affine.
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
        """The kind that config.layer_norm_type names."""
        kind = LayerNormType(config.layer_norm_type)
        if kind is LayerNormType.rms:
            return RMSLayerNorm(config, size, elementwise_affine)
        low = kind is LayerNormType.low_precision
        return LayerNorm(config, size, low_precision=low, elementwise_affine=elementwise_affine)

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
    """Mean and variance normalised (Ba et al. 2016, arXiv:1607.06450).

    With `low_precision` it computes in autocast's type; without, autocast keeps it in float32.
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
    """Divided by the root mean square (Zhang & Sennrich 2019, arXiv:1910.07467).

    The statistics are float32; the result goes back to the input's type before the weight.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            x = wide.to(x.dtype)
        if self.weight is None:
            return x
        return self.weight * x if self.bias is None else self.weight * x + self.bias
