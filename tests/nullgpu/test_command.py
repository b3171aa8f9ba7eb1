"""The GPU command on the null GPU: every part of the GPU's matrix completes."""

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from harness import PYTHONS, ROOT, environment, why_not


@pytest.mark.long
def test_every_part_runs_to_its_end(tmp_path: Path):
    python = PYTHONS[0]
    if reason := why_not(python):
        pytest.skip(reason)
    carry = tmp_path / "carry"
    packed = subprocess.run(
        ["bash", "bench/gpu/pack.sh", str(carry)], cwd=ROOT, capture_output=True, text=True
    )
    has_peer = packed.returncode == 0  # a pip, and the network
    words = ["--budget-s", "1800", "--layers", "1", *["--carry", str(carry)] * has_peer]
    tar = tmp_path / "null.tar"
    ran = subprocess.run(
        ["bash", "bench/gpu/run.sh", str(tar), *words],
        env=environment(python) | {"PYTHON": python},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    with tarfile.open(tar) as file:
        found = {
            member.name.removeprefix("gpu/"): json.load(file.extractfile(member))  # type: ignore[arg-type]
            for member in file.getmembers()
            if member.name.endswith(".json")
        }
    parts = found.pop("about.json")["parts"]
    for name in ("ceiling", "smoke", "profile", "train"):
        assert parts[name]["how"] == "done", parts
    timed = {name: record for name, record in found.items() if "cell" in record}
    ended_otherwise = {n: r for n, r in timed.items() if r.get("status", "ok") != "ok"}
    assert set(ended_otherwise) == (set() if has_peer else {n for n in timed if "ai2-olmo" in n})
    of_part = {part: sum(n.startswith(f"{part}/") for n in timed) for part in parts}
    assert of_part["first"] == 11 and of_part["peer"] == 1 and of_part["fp8"] == 3
    assert of_part["rest"] == 15 and of_part["profile"] == 1
    # A model is freed before the next is built: each cell has its own peak.
    peaks = {n.split(".", 1)[1].rsplit(".", 2)[0]: r["peak_memory_bytes"] for n, r in timed.items()
             if n.startswith(("first/records/olmo-250m", "rest/records/olmo-250m"))}  # fmt: skip
    small, large = peaks["auto.default.mb2.amp_bf16.none"], peaks["auto.default.mb16.amp_bf16.none"]
    assert small < large, "expected the later, smaller cell to have a lower peak"
    resumed = [r for n, r in found.items() if n.startswith("train/") and "equal" in r]
    assert [r["steps"] for r in resumed] == [200]
