"""The bar of commands that work through many things."""

import os
import subprocess
import sys
from pathlib import Path

from project import REPOSITORY, run_in_terminal

CODE = "from olmo.runtime.bar import track; print(sum(track([1, 2, 3], 'hashing objects')))"


def test_a_bar_is_for_a_terminal(tmp_path: Path):
    words = [sys.executable, "-c", CODE]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1"}
    said = run_in_terminal(words, tmp_path, environment)
    assert "hashing objects" in said and "3/3" in said and "6\r\n" in said
    piped = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert (piped.stdout, piped.stderr) == ("6\n", "")
