"""Each command on a disk that fails; `python tests/faults.py --writes` tries every call."""

import random
import shutil
from pathlib import Path

import failing_disk
import pytest

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="disk.c needs gcc")


@pytest.mark.parametrize(
    "calls_each", [1, pytest.param(10, marks=pytest.mark.long)], ids=["one", "ten"]
)
def test_a_write_that_fails_loses_nothing(tmp_path: Path, calls_each: int):
    random.seed(f"writes {calls_each}")
    failures = list(failing_disk.sweep(tmp_path, calls_each))
    assert {f.command for f in failures} >= {"sources", "documents", "tokens", "order", "train"}
    assert [f for f in failures if f.complaints] == []
