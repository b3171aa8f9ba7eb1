"""An optimizer's state by parameter name.

torch numbers parameters in the order of its groups; OLMo's optimizers also store their names
(`param_names`). A state by name fits other groupings, world sizes and trainers.
"""

from __future__ import annotations

from typing import Any

import torch

from olmo.model.regroup import strip_wrappers

State = dict[str, dict[str, Any]]  # parameter name → its state: exp_avg, exp_avg_sq, step, …


def to_named_state(state_dict: dict[str, Any]) -> tuple[State, list[dict[str, Any]]]:
    """State and groups of an optimizer's state_dict, by parameter name.

    Takes torch's numbered form with `param_names`, and the named form of FSDP. Raises ValueError
    for numbers without names.
    """
    groups: list[dict[str, Any]] = []
    names: dict[Any, str] = {}
    for group in state_dict["param_groups"]:
        group_names = group["params"]
        if group_names and isinstance(group_names[0], int):
            if "param_names" not in group:
                raise ValueError(
                    "the optimizer state numbers its parameters and does not name them "
                    "(no param_names); start from the weights alone: --reset_optimizer_state"
                )
            group_names = group["param_names"]
        names |= dict(zip(group["params"], group_names, strict=True))
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append({**settings, "param_names": [strip_wrappers(name) for name in group_names]})
    return {strip_wrappers(names[key]): value for key, value in state_dict["state"].items()}, groups


def load_named_state(
    optimizer: torch.optim.Optimizer, state: State, groups: list[dict[str, Any]]
) -> None:
    """Load a named state into an optimizer over the same parameters.

    A group takes the settings of the checkpoint's group that its first parameter was in. Raises
    ValueError for a parameter that no checkpoint group names.
    """
    stored_group = {name: group for group in groups for name in group["param_names"]}
    numbered: dict[int, dict[str, Any]] = {}
    new_groups = []
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.state_dict()["param_groups"]:
        names = group["param_names"]
        for number, name in zip(group["params"], names, strict=True):
            if name not in stored_group:
                raise ValueError(
                    f"the checkpoint's optimizer state has nothing for {name}: it belongs to "
                    "another model; start from the weights alone: --reset_optimizer_state"
                )
            if name in state:
                numbered[number] = {
                    k: distribute_like(v, parameters[number]) for k, v in state[name].items()
                }
        stored = stored_group[names[0]] if names else {}
        settings = {k: v for k, v in stored.items() if k in group}
        new_groups.append({**group, **settings, "params": group["params"], "param_names": names})
    optimizer.load_state_dict({"state": numbered, "param_groups": new_groups})


def distribute_like(value: Any, parameter: torch.Tensor) -> Any:
    """A full tensor as a DTensor sharded like its parameter; any other value as it is."""
    needs_sharding = hasattr(parameter, "full_tensor") and not hasattr(value, "full_tensor")
    if not needs_sharding or getattr(value, "shape", None) != parameter.shape:
        return value

    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)
