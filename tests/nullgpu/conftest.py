"""Programs on the null GPU (harness.py), and what they answer."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from harness import HERE, PYTHONS, ROOT, Run, environment, why_not


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
