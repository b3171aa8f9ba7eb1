"""An optimizer's state by parameter name.

torch numbers parameters in the order of its groups; OLMo's optimizers keep the names beside them
(`param_names`). By name a state survives other groupings, world sizes and trainers.
"""

from __future__ import annotations

from typing import Any

import torch

from olmo.model.regroup import plain_name

State = dict[str, dict[str, Any]]  # parameter name → what the optimizer keeps of it


def by_name(state_dict: dict[str, Any]) -> tuple[State, list[dict[str, Any]]]:
    """State and groups of an optimizer's state_dict, parameters called by their names.

    Takes torch's numbered form with `param_names`, and the named form that FSDP gives. Raises
    ValueError where numbers come without names.
    """
    groups: list[dict[str, Any]] = []
    names: dict[Any, str] = {}
    for group in state_dict["param_groups"]:
        called = group["params"]
        if called and isinstance(called[0], int):
            if "param_names" not in group:
                raise ValueError(
                    "the optimizer state numbers its parameters and does not name them "
                    "(no param_names); start from the weights alone: --reset_optimizer_state"
                )
            called = group["param_names"]
        names |= dict(zip(group["params"], called, strict=True))
        rest = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append({**rest, "param_names": [plain_name(name) for name in called]})
    return {plain_name(names[key]): value for key, value in state_dict["state"].items()}, groups


def load_by_name(
    optimizer: torch.optim.Optimizer, state: State, groups: list[dict[str, Any]]
) -> None:
    """Put a named state into an optimizer over the same parameters.

    Settings of a group follow the checkpoint's group of its first parameter. Raises ValueError
    where a parameter has no state.
    """
    origin = {name: group for group in groups for name in group["param_names"]}
    numbered: dict[int, dict[str, Any]] = {}
    new_groups = []
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.state_dict()["param_groups"]:
        names = group["param_names"]
        for number, name in zip(group["params"], names, strict=True):
            if name not in origin:
                raise ValueError(
                    f"the checkpoint's optimizer state has nothing for {name}; it belongs to "
                    "another model; start from the weights alone: --reset_optimizer_state"
                )
            if name in state:
                numbered[number] = {
                    k: placed(v, parameters[number]) for k, v in state[name].items()
                }
        kept = {k: v for k, v in origin[names[0]].items() if k in group} if names else {}
        new_groups.append({**group, **kept, "params": group["params"], "param_names": names})
    optimizer.load_state_dict({"state": numbered, "param_groups": new_groups})


def placed(value: Any, parameter: torch.Tensor) -> Any:
    """A whole tensor, split over processes as the parameter of its shape is."""
    is_split = hasattr(parameter, "full_tensor") and not hasattr(value, "full_tensor")
    if not is_split or getattr(value, "shape", None) != parameter.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)
