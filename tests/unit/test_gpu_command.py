"""The GPU command on a CPU: it ends in time, and a kill loses no finished record."""

import json
import os
import random
import re
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN, DRAW = ROOT / "bench/gpu/run.sh", ROOT / "bench/gpu/draw.py"
BUDGET_S = 200  # more than all parts need: another test file may run beside this one
pytestmark = pytest.mark.slow


def command(tar: Path, *words: str) -> list[str]:
    return ["bash", str(RUN), str(tar), *words]


def environment(folder: Path) -> dict[str, str]:
    """Hides this machine's GPU and peer."""
    chosen = {"PYTHON": sys.executable, "TMPDIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    return {k: v for k, v in os.environ.items() if k != "OLMO_PEER_PYTHON"} | chosen


def records(tar: Path) -> list[str]:
    """The names of the records in a tar, after parsing each."""
    with tarfile.open(tar) as file:
        names = [m.name for m in file.getmembers() if m.name.endswith(".json")]
        for name in names:
            assert json.load(file.extractfile(name)), name  # type: ignore[arg-type]
    return [name for name in names if not name.endswith("about.json")]


def test_all_parts_run_within_the_budget_and_are_drawn(tmp_path: Path):
    tar, began = tmp_path / "out" / "cpu.tar", time.monotonic()
    words = command(tar, "--budget-s", str(BUDGET_S))
    ran = subprocess.run(words, env=environment(tmp_path), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert time.monotonic() - began < BUDGET_S
    assert tar.stat().st_size < 16 * 2**20
    assert [p.name for p in tar.parent.iterdir()] == ["cpu.tar"], "expected no other file"
    parts = {name.split("/")[1] for name in records(tar)}
    every = {"ceiling", "smoke", "first", "profile", "peer", "fp8", "train", "rest"}
    assert parts | {"rest"} == every  # a busy machine may have no time for rest
    with tarfile.open(tar) as file:
        about = json.load(file.extractfile("gpu/about.json"))  # type: ignore[arg-type]
    assert all(part["how"] for part in about["parts"].values()) and about["torch"]
    drawn = subprocess.run(
        [sys.executable, str(DRAW), str(tar), str(tmp_path / "drawn")],
        env=environment(tmp_path) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert drawn.returncode == 0, drawn.stderr
    page = (tmp_path / "drawn/README.md").read_text()
    for title in ("Tokens per second", "8 bits beside bfloat16", "killed and resumed", "goes"):
        assert re.search(f"^## .*{title}", page, re.MULTILINE), title
    assert "| straight beside killed and resumed | 24 | 24 losses equal" in page
    assert not re.search(r"\| NO \|", page), "expected every check to pass"
    cells = (tmp_path / "drawn/cells.csv").read_text().splitlines()
    assert len(cells) > 6 and cells[0].startswith("shape,")


def test_a_small_budget_skips_parts(tmp_path: Path):
    tar = tmp_path / "cpu.tar"
    words = command(tar, "--budget-s", "20", "--part", "ceiling", "--part", "smoke")
    began = time.monotonic()
    ran = subprocess.run(words, env=environment(tmp_path), capture_output=True, text=True)
    assert ran.returncode == 0 and time.monotonic() - began < 20, ran.stderr
    assert "smoke: left out" in ran.stdout or "smoke: cut off" in ran.stdout
    assert any("ceiling" in name for name in records(tar))


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3, 4))]
)
def test_a_kill_at_any_moment_loses_no_finished_record(tmp_path: Path, seed: int):
    tar, parts = tmp_path / "cpu.tar", ("ceiling", "first", "fp8", "train")
    words = command(tar, *(word for part in parts for word in ("--part", part)))
    process = subprocess.Popen(
        words,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    started = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            started.set()
        started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(60) and process.poll() is None, lines
    time.sleep(random.Random(seed).uniform(0.0, 15.0))
    process.kill()
    process.wait()
    reader.join(30)
    assert not reader.is_alive(), "expected its processes to end with it"
    finished = [line for line in lines if re.match(r"ceiling: |train: |\d+ of \d+ ", line)]
    assert len(records(tar)) >= len(finished), lines


def test_without_omegaconf_the_error_names_pack_sh(tmp_path: Path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    ran = subprocess.run(
        command(tmp_path / "cpu.tar"),
        env=environment(tmp_path) | {"PYTHON": str(bare)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2 and "bash bench/gpu/pack.sh FOLDER" in ran.stderr
