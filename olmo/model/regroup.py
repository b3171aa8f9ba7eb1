"""Renames parameters in state dicts of older OLMo, wrapped models, or other block groups."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TypeVar

T = TypeVar("T")

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_GROUPED = re.compile(r"(.*\bblock_groups)\.(\d+)\.(\d+)\.(.*)")
_BLOCK = re.compile(r"(.*\btransformer)\.blocks\.(\d+)\.(.*)")


def strip_wrappers(name: str) -> str:
    """A parameter's name without the parts that DDP, FSDP, compile and checkpointing add."""
    return _WRAPPERS.sub("", name)


def regroup_state_dict(
    state_dict: dict[str, T], block_group_size: int = 1
) -> tuple[dict[str, T], dict[str, set[str]]]:
    """The state dict with the parameter names of a model with this block group size.

    Removes wrappers' prefixes, regroups blocks, and splits the single `norm` of the oldest OLMo
    blocks into today's two.

    Returns:
        The renamed copy, and for each old name its new names.
    """
    group_sizes: defaultdict[int, int] = defaultdict(int)
    for name in state_dict:
        if match := _GROUPED.fullmatch(strip_wrappers(name)):
            group, block = int(match[2]), int(match[3])
            group_sizes[group] = max(group_sizes[group], block + 1)
    saved_size = max(group_sizes.values(), default=1)

    renamed: dict[str, T] = {}
    names: defaultdict[str, set[str]] = defaultdict(set)
    for name, value in state_dict.items():
        new = strip_wrappers(name)
        if match := _GROUPED.fullmatch(new):
            index = int(match[2]) * saved_size + int(match[3])
            new = f"{match[1].removesuffix('block_groups')}blocks.{index}.{match[4]}"
        if block_group_size > 1 and (match := _BLOCK.fullmatch(new)):
            group, block = divmod(int(match[2]), block_group_size)
            new = f"{match[1]}.block_groups.{group}.{block}.{match[3]}"
        targets = [new]
        if re.search(r"\.norm\.(weight|bias)$", new):
            targets = [re.sub(r"\.norm\.", f".{kind}_norm.", new) for kind in ("attn", "ff")]
        for target in targets:
            renamed[target] = value
            names[name].add(target)
    return renamed, dict(names)
