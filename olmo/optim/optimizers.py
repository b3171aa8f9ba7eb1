"""Optimizers: AdamW, LionW, Muon.

    optim = build_optimizer(cfg, model)
    metrics = optim.clip_grads_and_collect_metrics(step)  # tensors, on the device
    optim.step()                          # nothing moves if a gradient was not finite

Parameters may be sharded DTensors; norms are then those of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from olmo.config import OptimizerType, TrainConfig
from olmo.model.norm import LayerNormBase
from olmo.model.regroup import plain_name
from olmo.optim.clipping import Group, Optimizer, is_sharded, norms_of, vector, whole, with_grad


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), by torch's fused kernel on CPU and CUDA.

    With selective_updates a parameter's entries, and their state, stay as they are where the
    gradient is exactly 0 (the embeddings of tokens that were not seen do not decay).
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
        self._update_metrics: dict[str, Tensor] = {}
        for group in self.param_groups:
            group["fused"] = {p.device.type for p in group["params"]} <= {"cpu", "cuda"}

    def get_state_for_param(self, param: Tensor) -> dict[str, Tensor | None]:
        return {key: self.state[param].get(key) for key in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update what has a gradient; nothing where clipping found one that is not finite.

        The fused kernel heeds the latter, so that it holds on CPU and CUDA.
        """
        recording = self._record_update_metrics and self._collecting_metrics
        before = self._snapshot() if recording else []
        for group in self.param_groups:
            self._step_group(group)
        if recording:
            self._record(before)

    def _step_group(self, group: Group) -> None:
        if self._selective_updates:
            self._step_selectively(group)
            return
        params = [p for _, p in with_grad(group)]
        states = [self._state_of(p, group) for p in params]
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

    def _state_of(self, p: Tensor, group: Group) -> dict[str, Any]:
        state = self.state[p]
        if "step" not in state:
            # The fused kernel counts steps on the device, the others on the host.
            device = p.device if group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state

    def _step_selectively(self, group: Group) -> None:
        beta1, beta2 = group["betas"]
        for _, p in with_grad(group):
            grad, alive = _finite(p, self.found_inf)
            state = self._state_of(p, group)
            state["step"] += alive.to(state["step"].device)
            steps = state["step"].double().clamp(min=1)
            mask = (grad != 0) * alive
            p.mul_(1 - mask * (group["lr"] * group["weight_decay"]))
            state["exp_avg"].lerp_(grad, mask * (1 - beta1))
            square = grad * grad * alive
            state["exp_avg_sq"].mul_(1 - mask * (1 - beta2)).add_(square, alpha=1 - beta2)
            step_size = (group["lr"] / (1 - beta1**steps)).to(p.device, p.dtype)
            correction = (1 - beta2**steps).sqrt().to(p.device, p.dtype)
            denominator = state["exp_avg_sq"].sqrt() / correction + group["eps"]
            p.sub_(mask * step_size * state["exp_avg"] / denominator)

    def _snapshot(self) -> list[tuple[str, Tensor, Tensor]]:
        """Name, parameter, and where it would be after weight decay alone."""

        def decayed(p: Tensor, group: Group) -> Tensor:
            moving: Any = cast(Tensor, p.grad) != 0 if self._selective_updates else 1
            return p * (1 - moving * (group["lr"] * group["weight_decay"]))

        return [
            (name, p, decayed(p, group))
            for group in self.param_groups
            for name, p in with_grad(group)
        ]

    def _record(self, before: list[tuple[str, Tensor, Tensor]]) -> None:
        updates = [p - decayed for _, p, decayed in before]
        largest = vector([u.abs().max().float() for u in updates])
        for (name, _, _), norm, most in zip(before, norms_of(updates), largest, strict=True):
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
        """Update what has a gradient; nothing where clipping found one that is not finite."""
        recording = self._record_update_metrics and self._collecting_metrics
        products: list[Tensor] = []
        norms: list[list[Tensor]] = [[], []]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for _, p in with_grad(group):
                grad, alive = _finite(p, self.found_inf)
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                average = state["exp_avg"]
                update = average.lerp(grad, 1 - beta1)
                sign = update.sign()
                moving = (grad != 0) * alive if self._selective_updates else alive
                p.mul_(1 - moving * (group["lr"] * group["weight_decay"]))
                p.sub_(sign * (moving * group["lr"]))
                average.lerp_(grad, moving * (1 - beta2))
                if recording:
                    if self._selective_updates:
                        update, sign = update * moving, sign * moving
                    products.append((update * sign).sum())
                    norms[0].append(update)
                    norms[1].append(sign)
        if recording:
            dot = vector(products).sum()
            lengths = [torch.linalg.vector_norm(norms_of(tensors)) for tensors in norms]
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

    def get_state_for_param(self, param: Tensor) -> dict[str, Tensor | None]:
        if "momentum" in self.state[param]:
            return {"momentum": self.state[param]["momentum"]}
        return super().get_state_for_param(param)

    def _step_group(self, group: Group) -> None:
        if not group["muon"]:
            super()._step_group(group)
            return
        beta = group["betas"][1]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for _, p in with_grad(group):
            grad, alive = _finite(p, self.found_inf)
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(grad, alive * (1 - beta))
            ahead = grad.lerp(state["momentum"], beta)
            by_shape.setdefault(p.shape, []).append((p, ahead, alive))
        for shape, matrices in by_shape.items():
            stacked = torch.stack([whole(ahead) for _, ahead, _ in matrices])  # (n, rows, columns)
            updates = orthogonalize(stacked) * (0.2 * math.sqrt(max(shape)))
            for (p, _, alive), update in zip(matrices, updates.unbind(), strict=True):
                p.mul_(1 - alive * (group["lr"] * group["weight_decay"]))
                p.sub_(_like(update, p) * (alive * group["lr"]))


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest matrices with all singular values about 1 (0.7 to 1.2), (n, rows, columns).

    Five steps of a quintic Newton-Schulz iteration with Jordan's coefficients, in bfloat16 on GPUs.
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


