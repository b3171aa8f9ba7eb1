"""Public names of a package that are imported at their first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazy_exports(
    package: str, homes: dict[str, list[str]]
) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` (PEP 562) of a package: `homes` maps its modules to their names.

    `import olmo.data` then imports no module, and torch only with the first name that needs it.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in home:
            return getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, sorted(home)
