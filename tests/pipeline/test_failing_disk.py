"""Each command on a disk that fails; `python tests/faults.py --writes` tries every call."""

import random
import shutil
from pathlib import Path

import failing_disk
import pytest

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="disk.c needs gcc")


@pytest.mark.parametrize("which", ["1", pytest.param("kinds", marks=pytest.mark.long)])
def test_a_write_that_fails_loses_nothing(tmp_path: Path, which: str):
    random.seed(f"writes {which}")
    failures = list(failing_disk.sweep(tmp_path, which))
    assert {f.command for f in failures} >= {"sources", "documents", "tokens", "order", "train"}
    assert [f for f in failures if f.complaints] == []