def get_param_groups(cfg: TrainConfig, model: nn.Module) -> list[Group]:
    """Parameters with weight decay, then those without, each sorted by name.

    Linear weights decay. Norms and biases do if optimizer.decay_norm_and_bias says so, embeddings
    (a tied one too) if optimizer.decay_embeddings does; where optimizer.no_decay_norm_and_bias is
    given, it says both, negated. For Muon the matrices of the blocks are a
    group of their own.

    Raises:
        ValueError: a parameter of a module that no rule is known for.
    """
    optimizer = cfg.optimizer
    norms_decay, embeddings_decay = optimizer.decay_norm_and_bias, optimizer.decay_embeddings
    if optimizer.no_decay_norm_and_bias is not None:  # the older spelling wins, as in OLMo
        norms_decay = embeddings_decay = not optimizer.no_decay_norm_and_bias
    decaying: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                continue
            full_name = plain_name(f"{module_name}.{name}" if module_name else name)
            if name.endswith("bias") or isinstance(module, (LayerNormBase, nn.LayerNorm)):
                decays = norms_decay
            elif isinstance(module, nn.Embedding):
                decays = embeddings_decay
            elif isinstance(module, nn.Linear):
                decays = True
            else:
                raise ValueError(
                    f"no weight decay rule for {full_name} of a {type(module).__name__}; "
                    "known are linear layers, norms and embeddings"
                )
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
            "sharded": any(is_sharded(p) for p in params.values()),
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
        ValueError: selective_updates with Muon, whose updates are never selective; packed_state
            with another optimizer than AdamW.
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
    if config.packed_state and kind is not OptimizerType.adamw:
        raise ValueError(f"optimizer.packed_state is for adamw, not for {kind}")
    if kind is OptimizerType.lionw:
        return LionW(groups, **shared)
    if kind is OptimizerType.muon and config.selective_updates:
        raise ValueError(
            "optimizer.selective_updates works entry by entry, Muon on whole matrices; "
            "set --optimizer.selective_updates=false or another optimizer.name"
        )
    optimizer_class = Muon if kind is OptimizerType.muon else AdamW
    if config.packed_state:
        from olmo.optim.packed import PackedAdamW as optimizer_class
    return optimizer_class(groups, eps=config.eps, **shared)


def _finite(p: Tensor, found_inf: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient with NaN and infinity as 0; and 1.0, or 0.0 if nothing may move."""
    grad = cast(Tensor, p.grad)
    if found_inf is None:
        return grad, torch.ones((), device=p.device)
    return grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), 1.0 - found_inf


def _like(value: Tensor, p: Tensor) -> Tensor:
    """`value`, sharded as `p` is."""
    if not is_sharded(p):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, cast(Any, p).device_mesh, cast(Any, p).placements)
