import compileall
import os
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from unittest.mock import patch

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `import project`
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network that may not be there


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Tests in any order: no process, variable or working folder goes from one to the next."""
    with patch.dict(os.environ), chdir("."):
        yield
    if project := sys.modules.get("project"):
        project.end_what_was_started()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than cores: a sixth of their time tests wait, for a signal or a deadline."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_configure(config: pytest.Config) -> None:
    """Compile the package once if Python may not write bytecode: each of hundreds of processes
    would compile all that it imports, a second for a snakemake."""
    if sys.dont_write_bytecode and not hasattr(config, "workerinput"):
        compileall.compile_dir(Path(__file__).parents[1] / "olmo", quiet=1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`gpu` tests are skipped with the reason, `long` ones unless they are asked for.

    Files of the pipeline's tests come first: they take minutes, and at the end one of them would
    run alone.
    """
    items.sort(key=lambda item: item.path.parent.name != "pipeline")
    asked = config.getoption("markexpr")
    for item in items:
        if "long" in item.keywords and "long" not in asked:
            item.add_marker(pytest.mark.skip(reason="chaos over many rounds; run with -m long"))
        if "gpu" in item.keywords and (why := no_gpu()):
            item.add_marker(pytest.mark.skip(reason=why))


def no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device here"
