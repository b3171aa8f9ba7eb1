"""A GPU that computes nothing (runtime.c, driver.c), so that what the GPU is asked for can be
counted without one: torch's CUDA build, Dynamo, Inductor, Triton and ptxas are the real ones.

What it shows: launches, copies, waits, cudaMalloc, compilations, and that code runs to its end.
What it does not: numbers, which are all zero, and speed.
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

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
PYTHONS = os.environ.get("OLMO_NULLGPU_PYTHON", sys.executable).split(os.pathsep)
"""Pythons with torch's CUDA build; CI names one with the oldest torch and one with the newest."""

Run = Callable[..., Any]


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
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
    }


@pytest.fixture(scope="session", params=PYTHONS)
def python(request: pytest.FixtureRequest) -> str:
    if reason := why_not(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def run(python: str) -> Run:
    """run("loop", compile={…}) runs loop.py on the null GPU and gives what it answers."""

    def ran(program: str, **request: Any) -> Any:
        done = subprocess.run(
            [python, "-W", "ignore", str(HERE / f"{program}.py"), json.dumps(request)],
            env=environment(python),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return ran
