"""LionW: the sign of an interpolated momentum, with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from olmo.optim.optimizer import (
    Optimizer,
    compute_norms,
    finite_grad,
    params_with_grad,
    stack_scalars,
)


class LionW(Optimizer):
    """Lion with decoupled weight decay (Chen et al. 2023, arXiv:2302.06675)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        record_update_metrics: bool = False,
        selective_updates: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self._record_update_metrics = record_update_metrics
        self._selective_updates = selective_updates

    def get_state_for_param(self, param: Tensor) -> dict[str, Tensor | None]:
        return {"exp_avg": self.state[param].get("exp_avg")}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update parameters that have a gradient; none if clipping found one that is not finite."""
        recording = self._record_update_metrics and self._collecting_metrics
        products: list[Tensor] = []
        updates: list[Tensor] = []
        signs: list[Tensor] = []
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for _, p in params_with_grad(group):
                grad, is_finite = finite_grad(p, self.found_inf)
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                average = state["exp_avg"]
                update = average.lerp(grad, 1 - beta1)
                sign = update.sign()
                moving = (grad != 0) * is_finite if self._selective_updates else is_finite
                p.mul_(1 - moving * (group["lr"] * group["weight_decay"]))
                p.sub_(sign * (moving * group["lr"]))
                average.lerp_(grad, moving * (1 - beta2))
                if recording:
                    if self._selective_updates:
                        update, sign = update * moving, sign * moving
                    products.append((update * sign).sum())
                    updates.append(update)
                    signs.append(sign)
        if recording:
            dot = stack_scalars(products).sum()
            lengths = [torch.linalg.vector_norm(compute_norms(ts)) for ts in (updates, signs)]
            cosine = dot / (lengths[0] * lengths[1]).clamp(min=1e-8)
            self._update_metrics = {"update_cos_sim": cosine}
