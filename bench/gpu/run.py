"""Runs the parts one after the other, each within its own limit and all within the budget.

Started by run.sh. Each record is a file, written atomically when it is known, and OUT.tar is then
replaced atomically. So whenever this ends or is killed, only the record in progress is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import draw
from omegaconf import OmegaConf

from olmo.bench.__main__ import code_digest, time_missing
from olmo.bench.cell import describe_machine
from olmo.bench.matrix import Section
from olmo.bench.pairs import kill_after
from olmo.io import sealed
from olmo.runtime.log import log
from olmo.runtime.process import describe_exit, supervised

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
# In order of value, with their limits in seconds. Time that a part does not use is left to `rest`.
LIMITS = {
    "ceiling": 30.0,  # products and copies: the most that the device can do
    "smoke": 75.0,  # what this device computes beside the formula
    "first": 170.0,  # the most important cells
    "profile": 45.0,  # the kernels of the fastest cell
    "peer": 90.0,  # ai2-olmo beside ours, in turns
    "fp8": 80.0,  # beside bfloat16: speed, and 200 losses
    "train": 60.0,  # a run of olmo.train, killed and resumed
    "rest": float("inf"),
}
PROGRAMS = {  # the other parts are cells of matrix.yaml
    "ceiling": "ceiling.py",
    "smoke": "smoke.py",
    "profile": "profile_step.py",
    "train": "train_resume.py",
}
MAX_BYTES = 16 * 2**20  # of OUT.tar
MIN_PART_S = 8.0  # no part gets a record in less
RESERVE_S = 4.0  # for the last tar and its page


class Results:
    """A folder of records, packed into a tar after each."""

    def __init__(self, tar: Path, about: dict[str, Any]) -> None:
        self.tar, self.about = tar, about
        self.folder = Path(tempfile.mkdtemp(prefix="olmo-gpu-"))
        self.add("about.json", about)

    def add(self, name: str, record: dict[str, Any]) -> None:
        sealed.write_atomic(self.folder / name, json.dumps(record, indent=1))
        self.pack()

    def pack(self) -> None:
        """Replace the tar atomically."""
        draft = self.tar.with_name(f".{self.tar.name}.draft")
        with tarfile.open(draft, "w") as file:
            file.add(self.folder, "gpu", filter=_tar_filter)
        if (size := draft.stat().st_size) > MAX_BYTES:
            draft.unlink()
            raise ValueError(f"{self.tar}: expected at most {MAX_BYTES} bytes, found {size}")
        sealed.fsync_path(draft)
        draft.replace(self.tar)


def _tar_filter(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Members without an owner; no drafts."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return None if Path(member.name).name.startswith(".") else member


def run_program(part: str, request: dict[str, Any], limit_s: float, results: Results) -> str:
    """Run a part's program, whose lines of JSON are records. Returns how it ended."""
    stderr = results.folder / part / "said.txt"
    stderr.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", str(HERE / PROGRAMS[part]), json.dumps(request)]
    with (
        stderr.open("w") as errors,
        supervised(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        kill_after(limit_s, process) as expired,
    ):
        assert process.stdout is not None
        for number, line in enumerate(process.stdout):
            if line.startswith("{"):
                record = json.loads(line)
                results.add(f"{part}/{number:04}.json", record)
                log.info(f"{part}: {draw.format_record(record)}")
        code = process.wait()
    text = stderr.read_text()[-20_000:]
    stderr.write_text(text)
    if expired.is_set():
        return f"cut off after {limit_s:.0f} s"
    return "done" if code == 0 else f"{describe_exit(code)}: {(text.splitlines() or [''])[-1]}"


def run_cells(part: str, limit_s: float, results: Results, peer: str) -> str:
    """Time the cells and pairs of a part. Returns how it ended."""
    end = time.monotonic() + limit_s
    machine = describe_machine()
    statuses: Counter[str] = Counter()
    peers = [f"ai2-olmo={peer}"] if peer else []
    for section in load_sections(results.about, part):
        left_s = max(end - time.monotonic(), 0.0)
        for record, line in time_missing(section, results.folder / part, machine, peers, left_s):
            statuses[record["status"]] += 1
            results.pack()
            log.info(line)
    return ", ".join(f"{n} {status}" for status, n in statuses.items()) or "no time for any cell"


def load_sections(about: dict[str, Any], part: str) -> list[Section]:
    """The sections of a part in matrix.yaml, for this kind of device."""
    matrix: Any = OmegaConf.to_container(OmegaConf.load(HERE / "matrix.yaml"))
    of_kind = matrix[about["kind"]]
    for shape in of_kind["shapes"].values():
        shape["n_layers"] = about["layers"] or shape["n_layers"]
    shared = {name: of_kind[name] for name in ("model", "shapes", "switches")}
    shared |= {"warmup": 5, "steps": 20, "rounds": 5, "limit_s": 120.0}
    return [Section.new(**shared | section) for section in of_kind["parts"][part]]


def fastest_cell(results: Results) -> dict[str, Any] | None:
    """The fastest cell of the first shape in the part `first`."""
    records = [json.loads(p.read_text()) for p in (results.folder / "first/records").glob("*.json")]
    shape = next(iter(load_sections(results.about, "first")[0].shapes))
    timed = [r for r in records if r["status"] == "ok" and r["cell"]["shape"] == shape]
    return max(timed, key=lambda r: r["tokens_per_second"])["cell"] if timed else None


def describe_command(command: list[str], layers: int | None) -> dict[str, Any]:
    """The head of the results: command, code, machine, time."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        **describe_machine(),
        "command": " ".join(command),
        "commit": commit or None,
        "code": code_digest(["."]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "layers": layers,
        "parts": {},
    }


def run_part(part: str, limit_s: float, results: Results, peer: str) -> str:
    """Run a part. Returns how it ended."""
    if part not in PROGRAMS:
        return run_cells(part, limit_s, results, peer)
    request = {name: results.about[name] for name in ("kind", "layers")}
    if part == "profile":
        if (cell := fastest_cell(results)) is None:
            return "skipped, the part first has no timed cell"
        section = load_sections(results.about, "first")[0]
        request |= {"cell": cell, "section": section.asdict()}
    return run_program(part, request, limit_s, results)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench/gpu/run.sh")
    parser.add_argument("out", type=Path, metavar="OUT.tar")
    parser.add_argument("--budget-s", type=float, default=570.0)
    parser.add_argument("--carry", type=Path, help="the folder that bench/gpu/pack.sh filled")
    parser.add_argument("--part", action="append", choices=LIMITS, help="default: all parts")
    parser.add_argument(
        "--layers", type=int, help="of every shape, for a rehearsal: parts have no limits then"
    )
    options = parser.parse_args()
    passed_s = time.time() - float(os.environ.get("OLMO_GPU_BEGAN", time.time()))
    end = time.monotonic() + options.budget_s - passed_s - RESERVE_S
    options.out.parent.mkdir(parents=True, exist_ok=True)
    carried = (options.carry / "ai2-olmo") if options.carry else None
    peer = str(carried) if carried and carried.is_dir() else ""
    command = ["bash bench/gpu/run.sh", *sys.argv[1:]]
    results = Results(options.out, describe_command(command, options.layers))
    about, inductor_cache = results.about, results.folder.with_suffix(".inductor")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(inductor_cache)
    log.info(f"{about['device']}, torch {about['torch']}: {options.budget_s:g} s")
    try:
        for name in options.part or LIMITS:
            began = time.monotonic()
            # A rehearsal may run on a busy machine, where the limits are too short.
            limit_s = end - began if options.layers else min(LIMITS[name], end - began)
            if limit_s < MIN_PART_S:
                how = f"left out, {max(limit_s, 0.0):.0f} s are left"
            else:
                log.info(f"== {name}: {limit_s:.0f} s at most")
                try:
                    how = run_part(name, limit_s, results, peer)
                except Exception as error:  # the next part may still run
                    how = f"{type(error).__name__}: {error}"
            seconds = round(time.monotonic() - began, 1)
            about["parts"][name] = {"seconds": seconds, "how": how}
            results.add("about.json", about)
            log.info(f"== {name}: {how}, {seconds:.0f} s")
        print(draw.format_page(results.folder))
    finally:
        shutil.rmtree(results.folder)
        shutil.rmtree(inductor_cache, ignore_errors=True)
    log.info(str(options.out))


if __name__ == "__main__":
    main()
