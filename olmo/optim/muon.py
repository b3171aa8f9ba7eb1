"""Muon: momentum, orthogonalised, for matrices; AdamW for all other parameters."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from olmo.optim.adamw import AdamW
from olmo.optim.optimizer import ParamGroup, finite_grad, full_tensor, is_dtensor, params_with_grad


class Muon(AdamW):
    """Muon for groups with `muon` set, AdamW for all others.

    The momentum (Nesterov, with the group's second beta) is orthogonalised by Newton-Schulz and
    scaled to AdamW's usual size, 0.2 sqrt(longer side), so that AdamW's learning rate and weight
    decay serve both (Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025,
    arXiv:2502.16982).
    """

    def get_state_for_param(self, param: Tensor) -> dict[str, Tensor | None]:
        if "momentum" in self.state[param]:
            return {"momentum": self.state[param]["momentum"]}
        return super().get_state_for_param(param)

    def _step_group(self, group: ParamGroup) -> None:
        if not group["muon"]:
            super()._step_group(group)
            return
        beta = group["betas"][1]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for _, p in params_with_grad(group):
            grad, is_finite = finite_grad(p, self.found_inf)
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(grad, is_finite * (1 - beta))
            nesterov = grad.lerp(state["momentum"], beta)
            by_shape.setdefault(p.shape, []).append((p, nesterov, is_finite))
        for shape, matrices in by_shape.items():
            # One batched product for all matrices of a shape. Sharded ones are gathered whole: the
            # iteration needs all rows and columns.
            stacked = torch.stack(
                [full_tensor(nesterov) for _, nesterov, _ in matrices]
            )  # (n, rows, columns)
            updates = orthogonalize(stacked) * (0.2 * math.sqrt(max(shape)))
            for (p, _, is_finite), update in zip(matrices, updates.unbind(), strict=True):
                p.mul_(1 - is_finite * (group["lr"] * group["weight_decay"]))
                p.sub_(_shard_like(update, p) * (is_finite * group["lr"]))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each matrix U S V^T: all singular values become about 1 (0.7 to 1.2).

    Five steps of a quintic Newton-Schulz iteration with Jordan's coefficients, in bfloat16 on GPUs.
    The iteration runs on the wide orientation, where the Gram matrix is the smaller one.

    Args:
        matrices: (n, rows, columns), and so is the result.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def _shard_like(value: Tensor, p: Tensor) -> Tensor:
    """`value`, a full tensor, sharded as `p` is."""
    if not is_dtensor(p):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, cast(Any, p).device_mesh, cast(Any, p).placements)
