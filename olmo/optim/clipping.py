"""What all optimizers share: clipping and metrics that never wait for the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from olmo.model.regroup import plain_name

Group = dict[str, Any]


class Optimizer(torch.optim.Optimizer):
    """What OLMo's optimizers share. Parameter groups have, beside torch's fields:

    - param_names: plain names, in the order of params, sorted
    - max_grad_norm: threshold for the norm of all gradients together, or None
    - max_grad_norm_ratio: threshold for each gradient's norm, in multiples of its running mean,
      or None; it wins over max_grad_norm
    - sharded: whether the parameters are DTensors
    """

    _record_update_metrics = False
    _selective_updates = False
    _collecting_metrics = False
    found_inf: Tensor | None = None
    """1.0 where the last clipping saw a gradient that is not finite, else 0.0. `step` reads it."""

    # torch marks these as not to be compiled, and imports its compiler to do so: more than half
    # of the time until a small run's first step.
    _torch: Any = torch.optim.Optimizer
    add_param_group = _torch.add_param_group.__wrapped__
    zero_grad = _torch.zero_grad.__wrapped__
    state_dict = _torch.state_dict.__wrapped__
    _load_state_dict = _torch.load_state_dict.__wrapped__
    del _torch

    @torch.no_grad()
    def clip_grads_and_collect_metrics(
        self,
        global_step: int,
        collect_param_metrics: bool = True,
        process_group: Any = None,
        device: torch.device | None = None,
    ) -> dict[str, Tensor]:
        """Clip gradients in place, group by group, as their fields say.

        Args:
            global_step: accepted as OLMo has it.
            collect_param_metrics: also collect, for each parameter, min, max, avg and norm of
                itself, its gradient and its state; expensive.
            process_group, device: accepted as OLMo has them; tensors know both.

        Returns:
            0-d tensors on the device. Norms before clipping are always there: `total_grad_norm`
            and grad/{name}.norm. With collect_param_metrics also
            {param,grad,exp_avg,…}/{name}.{min,max,avg,norm} (min and max of the absolute values),
            `clipping_rate`, `grad_norm_exp_avg/{name}`.

        Raises:
            ValueError: no parameter has a gradient.
        """
        self._collecting_metrics = collect_param_metrics
        named = [list(with_grad(group)) for group in self.param_groups]
        grads = [[cast(Tensor, p.grad) for _, p in pairs] for pairs in named]
        flat = [g for group_grads in grads for g in group_grads]
        if not flat:
            raise ValueError("no parameter has a gradient; call loss.backward() first")
        norms = norms_of(flat)  # (parameters,)
        total_norm = norms.square().sum().sqrt()
        self.found_inf = (~torch.isfinite(total_norm)).float()

        names = [name for pairs in named for name, _ in pairs]
        metrics = {"total_grad_norm": total_norm}
        metrics |= {f"grad/{n}.norm": norm for n, norm in zip(names, norms.unbind(), strict=True)}
        if collect_param_metrics:
            metrics |= self._param_metrics([pair for pairs in named for pair in pairs])
        clipped, eligible = torch.zeros_like(total_norm), 0
        group_norms = norms.split([len(pairs) for pairs in named])
        for group, pairs, group_grads, its_norms in zip(
            self.param_groups, named, grads, group_norms, strict=True
        ):
            if not pairs:
                continue
            if (ratio := group.get("max_grad_norm_ratio")) is not None:
                coefficients = self._clip_adaptively(group, ratio, pairs, its_norms, metrics)
            elif (max_norm := group.get("max_grad_norm")) is not None:
                coefficient = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_(group_grads, coefficient)
                coefficients = coefficient.expand(len(pairs))
            else:
                continue
            eligible += len(pairs)
            clipped += (coefficients < 1.0).sum()
        if collect_param_metrics:
            metrics["clipping_rate"] = clipped / max(1, eligible)
        return metrics

    def _clip_adaptively(
        self,
        group: Group,
        ratio: float,
        pairs: Sequence[tuple[str, Tensor]],
        norms: Tensor,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        """Clip each gradient to `ratio` times the running mean of its clipped norms.

        The mean starts with the first norm that finds the optimizer's state made, that is at
        the second step, as in OLMo.

        Returns:
            The coefficients, (parameters of the group,).
        """
        states = [self.state[p] for _, p in pairs]
        averages = []
        for state, norm in zip(states, norms.unbind(), strict=True):
            average = state.get("grad_norm_exp_avg")
            if average is None:
                average = norm.clone()
                if state:
                    state["grad_norm_exp_avg"] = average
            averages.append(average)
        stacked = torch.stack(averages)
        coefficients = (ratio * stacked / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([cast(Tensor, p.grad) for _, p in pairs], list(coefficients.unbind()))
        updated = stacked.lerp(norms * coefficients, 1 - max(group["betas"]))
        updated = torch.where(metrics["total_grad_norm"].isfinite(), updated, stacked)
        torch._foreach_copy_(averages, list(updated.unbind()))
        if self._collecting_metrics:
            for (name, _), average in zip(pairs, averages, strict=True):
                metrics[f"grad_norm_exp_avg/{name}"] = average
        return coefficients

    def _param_metrics(self, pairs: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
        names: list[str] = []
        tensors: list[Tensor] = []
        for name, p in pairs:
            state = self.get_state_for_param(p)
            shown = {"grad": p.grad, "param": p} | dict(sorted(state.items()))
            for kind, tensor in shown.items():
                if tensor is not None:
                    names.append(f"{kind}/{name}")
                    tensors.append(tensor.detach())
        columns = {
            "min": vector([t.abs().min().float() for t in tensors]),
            "max": vector([t.abs().max().float() for t in tensors]),
            "avg": vector([t.float().mean() for t in tensors]),
            "norm": norms_of(tensors),
        }
        return {
            f"{name}.{what}": value
            for what, column in columns.items()
            for name, value in zip(names, column.unbind(), strict=True)
        }

    def get_state_for_param(self, param: Tensor) -> dict[str, Tensor | None]:
        """The parts of the state that metrics are collected of."""
        return {}

    def get_post_step_metrics(
        self, module: nn.Module | None = None, process_group: Any = None
    ) -> dict[str, Tensor]:
        """What the last step did, if record_update_metrics asks for it."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State comes from `state_dict`; settings stay those of the config.

        Raises:
            ValueError: the parameters are others.
        """
        saved = state_dict["param_groups"]
        groups = []
        for theirs, ours in zip(saved, self.param_groups, strict=False):
            their_names = [plain_name(n) for n in theirs.get("param_names", ours["param_names"])]
            if their_names != ours["param_names"]:
                differing = sorted(set(their_names) ^ set(ours["param_names"]))
                raise ValueError(
                    "the optimizer's state is of other parameters, or in another order; "
                    f"they differ in {', '.join(differing[:5]) or 'their order'}. "
                    "--reset_optimizer_state starts it afresh"
                )
            groups.append({**theirs, **{k: v for k, v in ours.items() if k != "params"}})
        if len(saved) != len(self.param_groups):
            raise ValueError(
                f"the optimizer's state has {len(saved)} parameter groups, expected "
                f"{len(self.param_groups)}. --reset_optimizer_state starts it afresh"
            )
        self._load_state_dict({**state_dict, "param_groups": groups})


def with_grad(group: Group) -> Iterable[tuple[str, Tensor]]:
    return (
        (name, p)
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if p.grad is not None
    )


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def vector(scalars: list[Tensor]) -> Tensor:
    """0-d tensors, reduced over their shards, as one vector."""
    return whole(torch.stack(scalars))


def norms_of(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of each tensor, in float32, as one vector."""
    return vector(list(torch._foreach_norm(tensors, 2, dtype=torch.float32)))


def finite_grad(p: Tensor, found_inf: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient with NaN and infinity as 0; and 1.0, or 0.0 if nothing may move."""
    grad = cast(Tensor, p.grad)
    if found_inf is None:
        return grad, torch.ones((), device=p.device)
    return grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), 1.0 - found_inf
