"""MS-AMP (Peng et al. 2023, arXiv:2310.18313): 8-bit products, gradients and optimizer state.

The adapter behind `use_msamp: true`. MS-AMP v0.4 (github.com/Azure/MS-AMP, on no package index)
needs torch 2.1 and fails with later versions; this trainer needs torch 2.11. So today
`find_msamp_problem` finds one on every machine, and this code, which follows MS-AMP's source, has
never run with it. `envs/msamp.txt` describes an environment for MS-AMP itself. The same features
without it: `fp8: {backend: native}` and `optimizer.packed_state: true`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from olmo.config import OptimizerType, TrainConfig

# O1: products and gradients in 8 bits. O2: also the first moment in 8 and the second in 16.
OPT_LEVEL = "O2"
# The first torch version that MS-AMP fails with (its issue 158).
TOO_NEW = (2, 2)


def find_msamp_problem(cfg: TrainConfig) -> str | None:
    """None where MS-AMP works, else one sentence with the remedy."""
    remedy = (
        "--use_msamp=false --precision=amp_bf16 trains without it, with fp8: {backend: native} and "
        "optimizer.packed_state: true in 8 bits as well"
    )
    if cfg.optimizer.name != OptimizerType.adamw:
        return f"MS-AMP has AdamW only, not {cfg.optimizer.name}; {remedy}"
    if importlib.util.find_spec("msamp") is None:
        return (
            "the package msamp (MS-AMP v0.4, from github.com/Azure/MS-AMP; envs/msamp.txt says "
            f"how) is not installed; it needs torch 2.1 and a CUDA GPU, and this is torch "
            f"{torch.__version__}; {remedy}"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) >= TOO_NEW:
        return f"MS-AMP needs torch 2.1, and this is torch {torch.__version__}; {remedy}"
    if not torch.cuda.is_available():
        return f"MS-AMP needs a CUDA GPU, and torch sees none; {remedy}"
    return None


class MSAMPOptimizer:
    """MS-AMP's optimizer, with the interface of olmo.optim.Optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.found_inf: Tensor | None = None

    def clip_grads_and_collect_metrics(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Clip by the global norm with MS-AMP's function, which handles 8-bit gradients."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        limit = self.param_groups[0].get("max_grad_norm") or 0.0  # 0: measure only
        norm = importlib.import_module("msamp").clip_grad_norm_(parameters, limit)
        self.found_inf = (~torch.isfinite(norm)).float()
        return {"total_grad_norm": norm}

    def step(self) -> None:
        """Update, unless a gradient was not finite. Reading that flag waits for the device."""
        if self.found_inf is None or not self.found_inf:
            self._optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none)

    def get_post_step_metrics(self, *_: Any) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, in float32."""
        state = self._optimizer.state_dict()
        as_float32 = {
            index: {name: _to_float32(value) for name, value in moments.items()}
            for index, moments in state["state"].items()
        }
        return {**state, "state": as_float32}


def initialize(model: Any, optimizer: Any) -> tuple[Any, Any]:
    """Replace the model's linear layers and the optimizer by MS-AMP's; returns both.

    Call after the weights are loaded. The model's state_dict stays float32.
    """
    msamp = importlib.import_module("msamp")
    # MS-AMP accepts torch's own class only, and builds its LBAdamW with the same settings.
    settings = {k: optimizer.defaults[k] for k in ("lr", "betas", "eps", "weight_decay")}
    groups = [{k: v for k, v in g.items() if k != "fused"} for g in optimizer.param_groups]
    model, converted = msamp.initialize(
        model, torch.optim.AdamW(groups, **settings), opt_level=OPT_LEVEL
    )
    model.register_state_dict_post_hook(_convert_state_dict)
    return model, MSAMPOptimizer(converted)


def _convert_state_dict(_: Any, state: dict[str, Any], *__: Any) -> None:
    for name in list(state):
        state[name] = _to_float32(state[name])


def _to_float32(value: Any) -> Any:
    """A ScalingTensor of MS-AMP (no subclass of torch's Tensor) as float32; others unchanged."""
    is_scaling_tensor = not isinstance(value, Tensor) and hasattr(value, "float")
    return value.float() if is_scaling_tensor else value
