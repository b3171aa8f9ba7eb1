"""A GPU that computes nothing (runtime.c, driver.c), so that what the GPU is asked for can be
counted without one: torch's CUDA build, Dynamo, Inductor, Triton and ptxas are the real ones.

What it shows: launches, copies, waits, cudaMalloc, compilations, and that code runs to its end.
What it does not: numbers, which are all zero, and speed.

    [OLMO_NULLGPU_PYTHON=…] python tests/nullgpu/harness.py python bench/gpu/account.py

runs any command on it, with that Python for the word `python`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
PYTHONS = os.environ.get("OLMO_NULLGPU_PYTHON", sys.executable).split(os.pathsep)
"""Pythons with torch's CUDA build; CI names one with the oldest torch and one with the newest."""
Run = Callable[..., Any]  # run("loop", compile={…}): what conftest.py's fixture gives


@functools.cache
def about(python: str) -> dict[str, str]:
    """torch's version there, of CUDA too, and where the headers of CUDA are."""
    program = (
        "import json, sysconfig, torch\n"
        "print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda or '',\n"
        "'headers': sysconfig.get_path('platlib') + '/nvidia/cu13/include'}))"
    )
    ran = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def why_not(python: str) -> str | None:
    if shutil.which("gcc") is None:
        return "gcc is missing; on Debian: apt-get install gcc libc6-dev"
    found = about(python)
    if not Path(found["headers"], "cuda_runtime_api.h").exists():
        return (
            f"torch {found['torch']} of {python} is not a build for CUDA 13; name a Python that "
            "has one with OLMO_NULLGPU_PYTHON"
        )
    return None


@functools.cache
def built(python: str) -> Path:
    """The folder with the library for this Python, and with what torch compiled there before."""
    found = about(python)
    folder = ROOT / "environments" / f"nullgpu-{found['torch']}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    # Unused parameters, and functions declared without any, are what these files are made of.
    flags = ["-w", "-O1", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1"]
    headers = [f"-I{HERE / 'include'}", f"-I{found['headers']}"]
    sources = [str(HERE / "runtime.c"), str(HERE / "driver.c")]
    draft = folder / f"draft-{os.getpid()}.so"
    subprocess.run(["gcc", *flags, *headers, *sources, "-o", str(draft)], check=True)
    draft.replace(library)
    return folder


def environment(python: str) -> dict[str, str]:
    """Of a process that is to see the null GPU."""
    folder = built(python)
    return os.environ | {
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, HERE / "site"))),
    }


def main() -> None:
    python = PYTHONS[0]
    if len(sys.argv) < 2:
        sys.exit("expected: python tests/nullgpu/harness.py COMMAND…")
    if reason := why_not(python):
        sys.exit(reason)
    command = [python if word == "python" else word for word in sys.argv[1:]]
    os.execvpe(command[0], command, environment(python) | {"PYTHON": python})


if __name__ == "__main__":
    main()
