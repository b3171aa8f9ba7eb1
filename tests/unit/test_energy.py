"""Counters of energy that come round: about every 262 kJ, which is minutes of a busy machine."""

import time
from pathlib import Path

import pytest
import torch

from olmo.bench import cell
from olmo.runtime import energy
from olmo.store.stage import measure_run

RANGE = 262_143_328_850  # microjoules, of a package


@pytest.fixture
def meters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, as the kernel shows them."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    for package in ("intel-rapl:0", "intel-rapl:1"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "max_energy_range_uj").write_text(f"{RANGE}\n")
    show(tmp_path, RANGE - 999_999, 5_000_000)
    return tmp_path


def show(meters: Path, *counts: int) -> None:
    for number, count in enumerate(counts):
        (meters / f"intel-rapl:{number}" / "energy_uj").write_text(f"{count}\n")


def test_a_counter_that_came_round_once(meters: Path):
    with measure_run() as run:
        in_bench = cell.energy_meter(torch.device("cpu"))
        show(meters, 1_000_000, 7_500_000)
    assert run["machine_energy_j"] == in_bench() == 2 + 2.5


def test_one_that_may_have_come_round_more_often_is_not_told(
    meters: Path, monkeypatch: pytest.MonkeyPatch
):
    joules = energy.EnergyMeter()
    show(meters, 1_000_000, 7_500_000)
    began = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: began + 200)
    assert joules.joules() == 4.5
    monkeypatch.setattr(time, "monotonic", lambda: began + 300)
    assert joules.joules() is None


def test_nobody_counts(meters: Path):
    joules = energy.EnergyMeter()
    (meters / "intel-rapl:1" / "energy_uj").unlink()
    assert joules.joules() is None
    assert energy.EnergyMeter().joules() is None
