"""AdamW with quantized moments: 3 bytes per weight instead of 8, as in MS-AMP's O2 (Peng et al.
2023, arXiv:2310.18313).

The first moment is stored in 8 bits (e4m3), the second in 16 (float16), each tensor with one scale.
An update unpacks the moments of one parameter, runs AdamW, and packs them again. Scales are powers
of two, so pack(unpack(x)) is x: checkpoints contain float32 moments as without this option, and a
resumed run continues with the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo.optim.adamw import AdamW
from olmo.optim.optimizer import ParamGroup, is_dtensor, params_with_grad

MOMENT_DTYPES = {"exp_avg": torch.float8_e4m3fn, "exp_avg_sq": torch.float16}


class PackedTensor(NamedTuple):
    """A tensor stored as value * scale."""

    value: Tensor  # float8_e4m3fn or float16
    scale: Tensor  # (), float32


def pack(x: Tensor, dtype: torch.dtype) -> PackedTensor:
    """x in `dtype`, with a scale that is the smallest power of two with which it fits."""
    mantissa, exponent = torch.frexp(x.abs().amax().float() / torch.finfo(dtype).max)
    exponent = exponent - (mantissa == 0.5).int()  # frexp gives 2^k as 0.5 * 2^(k+1)
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    return PackedTensor((x / scale).to(dtype), scale)


def unpack(packed: PackedTensor) -> Tensor:
    return packed.value.float() * packed.scale


class PackedAdamW(AdamW):
    """AdamW with packed moments, for one process or replicas (ddp).

    `check_optimizer` refuses selective updates, `check_device` sharded parameters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_state_dict_post_hook(_unpack_state_dict)

    def _step_group(self, group: ParamGroup) -> None:
        for name, p in params_with_grad(group):
            assert not is_dtensor(p)
            state = self.state[p]
            state.update(_unpack_all(state))
            super()._step_group({**group, "params": [p], "param_names": [name]})
            for moment, dtype in MOMENT_DTYPES.items():
                state[moment] = pack(state[moment], dtype)

    def get_state_for_param(self, param: Tensor) -> dict[str, Tensor | None]:
        return _unpack_all(super().get_state_for_param(param))


def _unpack_state_dict(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state with float32 moments, as AdamW's own: checkpoints contain these."""
    state = {index: _unpack_all(moments) for index, moments in state_dict["state"].items()}
    return {**state_dict, "state": state}


def _unpack_all(moments: dict[str, Any]) -> dict[str, Any]:
    return {n: unpack(v) if isinstance(v, PackedTensor) else v for n, v in moments.items()}
