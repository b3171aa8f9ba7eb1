"""Runs the parts one after the other, each within its own limit and all within the budget.

Started by run.sh, which says how. A part leaves its records as files, each written whole as soon
as it is known; OUT.tar is replaced whole after each of them. So whenever this ends, or is ended,
what is lost is the record that was being made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import draw
from omegaconf import OmegaConf

from olmo.bench import __main__ as bench
from olmo.bench.cell import surroundings
from olmo.bench.matrix import Section
from olmo.runtime.log import log
from olmo.runtime.process import describe_exit, supervised

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
# In order of value, with their limits in seconds; what a part leaves of its own is for the rest.
LIMITS = {
    "ceiling": 30.0,  # products and copies: what is to be held against
    "smoke": 75.0,  # what this device computes beside the formula
    "first": 170.0,  # the cells that matter most
    "profile": 45.0,  # where the best cell's time goes
    "peer": 90.0,  # ai2-olmo beside ours, in turns
    "fp8": 80.0,  # beside bfloat16: speed, and 200 losses
    "train": 60.0,  # a run of olmo.train, killed and resumed
    "rest": float("inf"),
}
PROGRAMS = {  # the others are cells of matrix.yaml
    "ceiling": "ceiling.py",
    "smoke": "smoke.py",
    "profile": "profile_step.py",
    "train": "train_resume.py",
}
MOST_BYTES = 16 * 2**20  # of OUT.tar
LEAST_S = 8.0  # in less no part gets anywhere
LAST_S = 4.0  # for the last tar, and its page


class Results:
    """A folder of records, and the tar of it."""

    def __init__(self, tar: Path, about: dict[str, Any]) -> None:
        self.tar, self.about = tar, about
        self.folder = Path(tempfile.mkdtemp(prefix="olmo-gpu-"))
        self.add("about.json", about)

    def add(self, name: str, record: dict[str, Any]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        bench.write_whole(path, json.dumps(record, indent=1))
        self.pack()

    def pack(self) -> None:
        """Replace the tar by what there is now."""
        draft = self.tar.with_name(f".{self.tar.name}.draft")
        with tarfile.open(draft, "w") as file:
            file.add(self.folder, "gpu", filter=_plain)
        if (size := draft.stat().st_size) > MOST_BYTES:
            draft.unlink()
            raise ValueError(f"{self.tar}: expected at most {MOST_BYTES} bytes, found {size}")
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        draft.replace(self.tar)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Files and folders by their names alone; none that is being written."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return None if member.name.endswith(".draft") else member


def program(part: str, request: dict[str, Any], limit_s: float, results: Results) -> str:
    """Run a part's program, whose lines of JSON are records, for so long at most; how it ended."""
    said = results.folder / part / "said.txt"
    said.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", str(HERE / PROGRAMS[part]), json.dumps(request)]
    late = threading.Event()
    with (
        said.open("w") as errors,
        supervised(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):

        def end() -> None:
            late.set()
            process.kill()

        clock = threading.Timer(limit_s, end)
        clock.start()
        assert process.stdout is not None
        for number, line in enumerate(process.stdout):
            if line.startswith("{"):
                record = json.loads(line)
                results.add(f"{part}/{number:04}.json", record)
                log.info(f"{part}: {draw.in_words(record)}")
        code = process.wait()
        clock.cancel()
    text = said.read_text()[-20_000:]
    said.write_text(text)
    if late.is_set():
        return f"cut off after {limit_s:.0f} s"
    return "done" if code == 0 else f"{describe_exit(code)}: {(text.splitlines() or [''])[-1]}"


def cells(part: str, sections: list[Section], limit_s: float, results: Results, peer: str) -> str:
    """Time the cells and pairs of a part; how it ended."""
    end = time.monotonic() + limit_s
    here = surroundings()
    statuses: dict[str, int] = {}
    for section in sections:
        left = max(end - time.monotonic(), 0.0)
        out = results.folder / part
        given = [f"ai2-olmo={peer}"] if peer else []
        for record, line in bench.timed(section, out, here, given, left):
            statuses[record["status"]] = statuses.get(record["status"], 0) + 1
            results.pack()
            log.info(line)
    return ", ".join(f"{n} {status}" for status, n in statuses.items()) or "nothing fitted"


def sections_of(about: dict[str, Any], part: str) -> list[Section]:
    """Those of a part in matrix.yaml, for this kind of device."""
    whole: Any = OmegaConf.to_container(OmegaConf.load(HERE / "matrix.yaml"))[about["kind"]]
    for shape in whole["shapes"].values():
        shape["n_layers"] = about["layers"] or shape["n_layers"]
    shared = {name: whole[name] for name in ("model", "shapes", "switches")}
    shared |= {"warmup": 5, "steps": 20, "rounds": 5, "limit_s": 120.0}
    shared |= {"references": whole.get("references", [])}
    return [Section.new(**shared | section) for section in whole["parts"][part]]


def best(results: Results) -> dict[str, Any] | None:
    """The fastest cell of the first shape in `first`."""
    records = [json.loads(p.read_text()) for p in (results.folder / "first/records").glob("*.json")]
    shape = next(iter(sections_of(results.about, "first")[0].shapes))
    timed = [r for r in records if r["status"] == "ok" and r["cell"]["shape"] == shape]
    return max(timed, key=lambda r: r["tokens_per_second"])["cell"] if timed else None


def about(command: list[str], layers: int | None) -> dict[str, Any]:
    """What was run, on what, when."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        **surroundings(),
        "command": " ".join(command),
        "commit": commit or None,
        "code": hashlib.sha256(
            b"\0".join(p.read_bytes() for p in sorted((ROOT / "olmo").rglob("*.py")))
        ).hexdigest(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "layers": layers,
        "parts": {},
    }


def run(part: str, limit_s: float, results: Results, peer: str) -> str:
    """Run a part; how it ended."""
    if part not in PROGRAMS:
        return cells(part, sections_of(results.about, part), limit_s, results, peer)
    request = {name: results.about[name] for name in ("kind", "layers")}
    if part == "profile":
        if (cell := best(results)) is None:
            return "left out, no cell of the part first was timed"
        request |= {"cell": cell, "section": sections_of(results.about, "first")[0].asdict()}
    return program(part, request, limit_s, results)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench/gpu/run.sh")
    parser.add_argument("out", type=Path, metavar="OUT.tar")
    parser.add_argument("--budget-s", type=float, default=570.0)
    parser.add_argument("--carry", type=Path, help="what bench/gpu/pack.sh brought")
    parser.add_argument(
        "--part", action="append", choices=LIMITS, help="only these, by default all"
    )
    parser.add_argument(
        "--layers",
        type=int,
        help="of every shape, for a rehearsal, in which no part has a limit of its own",
    )
    options = parser.parse_args()
    passed_s = time.time() - float(os.environ.get("OLMO_GPU_BEGAN", time.time()))
    end = time.monotonic() + options.budget_s - passed_s - LAST_S
    options.out.parent.mkdir(parents=True, exist_ok=True)
    carried = (options.carry / "ai2-olmo") if options.carry else None
    peer = str(carried) if carried and carried.is_dir() else ""
    results = Results(options.out, about(["bash bench/gpu/run.sh", *sys.argv[1:]], options.layers))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(results.folder.with_suffix(".inductor"))
    log.info(f"{results.about['device']}, torch {results.about['torch']}: {options.budget_s:g} s")
    try:
        for name in options.part or LIMITS:
            began = time.monotonic()
            # A rehearsal's machine may be busy, and its seconds say nothing.
            limit_s = end - began if options.layers else min(LIMITS[name], end - began)
            if limit_s < LEAST_S:
                how = f"left out, {max(limit_s, 0.0):.0f} s are left"
            else:
                log.info(f"== {name}: {limit_s:.0f} s at most")
                try:
                    how = run(name, limit_s, results, peer)
                except Exception as error:  # the next part may still run
                    how = f"{type(error).__name__}: {error}"
            seconds = round(time.monotonic() - began, 1)
            results.about["parts"][name] = {"seconds": seconds, "how": how}
            results.add("about.json", results.about)
            log.info(f"== {name}: {how}, {seconds:.0f} s")
        print(draw.page(results.folder))
    finally:
        shutil.rmtree(results.folder)
        shutil.rmtree(results.folder.with_suffix(".inductor"), ignore_errors=True)
    log.info(str(options.out))


if __name__ == "__main__":
    main()
