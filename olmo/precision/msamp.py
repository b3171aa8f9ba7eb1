"""MS-AMP (Peng et al. 2023, arXiv:2310.18313): 8-bit products, gradients and optimizer state.

The adapter behind `use_msamp: true`. MS-AMP is on no package index (github.com/Azure/MS-AMP, v0.4),
needs torch 2.1 and does not work with later ones; this trainer needs torch 2.11. So `why_not` has a
reason wherever this runs today, envs/msamp.txt is an environment for what was written for MS-AMP,
and what is below follows its source and has not been run beside it. What it offers is had without
it: `fp8: {backend: native}` and `optimizer.packed_state: true`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from olmo.config import OptimizerType, TrainConfig

# O1: products and gradients in 8 bits; O2: the optimizer's first moment too, its second in 16.
OPT_LEVEL = "O2"
# The first torch that MS-AMP does not work with (its issue 158).
TOO_NEW = (2, 2)


def why_not(cfg: TrainConfig) -> str | None:
    """None where MS-AMP can be used, else one sentence with the remedy."""
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


class Cast:
    """MS-AMP's optimizer with the methods that training asks of ours."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.found_inf: Tensor | None = None

    def clip_grads_and_collect_metrics(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """By MS-AMP's own clipping, which knows 8-bit gradients; all of them together."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        limit = self.param_groups[0].get("max_grad_norm") or 0.0  # 0: only measured
        norm = importlib.import_module("msamp").clip_grad_norm_(parameters, limit)
        self.found_inf = (~torch.isfinite(norm)).float()
        return {"total_grad_norm": norm}

    def step(self) -> None:
        """Nothing moves if a gradient was not finite; that has to be asked of the device."""
        if self.found_inf is None or not self.found_inf:
            self._optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none)

    def get_post_step_metrics(self, *_: Any) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, in float32."""
        state = self._optimizer.state_dict()
        plain = {number: {n: _plain(v) for n, v in kept.items()} for number, kept in
                 state["state"].items()}  # fmt: skip
        return {**state, "state": plain}


def initialize(model: Any, optimizer: Any) -> tuple[Any, Any]:
    """The model and its optimizer with MS-AMP's linear layers and state in their place.

    To be called when weights are loaded. What the model saves stays float32.
    """
    msamp = importlib.import_module("msamp")
    # It takes torch's own class only, and hands its settings on to AdamW's double.
    settings = {k: optimizer.defaults[k] for k in ("lr", "betas", "eps", "weight_decay")}
    groups = [{k: v for k, v in g.items() if k != "fused"} for g in optimizer.param_groups]
    model, cast = msamp.initialize(
        model, torch.optim.AdamW(groups, **settings), opt_level=OPT_LEVEL
    )
    model.register_state_dict_post_hook(lambda *given: _save_plain(given[1]))
    return model, Cast(cast)


def _save_plain(state: dict[str, Any]) -> None:
    for name in list(state):
        state[name] = _plain(state[name])


def _plain(value: Any) -> Any:
    """A tensor of MS-AMP's, which is none of torch's, as float32; anything else as it is."""
    foreign = not isinstance(value, Tensor) and hasattr(value, "float")
    return value.float() if foreign else value
