"""AdamW, by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from olmo.optim.optimizer import (
    Optimizer,
    ParamGroup,
    compute_norms,
    finite_grad,
    params_with_grad,
    stack_scalars,
)


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101).

    With selective_updates, entries of a parameter and of its state do not change where the
    gradient is exactly 0: embeddings of tokens that are not in the batch do not decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-5,
        weight_decay: float = 0.01,
        record_update_metrics: bool = False,
        selective_updates: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"amsgrad": False, "fused": None})
        self._record_update_metrics = record_update_metrics
        self._selective_updates = selective_updates
        for group in self.param_groups:
            group["fused"] = {p.device.type for p in group["params"]} <= {"cpu", "cuda"}

    def get_state_for_param(self, param: Tensor) -> dict[str, Tensor | None]:
        return {key: self.state[param].get(key) for key in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update parameters that have a gradient; none if clipping found one that is not finite.

        The fused kernel checks `found_inf` on the device, so the host does not wait for it.
        """
        recording = self._record_update_metrics and self._collecting_metrics
        before = self._snapshot() if recording else []
        for group in self.param_groups:
            self._step_group(group)
        if recording:
            self._record(before)

    def _step_group(self, group: ParamGroup) -> None:
        if self._selective_updates:
            self._step_selectively(group)
            return
        params = [p for _, p in params_with_grad(group)]
        states = [self._get_state(p, group) for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [cast(Tensor, p.grad) for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=group["fused"],
            found_inf=self.found_inf if group["fused"] else None,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _get_state(self, p: Tensor, group: ParamGroup) -> dict[str, Any]:
        state = self.state[p]
        if "step" not in state:
            # The fused kernel needs the step count on the parameter's device, others on the CPU.
            device = p.device if group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state

    def _step_selectively(self, group: ParamGroup) -> None:
        beta1, beta2 = group["betas"]
        for _, p in params_with_grad(group):
            grad, is_finite = finite_grad(p, self.found_inf)
            state = self._get_state(p, group)
            state["step"] += is_finite.to(state["step"].device)
            steps = state["step"].double().clamp(min=1)
            mask = (grad != 0) * is_finite
            p.mul_(1 - mask * (group["lr"] * group["weight_decay"]))
            state["exp_avg"].lerp_(grad, mask * (1 - beta1))
            square = grad * grad * is_finite
            state["exp_avg_sq"].mul_(1 - mask * (1 - beta2)).add_(square, alpha=1 - beta2)
            step_size = (group["lr"] / (1 - beta1**steps)).to(p.device, p.dtype)
            correction = (1 - beta2**steps).sqrt().to(p.device, p.dtype)
            denominator = state["exp_avg_sq"].sqrt() / correction + group["eps"]
            p.sub_(mask * step_size * state["exp_avg"] / denominator)

    def _snapshot(self) -> list[tuple[str, Tensor, Tensor]]:
        """Name, parameter, and its value after weight decay alone. Costs a copy of all weights."""

        def decayed(p: Tensor, group: ParamGroup) -> Tensor:
            is_updated: Any = cast(Tensor, p.grad) != 0 if self._selective_updates else 1
            return p * (1 - is_updated * (group["lr"] * group["weight_decay"]))

        return [
            (name, p, decayed(p, group))
            for group in self.param_groups
            for name, p in params_with_grad(group)
        ]

    def _record(self, before: list[tuple[str, Tensor, Tensor]]) -> None:
        updates = [p - decayed for _, p, decayed in before]
        maxima = stack_scalars([u.abs().max().float() for u in updates])
        metrics: dict[str, Tensor] = {}
        for (name, _, _), norm, maximum in zip(before, compute_norms(updates), maxima, strict=True):
            metrics |= {f"step/{name}.norm": norm, f"step/{name}.max": maximum}
        self._update_metrics = metrics
