"""For every Python process on the null GPU: what compares numbers, or times, is left out.

All numbers are zero there, so no trial of a kernel agrees with the formula; every event is as long
as any other, so it does not matter how a kernel is tiled.
"""

import importlib.abc
import importlib.util
import sys
from types import ModuleType

CHANGES = {
    "olmo.model.kernel_choice": lambda module: setattr(
        module, "run_trial", lambda backend, setting: None
    ),
    "torch._inductor.config": lambda module: setattr(module.triton, "autotune_pointwise", False),
}


class Finder(importlib.abc.MetaPathFinder):
    """Finds these modules as ever, and changes them once they are loaded."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in CHANGES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        load = spec.loader.exec_module

        def changed(module: ModuleType) -> None:
            load(module)
            CHANGES[name](module)

        spec.loader.exec_module = changed
        return spec


sys.meta_path.insert(0, Finder())
