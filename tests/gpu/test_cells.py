"""A cell of the project's matrix on the GPU that is there: all numbers of its record."""

from pathlib import Path

import pytest

from olmo.bench.matrix import Cell, load_section
from olmo.bench.pairs import CellRunner

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
MATRIX = Path(__file__).parents[2] / "config/bench/tps.yaml"


def test_a_cell_has_speed_mfu_memory_and_energy():
    section = load_section(MATRIX, "cuda")
    record = CellRunner("cuda").time(
        section, Cell("olmo-250m", microbatch=2, precision="amp_bf16"), 300
    )
    assert record["status"] == "ok", record
    assert len(record["seconds"]) == section.steps and record["tokens_per_second"] > 0
    assert record["peak_memory_bytes"] > 4 * record["parameters"]
    assert record["last_loss"] < record["first_loss"]
    if record["device_flops"]:
        assert 0 < record["mfu_causal"] < record["mfu_palm"] < 1
    if record["joules_per_token"] is not None:  # a card that counts
        assert 0 < record["joules_per_token"] * record["tokens_per_second"] < 2000, "watts"


def test_what_the_memory_cannot_hold_is_a_result():
    section = load_section(MATRIX, "cuda")
    record = CellRunner("cuda").time(
        section, Cell("olmo-250m", microbatch=20_000, precision="fp32"), 300
    )
    assert record["status"] == "out of memory" and "memory" in record["why"]
