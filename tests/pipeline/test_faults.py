"""One round of each fault of tests/faults.py; `python tests/faults.py --rounds 10` runs many."""

import random
from pathlib import Path

import pytest
from faults import VICTIMS, rounds


@pytest.mark.parametrize("name", ["snakemake", "dolma", "rank"])
def test_a_killed_run_carries_on_to_the_same_bytes(name: str, tmp_path: Path):
    random.seed(name)
    (result,) = rounds(VICTIMS[name], 1, tmp_path)
    assert result.complaints == []
    assert result.killed is not None


@pytest.mark.long
@pytest.mark.parametrize("name", VICTIMS)
def test_ten_moments(name: str, tmp_path: Path):
    for result in rounds(VICTIMS[name], 10, tmp_path):
        assert result.complaints == []
