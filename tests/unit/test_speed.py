"""What costs time and is not done. How long things take, bench/ measures."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_run import command


@pytest.mark.slow
def test_a_run_that_is_not_compiled_does_not_import_the_compiler(tmp_path: Path) -> None:
    """torch imports its own for a decorator, a switch or a custom operator: seconds of it."""
    code = (
        "import runpy, sys\n"
        "sys.argv = ['olmo.train', *sys.argv[1:]]\n"
        "try:\n    runpy.run_module('olmo.train', run_name='__main__')\n"
        "except SystemExit as ended:\n    assert ended.code == 75, ended.code\n"
        "print('found', sorted({'torch._dynamo', 'torch._inductor'} & set(sys.modules)))\n"
    )
    config = command(tmp_path)[-1]
    done = subprocess.run(
        [sys.executable, "-c", code, config, "--stop_after=1"], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["found []"], done.stdout + done.stderr
