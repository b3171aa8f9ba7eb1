"""Keys that forks of OLMo added to configs: ignored while they have no effect, else refused."""

from __future__ import annotations

from typing import Any

# Key → the values at which it has no effect; (): any, since it acts only with another key.
FORK_KEYS: dict[str, dict[str, tuple[Any, ...]]] = {
    "model": {
        "use_liger": (False, None),
        "use_mod": (False, None),
        "mod_every": (),
        "mod_capacity_factor": (),
        "use_moe": (False, None),
        "moe_num_experts": (),
        "moe_top_k": (),
    },
    "": {"reset_scheduler_state": (False, None)},
}


def remove_fork_keys(
    plain: dict[str, Any], keys: dict[str, tuple[Any, ...]], where: str = ""
) -> dict[str, Any]:
    """A config without these keys. Raises ValueError if one of them turns a feature on."""
    for key, off in keys.items():
        if off and plain.get(key) not in off:
            raise ValueError(
                f"{where}{key}: expected false, found {plain[key]!r}: this key of a fork of OLMo "
                "is not supported (docs/deviations.md); remove it to train without its feature"
            )
    return {key: value for key, value in plain.items() if key not in keys}
