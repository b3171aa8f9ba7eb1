"""AdamW whose state takes three bytes a weight instead of eight, in the manner of MS-AMP's O2
(Peng et al. 2023, arXiv:2310.18313).

The first moment is kept in 8 bits (e4m3), the second in 16 (float16), each tensor with a scale; an
update unpacks one parameter's, computes as ever, and packs them again. Scales are powers of two,
so that packing what was unpacked changes nothing: a checkpoint holds plain float32 moments, as
without this, and a run resumed from it goes on with the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo.optim.adamw import AdamW
from olmo.optim.clipping import Group, is_sharded, with_grad

KEPT = {"exp_avg": torch.float8_e4m3fn, "exp_avg_sq": torch.float16}


class Packed(NamedTuple):
    """value * scale is the tensor."""

    value: Tensor
    scale: Tensor  # (), float32


def pack(x: Tensor, dtype: torch.dtype) -> Packed:
    """x in `dtype`, its largest magnitude in the upper half of the type's range."""
    mantissa, exponent = torch.frexp(x.abs().amax().float() / torch.finfo(dtype).max)
    exponent = exponent - (mantissa == 0.5).int()  # a power of two is its own scale
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    return Packed((x / scale).to(dtype), scale)


def unpack(packed: Packed) -> Tensor:
    return packed.value.float() * packed.scale


class PackedAdamW(AdamW):
    """AdamW with packed moments; on one process or replicas of it (ddp).

    Raises:
        ValueError: at the first step, for parameters that are split over processes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._selective_updates:
            raise ValueError(
                "optimizer.packed_state has one scale for a whole tensor, selective_updates works "
                "entry by entry; set one of them to false"
            )
        self.register_state_dict_post_hook(_with_plain_moments)

    def _step_group(self, group: Group) -> None:
        for name, p in with_grad(group):
            if is_sharded(p):
                raise ValueError(
                    f"optimizer.packed_state keeps whole tensors, and {name} is split over "
                    "processes; set distributed_strategy: ddp or optimizer.packed_state: false"
                )
            state = self.state[p]
            if "step" in state:
                for moment in KEPT:
                    if isinstance(state[moment], Packed):
                        state[moment] = unpack(state[moment])
            super()._step_group({**group, "params": [p], "param_names": [name]})
            for moment, dtype in KEPT.items():
                state[moment] = pack(state[moment], dtype)

    def get_state_for_param(self, param: Tensor) -> dict[str, Tensor | None]:
        kept = super().get_state_for_param(param)
        return {n: unpack(v) if isinstance(v, Packed) else v for n, v in kept.items()}


def _with_plain_moments(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state as AdamW's own: what is saved."""
    plain = {
        number: {n: unpack(v) if isinstance(v, Packed) else v for n, v in kept.items()}
        for number, kept in state_dict["state"].items()
    }
    return {**state_dict, "state": plain}
