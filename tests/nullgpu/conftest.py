"""Programs on the null GPU (harness.py), and what they answer."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from harness import HERE, PYTHONS, ROOT, Run, environment, why_not


@pytest.fixture(scope="session", params=PYTHONS)
def python(request: pytest.FixtureRequest) -> str:
    if reason := why_not(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def run(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """run("loop", compile={…}) runs loop.py on the null GPU and gives what it answers."""
    output = tmp_path_factory.mktemp("nullgpu") / "output.txt"
    with subprocess.Popen(
        [python, "-W", "ignore", str(HERE / "forks.py")],
        env=environment(python),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as forks:
        assert forks.stdin and forks.stdout

        def ran(program: str, **request: Any) -> Any:
            words = [str(HERE / f"{program}.py"), json.dumps(request), str(output)]
            print(json.dumps(words), file=forks.stdin, flush=True)
            assert forks.stdout.readline() == "0\n", "its traceback is on stderr"
            return json.loads(output.read_text().splitlines()[-1])

        yield ran
        forks.kill()
