"""The base class of all optimizers: clipping, metrics, and state that is loaded by name.

Nothing here waits for the device: norms, the finite check and metrics are 0-d tensors there, and
the trainer reads them later, in one transfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from olmo.model.regroup import strip_wrappers

ParamGroup = dict[str, Any]


class Optimizer(torch.optim.Optimizer):
    """Base class. Parameter groups have these fields besides torch's:

    - param_names: names without wrappers' prefixes, sorted, in the order of params
    - max_grad_norm: threshold for the norm of all gradients together, or None
    - max_grad_norm_ratio: threshold for each gradient's norm, in multiples of its running mean,
      or None; takes precedence over max_grad_norm
    - sharded: whether the parameters are DTensors

    Parameters may be DTensors; norms and other metrics are then those of the full tensors.
    """

    _record_update_metrics = False
    _selective_updates = False
    _collecting_metrics = False
    _update_metrics: Mapping[str, Tensor] = {}  # of the last step, if it recorded any
    found_inf: Tensor | None = None
    """1.0 if the last clipping found a gradient that is not finite, else 0.0. `step` reads it."""

    # The undecorated methods: torch's decorator (torch._disable_dynamo) imports the compiler at the
    # first call, which takes more than half of the time until a small run's first step.
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
            collect_param_metrics: also collect min, max, avg and norm of each parameter, its
                gradient and its state. It reads all of them four times.
            process_group, device: accepted as OLMo has them; not used.

        Returns:
            0-d tensors on the device. Always the norms before clipping, `total_grad_norm` and
            grad/{name}.norm. With collect_param_metrics also
            {param,grad,exp_avg,…}/{name}.{min,max,avg,norm} (min and max of the absolute values),
            `clipping_rate`, `grad_norm_exp_avg/{name}`.

        Raises:
            ValueError: no parameter has a gradient.
        """
        self._collecting_metrics = collect_param_metrics
        group_pairs = [list(params_with_grad(group)) for group in self.param_groups]
        grads = [[cast(Tensor, p.grad) for _, p in pairs] for pairs in group_pairs]
        flat = [g for group_grads in grads for g in group_grads]
        if not flat:
            raise ValueError("no parameter has a gradient; call loss.backward() first")
        norms = compute_norms(flat)  # (parameters,)
        total_norm = norms.square().sum().sqrt()
        self.found_inf = (~torch.isfinite(total_norm)).float()

        names = [name for pairs in group_pairs for name, _ in pairs]
        metrics = {"total_grad_norm": total_norm}
        metrics |= {f"grad/{n}.norm": norm for n, norm in zip(names, norms.unbind(), strict=True)}
        if collect_param_metrics:
            metrics |= self._param_metrics([pair for pairs in group_pairs for pair in pairs])
        clipped, eligible = torch.zeros_like(total_norm), 0
        group_norms = norms.split([len(pairs) for pairs in group_pairs])
        for group, pairs, group_grads, pair_norms in zip(
            self.param_groups, group_pairs, grads, group_norms, strict=True
        ):
            if not pairs:
                continue
            if (ratio := group.get("max_grad_norm_ratio")) is not None:
                coefficients = self._clip_adaptively(group, ratio, pairs, pair_norms, metrics)
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
        group: ParamGroup,
        ratio: float,
        pairs: Sequence[tuple[str, Tensor]],
        norms: Tensor,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        """Clip each gradient to `ratio` times the running mean of its clipped norms.

        The mean starts at the second step, as in OLMo: at the first, the optimizer has no state
        yet to keep it in.

        Args:
            norms: (n,), n parameters of the group.

        Returns:
            The factors that the gradients were multiplied by, (n,).
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
            measured = {"grad": p.grad, "param": p} | dict(sorted(state.items()))
            for kind, tensor in measured.items():
                if tensor is not None:
                    names.append(f"{kind}/{name}")
                    tensors.append(tensor.detach())
        columns = {
            "min": stack_scalars([t.abs().min().float() for t in tensors]),
            "max": stack_scalars([t.abs().max().float() for t in tensors]),
            "avg": stack_scalars([t.float().mean() for t in tensors]),
            "norm": compute_norms(tensors),
        }
        return {
            f"{name}.{statistic}": value
            for statistic, column in columns.items()
            for name, value in zip(names, column.unbind(), strict=True)
        }

    def get_state_for_param(self, param: Tensor) -> dict[str, Tensor | None]:
        """The tensors of the state that metrics are collected of, by name."""
        return {}

    def get_post_step_metrics(
        self, module: nn.Module | None = None, process_group: Any = None
    ) -> dict[str, Tensor]:
        """Metrics of the last update, if record_update_metrics is set; empty when called again.

        AdamW: step/{name}.norm and .max of the update without weight decay. LionW: update_cos_sim,
        the cosine similarity of the update and its sign, over all parameters.
        """
        metrics, self._update_metrics = dict(self._update_metrics), {}
        return metrics

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state. Settings (lr, betas, …) stay those of the config.

        Raises:
            ValueError: the saved parameters differ from ours, or their order does.
        """
        saved_groups = state_dict["param_groups"]
        groups = []
        for saved, ours in zip(saved_groups, self.param_groups, strict=False):
            saved_names = [strip_wrappers(n) for n in saved.get("param_names", ours["param_names"])]
            if saved_names != ours["param_names"]:
                differing = sorted(set(saved_names) ^ set(ours["param_names"]))
                raise ValueError(
                    "the optimizer's state is of other parameters, or in another order; "
                    f"they differ in {', '.join(differing[:5]) or 'their order'}. "
                    "--reset_optimizer_state starts with a new state"
                )
            groups.append({**saved, **{k: v for k, v in ours.items() if k != "params"}})
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"the optimizer's state has {len(saved_groups)} parameter groups, expected "
                f"{len(self.param_groups)}. --reset_optimizer_state starts with a new state"
            )
        self._load_state_dict({**state_dict, "param_groups": groups})


def params_with_grad(group: ParamGroup) -> Iterable[tuple[str, Tensor]]:
    """Names and parameters of those that have a gradient."""
    return (
        (name, p)
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if p.grad is not None
    )


def is_dtensor(tensor: Tensor) -> bool:
    # isinstance would import torch.distributed.tensor, which takes a second, in every run.
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all its shards; another tensor as it is."""
    return cast(Any, tensor).full_tensor() if is_dtensor(tensor) else tensor


def stack_scalars(scalars: list[Tensor]) -> Tensor:
    """0-d tensors as one vector, (n,), reduced over their shards."""
    return full_tensor(torch.stack(scalars))


def compute_norms(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of each tensor, computed in float32: (n,)."""
    return stack_scalars(list(torch._foreach_norm(tensors, 2, dtype=torch.float32)))


def finite_grad(p: Tensor, found_inf: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient with NaN and infinity replaced by 0; and 1.0, or 0.0 if the update must be
    skipped, to multiply it with. So no branch waits for the device."""
    grad = cast(Tensor, p.grad)
    if found_inf is None:
        return grad, torch.ones((), device=p.device)
    return grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), 1.0 - found_inf
