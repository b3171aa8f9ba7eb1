"""What is told of a run: to people, and to programs."""

import io
import json
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_run import metrics, run

from olmo.runtime.process import EXIT_PAUSED
from olmo.train.sinks import METRICS, Console, JsonLines

METRICS_OF_A_STEP = {
    "train/CrossEntropyLoss": 2.5,
    "optim/total_grad_norm": 0.5,
    "optim/learning_rate_group0": 1e-3,
    "throughput/device/tokens_per_second": 21_460.0,
    "throughput/device/batches_per_second": 2.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_every_interval() -> None:
    out = io.StringIO()
    console = Console(5, 12, out)
    for step in range(1, 13):
        console.write(step, METRICS_OF_A_STEP)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["5/12", "10/12", "12/12"]
    expected = "loss 2.5000  grad norm 0.50  lr 1.00e-03  21.5k tokens/s/device  ETA 0:03"
    assert lines[0] == f"step  5/12  {expected}"


def test_a_bar_in_a_terminal() -> None:
    out = Terminal()
    console = Console(5, 10, out)
    for step in (1, 5):
        console.write(step, METRICS_OF_A_STEP)
    assert out.getvalue().count("\r") == 2 and "\n" not in out.getvalue(), "one line that moves"
    assert "█" * 10 + "░" * 10 in out.getvalue().split("\r")[-1]


def test_lines_beyond_the_resumed_step_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "tr')
    JsonLines(tmp_path, 2).write(3, {"x": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    JsonLines(tmp_path, None)
    assert path.read_text() == "", "a fresh run begins a fresh file"


def test_missing_wandb_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"not installed: `uv pip install wandb`"):
        run(tmp_path, wandb={"name": "x"})


class Run(list[tuple[int, dict[str, float]]]):
    """What Weights & Biases was told, step by step."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.append((step, metrics))

    def finish(self, exit_code: int) -> None:
        pass


def test_gradients_norms_are_told_whenever_anything_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Run()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: told))
    changes: dict[str, Any] = {"optimizer": {"metrics_log_interval": 4}, "evaluators": []}
    assert run(tmp_path, wandb={"name": "x", "log_interval": 2}, max_duration=4, **changes) == 0
    assert [step for step, _ in told] == [2, 4]
    norm = "optim/grad/transformer.blocks.0.ff_out.weight.norm"
    assert all(norm in values for _, values in told)
    assert ["optim/clipping_rate" in values for _, values in told] == [False, True]
    assert [norm in line for line in metrics(tmp_path / "run")] == [False, True, False, True]


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"name": "x", "project": "p"}
    assert run(tmp_path, wandb=settings, stop_after=3) == EXIT_PAUSED
    assert run(tmp_path, wandb=settings, try_load_latest_save=True) == 0
    id = (tmp_path / "run/wandb/id").read_text()
    written = sorted((tmp_path / "run/wandb").rglob("*.wandb"))
    assert [path.name for path in written] == [f"run-{id}.wandb"] * 2, "one run, in two parts"
    assert all(b"train/CrossEntropyLoss" in path.read_bytes() for path in written)
    assert run(tmp_path, wandb=settings, save_overwrite=True, max_duration=1) == 0
    assert (tmp_path / "run/wandb/id").read_text() != id, "another run"


@pytest.mark.parametrize("tracker", ["trackio", "tensorboard"])
def test_a_missing_tracker_is_said(tracker: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ValueError, match=f"not installed: `uv pip install {tracker}`"):
        run(tmp_path, **{tracker: {}})


def test_trackio_is_told_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at the import
    pytest.importorskip("trackio", reason="uv run --group trackers pytest")
    settings = {"project": "p", "name": "x"}
    assert run(tmp_path, trackio=settings, stop_after=3) == EXIT_PAUSED
    assert run(tmp_path, trackio=settings, try_load_latest_save=True) == 0
    [database] = (tmp_path / "trackio").rglob("p.db")
    with sqlite3.connect(database) as found:
        steps = [step for (step,) in found.execute("select step from metrics order by step")]
    assert steps == sorted(set(steps)) and steps[-1] == 10


def test_tensorboard_hides_steps_that_are_trained_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="uv run --group trackers pytest",
    )
    assert run(tmp_path, tensorboard={}, stop_after=3) == EXIT_PAUSED
    assert run(tmp_path, tensorboard={}, try_load_latest_save=True) == 0
    found = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    found.Reload()
    steps = [one.step for one in found.Scalars("train/CrossEntropyLoss")]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] == 10
