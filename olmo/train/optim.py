"""Optimizers: AdamW, LionW, Muon, with clipping and metrics that never wait for the device.

    optim = build_optimizer(cfg, model)
    metrics = optim.clip_grads_and_collect_metrics(step)  # tensors, on the device
    optim.step()                          # nothing moves if a gradient was not finite

Parameters may be sharded DTensors; norms are then those of the whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from olmo.config import OptimizerType, TrainConfig
from olmo.model.norm import LayerNormBase
from olmo.model.regroup import plain_name

log = logging.getLogger(__name__)

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
            0-d tensors on the device. `total_grad_norm`, before clipping, is always there. With
            collect_param_metrics also {param,grad,exp_avg,…}/{name}.{min,max,avg,norm} (min and
            max of the absolute values), `clipping_rate`, `grad_norm_exp_avg/{name}`.
        """
        self._collecting_metrics = collect_param_metrics
        named = [list(_with_grad(group)) for group in self.param_groups]
        grads = [[cast(Tensor, p.grad) for _, p in pairs] for pairs in named]
        flat = [g for group_grads in grads for g in group_grads]
        if not flat:
            raise ValueError("no parameter has a gradient; call loss.backward() first")
        norms = _norms(flat)  # (parameters,)
        total_norm = norms.square().sum().sqrt()
        self.found_inf = (~torch.isfinite(total_norm)).float()

        metrics = {"total_grad_norm": total_norm}
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
        updated = torch.where(torch.isfinite(updated), updated, stacked)
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
            "min": _whole([t.abs().min().float() for t in tensors]),
            "max": _whole([t.abs().max().float() for t in tensors]),
            "avg": _whole([t.float().mean() for t in tensors]),
            "norm": _norms(tensors),
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
        super().load_state_dict({**state_dict, "param_groups": groups})


