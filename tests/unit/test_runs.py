"""`olmo runs`: the state of every run, from records, metrics and leases of any machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from olmo.io import sealed
from olmo.report.runs import runs
from olmo.runtime.process import CAUSE_FILE, PAUSED_FILE
from olmo.store import naming
from olmo.store.action import Action
from olmo.store.lease import LEASE_TIMEOUT_S, lease
from olmo.store.store import Store

ELSEWHERE = {"host": "node7", "boot": "another", "pids": "", "pid": 1, "start": "1"}
TRAINING = {"train/CrossEntropyLoss": 5.25, "throughput/device/tokens_per_second": 21_460.0}


def write_metrics(folder: Path, steps: int) -> None:
    """A run's metrics: a line a step, and an evaluation without training's metrics at the end."""
    rows: list[dict[str, Any]] = [{"step": step, **TRAINING} for step in range(1, steps + 1)]
    rows.append({"step": steps, "eval/heldout/CrossEntropyLoss": 5.5})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    names = ("finished", "begun", "later")
    config = {"runs": {name: {"train": "t.yaml"} for name in names}, "soups": {"mean": ["begun"]}}
    Path("config").mkdir()
    Path("config/config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def finish(name: str, device: str = "NVIDIA H100", **facts: Any) -> None:
    """A finished run, stored and named as the stage `training` does it."""
    store = Store(Path("store"))

    def build(work: Path) -> dict[str, Any]:
        final = work / "outputs/final"
        final.mkdir()
        write_metrics(final, 24)
        (final / "model.safetensors").write_bytes(bytes(3000))
        conditions = {"device": device, "processes": 8}
        return {"facts": facts, "run": {"wall_s": 75.0}, "conditions": conditions}

    record = store.run(Action("training", 1, {"name": name}), build)
    naming.link_output(store, record, "final", Path("checkpoints", name, "final"))


def begin(name: str) -> Path:
    """A run that has trained 3 of 24 steps, in its work folder; the folder."""
    work = Path("store/work", f"key-of-{name}", "attempt")
    work.mkdir(parents=True)
    naming.symlink_atomic(Store(Path("store")), Path("checkpoints", name, "run"), work)
    (work / "given.yaml").write_text("max_duration: 24\n")
    write_metrics(work, 3)
    return work


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The rows of the table by run, the heading too."""
    capsys.readouterr()
    runs()
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    return {row[0]: [cell.strip() for cell in row[1:] if cell] for row in rows}


def test_finished_begun_and_new_runs(project: Path, capsys):
    finish("finished", steps=24, heldout_loss={"heldout": {"first": 8.0, "last": 5.5}})
    begin("begun")
    table = shown(capsys)
    heading = ["state", "step", "loss", "held-out", "tokens/s", "age", "size", "trained"]
    assert table.pop("run") == heading
    assert list(table) == ["begun", "finished", "later", "mean"], "what is not done comes first"
    age, size = table["finished"][5:7]
    assert table["finished"] == ["done", "24/24", "5.250", "5.500", "21.5k", age, size, "1:15"]
    assert age.endswith(" s") and size.endswith("kB")
    assert table["begun"][:5] == ["stopped", "3/24", "5.250", "5.500", "21.5k"]
    assert table["later"] == table["mean"] == ["not begun"]


def test_a_price_gives_a_cost(project: Path, capsys):
    finish("finished", steps=24)
    finish("begun", "AVX512", steps=24)
    config = Path("config/config.yaml")
    config.write_text(config.read_text() + "price: {gpu_hour: 3.0, currency: EUR}\n")
    table = shown(capsys)
    assert table["run"][-1] == "cost" and table["finished"][-2:] == ["1:15", "0.50 EUR"]
    assert table["begun"][-1] == "1:15", "GPU-hours need a GPU"


def test_the_loss_of_a_tuned_run_is_that_of_its_answers(project: Path, capsys):
    folder = begin("begun")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "eval/heldout/CrossEntropyLossPerLabel": 6.125}\n')
    assert shown(capsys)["begun"][:3] == ["stopped", "3/24", "6.125"], "no other is shown"


def test_why_a_run_does_not_go_on(project: Path, capsys):
    folder = begin("begun")
    (folder / PAUSED_FILE).write_text(sealed.dumps({"step": 3}))
    assert shown(capsys)["begun"][0] == "paused"
    (folder / CAUSE_FILE).write_text(sealed.dumps({"cause": "no memory"}))
    assert shown(capsys)["begun"][0] == "failed"
    with lease(Path("store/leases"), "key-of-begun"):
        assert shown(capsys)["begun"][0] == "running"
    assert shown(capsys)["begun"][0] == "failed"


def test_a_run_of_another_machine(project: Path, capsys):
    """As through SLURM: its lease is touched, and no process here holds it."""
    begin("begun")
    path = Path("store/leases/key-of-begun.0")
    path.parent.mkdir()
    path.write_text(json.dumps(ELSEWHERE))
    assert shown(capsys)["begun"][0] == "running"
    silent = time.time() - LEASE_TIMEOUT_S - 5
    os.utime(path, (silent, silent))
    assert shown(capsys)["begun"][0] == "stopped"


def test_runs_that_the_config_does_not_name_and_a_line_half_written(project: Path, capsys):
    folder = begin("removed")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/Cross')
    assert shown(capsys)["removed"][1] == "3/24"


def test_another_folder_and_no_torch(project: Path, monkeypatch: pytest.MonkeyPatch):
    (project / "inner").mkdir()
    monkeypatch.chdir(project / "inner")
    with pytest.raises(ValueError, match=r"expected config/config.yaml in .*, found none; cd /"):
        runs()
    code = "import sys, olmo.report.runs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_runs_of_a_ladder_are_listed_when_they_begin(project: Path, capsys):
    content = yaml.safe_load(Path("config/config.yaml").read_text())
    content["ladders"] = {"x": {"sizes": {"s": [], "l": []}, "budgets": ["8x"]}}
    Path("config/config.yaml").write_text(yaml.safe_dump(content))
    runs()
    assert "x-s-8x" not in capsys.readouterr().out
    begin("x-s-8x")
    runs()
    shown = capsys.readouterr().out
    assert "x-s-8x" in shown and "x-l-8x" not in shown
