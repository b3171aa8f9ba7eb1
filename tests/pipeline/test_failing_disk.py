"""Each command on a disk that fails; `python tests/faults.py --writes` tries every call."""

import shutil
import subprocess
import sys

import pytest
from project import REPOSITORY

COMMANDS = ["sources", "documents", "tokenizer", "tokens", "order", "train", "push", "pull", "gc"]


@pytest.mark.skipif(not shutil.which("gcc"), reason="disk.c needs gcc")
@pytest.mark.parametrize("which", ["1", pytest.param("kinds", marks=pytest.mark.long)])
def test_a_write_that_fails_loses_nothing(which: str):
    faults = [sys.executable, REPOSITORY / "tests/faults.py", "--writes", which, "--jobs", "2"]
    done = subprocess.run(faults, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = [line.split()[0] for line in done.stdout.splitlines() if " at call " in line]
    assert set(tried) == set(COMMANDS) and len(tried) >= 3 * len(COMMANDS)
