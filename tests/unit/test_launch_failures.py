"""What the launcher says of a training that failed or paused, and whether it would fail again."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import given, metrics, until

from olmo.cluster.launch import (
    Geometry,
    launch,
)
from olmo.config import TrainConfig
from olmo.io import sealed
from olmo.runtime.log import LOG_ENV
from olmo.runtime.process import CAUSE_FILE, Paused
from olmo.train.__main__ import main as trainer
from olmo.train.metrics_buffer import NotFinite
from olmo.train.segments import read_segments

LAUNCH = (
    "import sys; from pathlib import Path; from olmo.cli import main;"
    "import olmo.pipeline.train as r;"
    "from olmo.cluster.launch import Geometry, launch;"
    "r.train_run = lambda config: launch(Path(config), Geometry({processes}), 1);"
    "r.train_run.__annotations__ = dict(config=str);"
    "main(['train', '--config', sys.argv[1]])"
)


@pytest.mark.slow
def test_what_would_fail_again_is_said_and_no_more(tmp_path: Path) -> None:
    wrong = {"optimizer": {"learning_rate": 1e30}, "max_grad_norm": None}
    config = given(tmp_path, **wrong, scheduler={"name": "constant"}, evaluators=[])
    said = r"^training ended early: step 2: the gradient is not finite .* the same settings only"
    with pytest.raises(ChildProcessError, match=said):
        launch(config, Geometry(1), threads=1)
    (config.parent / "metrics.jsonl").unlink()
    launch(given(tmp_path, max_duration=1, evaluators=[]), Geometry(1), threads=1)
    assert not (config.parent / "cause.json").exists(), "of an earlier attempt"


@pytest.mark.parametrize(
    "error, repeats",
    [
        (ValueError("a setting"), True),
        (FileNotFoundError("no token file"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ConnectionResetError("a mirror"), False),
        (torch.OutOfMemoryError("of a GPU"), True),
        (NotFinite("a step"), True),
    ],
)
def test_the_trainer_says_whether_another_start_would_fail_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, repeats: bool
) -> None:
    def fail(cfg: TrainConfig) -> int:
        raise error

    config = given(tmp_path)
    monkeypatch.setattr("olmo.train.loop.train", fail)
    assert trainer([str(config)]) > 0
    assert not (config.parent / "cause.json").exists(), "nobody launched it"
    monkeypatch.setenv("OLMO_LAUNCHED", "1")
    assert trainer([str(config)]) > 0
    cause = sealed.load_file(config.parent / "cause.json")
    assert cause["repeats"] is repeats and str(error) in cause["said"]
    (tmp_path / "cause.json").write_text(sealed.dumps(cause))
    again = ["sh", "-c", f"cp {tmp_path}/cause.json {config.parent}; exit 1"]
    monkeypatch.setattr("olmo.cluster.launch.build_command", lambda *_: again)
    with pytest.raises(ChildProcessError, match=r"^training ended early: ") as raised:
        launch(config, Geometry(1), threads=1)
    assert "continues" not in str(raised.value), "there is no checkpoint"
    (config.parent / "step5-unsharded").mkdir()
    with pytest.raises(ChildProcessError, match=r"^training ended early: ") as raised:
        launch(config, Geometry(1), threads=1)
    assert ("the same command continues" in str(raised.value)) is not repeats


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load_path": "nowhere"}, "no checkpoint folder at nowhere; give one that exists"),
        ({"optimizer": {"learning_rate": 1e30}}, r"step \d: the gradient is not finite"),
        ({"data": {"paths": ["none.npy"]}}, r"(data: )?no token file at none.npy"),
    ],
)
def test_the_cause_is_in_the_launchers_sentence_and_in_the_log(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(LOG_ENV, str(tmp_path / "train.log"))
    config = given(tmp_path, evaluators=[], **changes)
    with pytest.raises(
        ChildProcessError, match=rf"^training ended early: (rank 1: )?{said}"
    ) as failed:
        launch(config, Geometry(2), threads=1)
    log = (tmp_path / "train.log").read_text()
    cause = str(failed.value).removeprefix("training ended early: ").partition(". Its check")[0]
    assert f"error: {cause}" in log.replace("rank 1: error: ", "error: rank 1: ")
    seen = capfd.readouterr().err
    assert "Traceback" not in seen
    *_, last = seen.splitlines()
    assert re.fullmatch(r"torchrun: rank \d failed first, exit status \d", last)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "how"), [(1, "killed by SIGKILL"), (2, "exit status 1")])
def test_a_trainer_that_dies_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, how: str
) -> None:
    """What an earlier attempt failed of is not taken for its cause."""
    config = given(tmp_path, evaluators=[])
    (config.parent / CAUSE_FILE).write_text("an earlier cause\n")
    kill = (
        "import os, sys\n"
        "started = {'-m', 'olmo.train'} <= {*sys.orig_argv}\n"
        "if started and not any('olmo.cluster' in word for word in sys.orig_argv):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(kill)
    places = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    with pytest.raises(ChildProcessError, match=rf"{how}\) without an error message"):
        launch(config, Geometry(processes), threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_saves_and_says_so(tmp_path: Path, number: signal.Signals) -> None:
    """The status is 75 whatever torchrun's is, and the same command goes on."""
    config = given(tmp_path, max_duration=100_000, save_interval_unsharded=50_000, evaluators=[])
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH.format(processes=2), str(config)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    rows = config.parent / "metrics.jsonl"
    try:
        until(lambda: rows.exists() and len(rows.read_text().splitlines()) > 10)
        process.send_signal(number)
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()  # its ranks end with it, also where it did not heed the signal
    assert process.returncode == 75, said
    step = int(metrics(config.parent)[-1]["step"])
    assert f"olmo train: training paused at step {step} by {number.name}, saved to" in said
    assert "Traceback" not in said
    again = given(tmp_path, max_duration=step + 3, evaluators=[])
    (config.parent / "stop").write_text("SIGTERM")  # of an attempt that died before it looked
    launch(again, Geometry(2), threads=1)
    assert metrics(config.parent)[-1]["step"] == step + 3
    assert [s["after"] for s in read_segments(config.parent)] == [0, step]


@pytest.mark.slow
def test_a_pause_by_the_time_limit_is_no_failure(tmp_path: Path) -> None:
    changes = {"max_duration": 100_000, "time_limit": 0.5, "intra_op_threads": None}
    config = given(tmp_path, evaluators=[], **changes)
    with pytest.raises(Paused, match="by the time limit, saved to"):
        launch(config, Geometry(2, max_restarts=3), threads=2)
    (segment,) = read_segments(config.parent)
    assert (segment["restart"], segment["threads"]) == (0, 2)
