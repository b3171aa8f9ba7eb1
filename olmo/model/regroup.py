"""State dicts saved by older OLMo, by wrapped models, or with other block groups."""

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


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put before it or in it."""
    return _WRAPPERS.sub("", name)


def regrouped(
    state_dict: dict[str, T], block_group_size: int = 1
) -> tuple[dict[str, T], dict[str, set[str]]]:
    """The state dict with the names of a model of this block group size.

    Wrappers' prefixes go, blocks are grouped anew, and the one `norm` that the oldest OLMo blocks
    had becomes the two of today.

    Returns:
        The renamed copy, and for each old name the new ones.
    """
    group_sizes: defaultdict[int, int] = defaultdict(int)
    for name in state_dict:
        if match := _GROUPED.fullmatch(plain_name(name)):
            group, block = int(match[2]), int(match[3])
            group_sizes[group] = max(group_sizes[group], block + 1)
    saved_size = max(group_sizes.values(), default=1)

    renamed: dict[str, T] = {}
    names: defaultdict[str, set[str]] = defaultdict(set)
    for name, value in state_dict.items():
        new = plain_name(name)
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
