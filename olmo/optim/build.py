"""Builds the optimizer of a config, and the parameter groups: which parameters decay.

    optim = build_optimizer(cfg, model)
    metrics = optim.clip_grads_and_collect_metrics(step)  # tensors, on the device
    optim.step()                          # changes nothing if a gradient was not finite

Parameters may be sharded DTensors; norms are then those of the full tensors.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from olmo.config import OptimizerType, TrainConfig
from olmo.config.checks import check_optimizer
from olmo.model.norm import LayerNormBase
from olmo.model.regroup import strip_wrappers
from olmo.optim.adamw import AdamW
from olmo.optim.lionw import LionW
from olmo.optim.muon import Muon
from olmo.optim.optimizer import Optimizer, ParamGroup, is_dtensor
from olmo.optim.packed import PackedAdamW


def get_param_groups(cfg: TrainConfig, model: nn.Module) -> list[ParamGroup]:
    """Parameters with weight decay, then those without, each sorted by name.

    Linear weights decay. Norms and biases do if optimizer.decay_norm_and_bias says so, embeddings
    (a tied one too) if optimizer.decay_embeddings does; where optimizer.no_decay_norm_and_bias is
    given, it sets both, negated. With Muon, the matrices of the blocks are a group of their own.

    Raises:
        ValueError: a parameter of a module type without a rule.
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
            full_name = strip_wrappers(f"{module_name}.{name}" if module_name else name)
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

    sets: list[tuple[dict[str, nn.Parameter], ParamGroup]]
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
            "sharded": any(is_dtensor(p) for p in params.values()),
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
        ValueError: settings that this optimizer does not have (`check_optimizer`).
    """
    check_optimizer(cfg.optimizer)
    groups = get_param_groups(cfg, model)
    config = cfg.optimizer
    shared: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": tuple(config.betas),
        "weight_decay": config.weight_decay,
        "record_update_metrics": config.record_update_metrics,
        "selective_updates": config.selective_updates,
    }
    name = OptimizerType(config.name)
    if name is OptimizerType.lionw:
        return LionW(groups, **shared)
    optimizer_class: type[AdamW] = Muon if name is OptimizerType.muon else AdamW
    if config.packed_state:
        optimizer_class = PackedAdamW
    return optimizer_class(groups, eps=config.eps, **shared)