class AdamW(torch.optim.AdamW, Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) by torch's fused kernel where it has one.

    With selective_updates a parameter's entries, and their state, stay as they are where the
    gradient is exactly 0 (rare tokens' embeddings do not decay).
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        record_update_metrics: bool = False,
        selective_updates: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(params, **settings)
        self._record_update_metrics = record_update_metrics
        self._selective_updates = selective_updates
        self._update_metrics: dict[str, Tensor] = {}

    def get_state_for_param(self, param: Tensor) -> dict[str, Tensor | None]:
        return {key: self.state[param].get(key) for key in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        recording = self._record_update_metrics and self._collecting_metrics
        before = self._snapshot() if recording else []
        if self._selective_updates:
            for group in self.param_groups:
                self._step_selectively(group)
        else:
            super().step(closure)
        if recording:
            self._record(before)

    def _step_selectively(self, group: Group) -> None:
        beta1, beta2 = group["betas"]
        lr, eps = group["lr"], group["eps"]
        for _, p in _with_grad(group):
            grad, alive = _finite(cast(Tensor, p.grad), self.found_inf)
            state = self.state[p]
            if "step" not in state:
                device = p.device if group["fused"] or group["capturable"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1 if alive is None else alive.to(state["step"].device)
            steps = state["step"].double().clamp(min=1)
            mask = (grad != 0).to(p.dtype)
            if alive is not None:
                mask = mask * alive
            p.mul_(1 - mask * (lr * group["weight_decay"]))
            state["exp_avg"].lerp_(grad, mask * (1 - beta1))
            state["exp_avg_sq"].mul_(1 - mask * (1 - beta2)).addcmul_(grad, grad, value=1 - beta2)
            step_size = (lr / (1 - beta1**steps)).to(p.device, p.dtype)
            correction = (1 - beta2**steps).sqrt().to(p.device, p.dtype)
            denominator = state["exp_avg_sq"].sqrt() / correction + eps
            p.sub_(mask * step_size * state["exp_avg"] / denominator)

    def _snapshot(self) -> list[tuple[str, Tensor, Tensor]]:
        """Name, parameter, and where it would be after weight decay alone."""
        return [
            (name, p, p * (1 - group["lr"] * group["weight_decay"]))
            for group in self.param_groups
            for name, p in _with_grad(group)
        ]

    def _record(self, before: list[tuple[str, Tensor, Tensor]]) -> None:
        updates = [p - decayed for _, p, decayed in before]
        largest = _whole([u.abs().max().float() for u in updates])
        for (name, _, _), norm, most in zip(before, _norms(updates), largest, strict=True):
            self._update_metrics[f"step/{name}.norm"] = norm
            self._update_metrics[f"step/{name}.max"] = most

    def get_post_step_metrics(
        self, module: nn.Module | None = None, process_group: Any = None
    ) -> dict[str, Tensor]:
        """step/{name}.norm and .max: of the update without its weight decay."""
        metrics, self._update_metrics = self._update_metrics, {}
        return metrics


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
        self._update_metrics: dict[str, Tensor] = {}

    def get_state_for_param(self, param: Tensor) -> dict[str, Tensor | None]:
        return {"exp_avg": self.state[param].get("exp_avg")}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        recording = self._record_update_metrics and self._collecting_metrics
        products: list[Tensor] = []
        norms: list[list[Tensor]] = [[], []]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for _, p in _with_grad(group):
                grad, alive = _finite(cast(Tensor, p.grad), self.found_inf)
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                average = state["exp_avg"]
                update = average.lerp(grad, 1 - beta1)
                sign = update.sign()
                moving: Tensor | float = 1.0 if alive is None else alive
                if self._selective_updates:
                    moving = (grad != 0).to(p.dtype) * moving
                p.mul_(1 - moving * (group["lr"] * group["weight_decay"]))
                p.sub_(sign * (moving * group["lr"]))
                average.lerp_(grad, moving * (1 - beta2))
                if recording:
                    products.append((update * sign).sum())
                    norms[0].append(update)
                    norms[1].append(sign)
        if recording:
            dot = _whole(products).sum()
            lengths = [torch.linalg.vector_norm(_norms(tensors)) for tensors in norms]
            cosine = dot / (lengths[0] * lengths[1]).clamp(min=1e-8)
            self._update_metrics = {"update_cos_sim": cosine}

    def get_post_step_metrics(
        self, module: nn.Module | None = None, process_group: Any = None
    ) -> dict[str, Tensor]:
        """update_cos_sim: how far the signed update points where the unsigned one does."""
        metrics, self._update_metrics = self._update_metrics, {}
        return metrics


class Muon(AdamW):
    """Muon for groups with `muon` set, AdamW for all others.

    The momentum (Nesterov, with the group's second beta) is orthogonalised by Newton-Schulz and
    scaled to AdamW's usual size, 0.2 sqrt(longer side), so that AdamW's learning rate and weight
    decay serve both (Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025,
    arXiv:2502.16982).
    """

    def _init_group(self, group: Group, *lists: Any) -> bool:  # type: ignore[override]
        # This is where torch's AdamW gathers what it will step.
        return False if group["muon"] else super()._init_group(group, *lists)

    def get_state_for_param(self, param: Tensor) -> dict[str, Tensor | None]:
        if "momentum" in self.state[param]:
            return {"momentum": self.state[param]["momentum"]}
        return super().get_state_for_param(param)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        super().step(closure)

    def _step_matrices(self, group: Group) -> None:
        beta = group["betas"][1]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        alive: Tensor | float = 1.0
        for _, p in _with_grad(group):
            grad, living = _finite(cast(Tensor, p.grad), self.found_inf)
            alive = 1.0 if living is None else living
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(grad, alive * (1 - beta))
            ahead = grad.lerp(state["momentum"], beta)
            by_shape.setdefault(p.shape, []).append((p, ahead))
        for shape, matrices in by_shape.items():
            whole = torch.stack([_full(ahead) for _, ahead in matrices])  # (n, rows, columns)
            updates = orthogonalize(whole) * (0.2 * math.sqrt(max(shape)))
            for (p, _), update in zip(matrices, updates.unbind(), strict=True):
                p.mul_(1 - alive * (group["lr"] * group["weight_decay"]))
                p.sub_(_like(update, p) * (alive * group["lr"]))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with all singular values about 1 (0.7 to 1.2), (n, rows, columns).

    A quintic Newton-Schulz iteration with Jordan's coefficients, in bfloat16 on GPUs.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def get_param_groups(cfg: TrainConfig, model: nn.Module) -> list[Group]:
    """Parameters with weight decay, then those without, each sorted by name.

    Linear weights decay. Norms and biases do if optimizer.decay_norm_and_bias says so, embeddings
    (a tied one too) if optimizer.decay_embeddings does. For Muon the matrices of the blocks are a
    group of their own.

    Raises:
        ValueError: a parameter of a module that no rule is known for.
    """
    optimizer = cfg.optimizer
    decaying: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                continue
            if name.endswith("bias") or isinstance(module, (LayerNormBase, nn.LayerNorm)):
                decays = optimizer.decay_norm_and_bias
            elif isinstance(module, nn.Embedding):
                decays = optimizer.decay_embeddings
            elif isinstance(module, nn.Linear):
                decays = True
            else:
                raise ValueError(
                    f"no weight decay rule for {module_name}.{name} of a "
                    f"{type(module).__name__}; known are linear layers, norms and embeddings"
                )
            full_name = plain_name(f"{module_name}.{name}" if module_name else name)
            (decaying if decays else others)[full_name] = p

    def is_matrix_of_block(name: str) -> bool:
        return ".block" in name and decaying[name].ndim == 2

    sets: list[tuple[dict[str, nn.Parameter], Group]]
    if optimizer.name == OptimizerType.muon:
        matrices = {n: p for n, p in decaying.items() if is_matrix_of_block(n)}
        rest = {n: p for n, p in decaying.items() if n not in matrices}
        sets = [
            (matrices, {"muon": True}),
            (rest, {"muon": False}),
            (others, {"muon": False, "weight_decay": 0.0}),
        ]
    else:
        sets = [(decaying, {}), (others, {"weight_decay": 0.0})]
    return [
        {
            "params": [params[name] for name in sorted(params)],
            "param_names": sorted(params),
            "sharded": any(_is_sharded(p) for p in params.values()),
            "max_grad_norm": cfg.max_grad_norm,
            "max_grad_norm_ratio": cfg.max_grad_norm_ratio,
            **fields,
        }
        for params, fields in sets
        if params
    ]


def build_optimizer(cfg: TrainConfig, model: nn.Module) -> Optimizer:
    """The optimizer that cfg.optimizer describes, over the trainable parameters of `model`.

    Raises:
        ValueError: selective_updates with Muon, whose updates are never selective.
    """
    groups = get_param_groups(cfg, model)
    config = cfg.optimizer
    shared: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": tuple(config.betas),
        "weight_decay": config.weight_decay,
        "record_update_metrics": config.record_update_metrics,
        "selective_updates": config.selective_updates,
    }
    kind = OptimizerType(config.name)
    if kind is OptimizerType.lionw:
        return LionW(groups, **shared)
    if kind is OptimizerType.muon and config.selective_updates:
        raise ValueError(
            "optimizer.selective_updates works entry by entry, Muon on whole matrices; "
            "set --optimizer.selective_updates=false or another optimizer.name"
        )
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = True if devices <= {"cpu", "cuda"} else None
    optimizer_class = Muon if kind is OptimizerType.muon else AdamW
    return optimizer_class(groups, eps=config.eps, fused=fused, **shared)


def _with_grad(group: Group) -> Iterable[tuple[str, Tensor]]:
    return (
        (name, p)
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if p.grad is not None
    )


def _finite(grad: Tensor, found_inf: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradient with NaN and infinity as 0, and 1.0 or 0.0 for whether to move at all."""
    if found_inf is None:
        return grad, None
    return grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), 1.0 - found_inf


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _full(tensor: Tensor) -> Tensor:
    """All of a sharded tensor."""
    return cast(Any, tensor).full_tensor() if _is_sharded(tensor) else tensor


def _like(whole: Tensor, p: Tensor) -> Tensor:
    """`whole`, sharded as `p` is."""
    if not _is_sharded(p):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, cast(Any, p).device_mesh, cast(Any, p).placements)


def _whole(scalars: list[Tensor]) -> Tensor:
    """0-d tensors, reduced over their shards, as one vector."""
    return _full(torch.stack(scalars))


def _norms(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of each tensor, in float32, as one vector."""
    return _whole(list(torch._foreach_norm(tensors, 2, dtype=torch.float32)))
