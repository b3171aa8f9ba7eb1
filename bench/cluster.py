"""What the way through a cluster costs: the tiny chain here, then through SLURM, each from nothing.

    python bench/cluster.py [--target checkpoints/olmo-tiny/final] [--site FILE]

Without --site a SLURM of two nodes is brought up on this machine (tests/slurm/up.sh) and taken down
again. Of each job's extra time it says how much was waiting in the queue, how much was what a job
does beside its stage (two snakemakes start, srun), and how much passed until snakemake looked. The
toolkit's environment is the repository's (`snakemake environments/dolma.json`).
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
STAMP = r"\[(\w{3} \w{3} +\d+ [\d:]+ \d{4})\]\n"
SITE = """\
gpu: null
accounting: false
most_memory_mb: 4000
stages: {train: {cpus: 2}, tokenizer: {cpus: 2}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="checkpoints/olmo-tiny/final")
    parser.add_argument("--site", type=Path, help="settings of a cluster that there is")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder), args.site) as environment:
        print(
            f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        here, local, _ = run(Path(folder) / "local", ["--cores", "2", args.target], {})
        words = ["--workflow-profile", "profiles/slurm", args.target]
        there, rules, jobs = run(Path(folder) / "cluster", words, environment)
        print(f"here {here:.0f} s, through SLURM {there:.0f} s: {there - here:.0f} s more")
        print(
            f"{'job':12} {'here':>6} {'there':>6} {'queue':>6} {'start':>6} {'look':>6}  (seconds)"
        )
        for rule, seconds in rules.items():
            line = f"{rule:12} {local.get(rule, 0.0):6.0f} {seconds:6.0f}"
            if rule in jobs:
                queued, ran = jobs[rule]
                start = max(0.0, ran - local.get(rule, 0.0))
                look = max(0.0, seconds - queued - ran)
                line += f" {queued:6.0f} {start:6.0f} {look:6.0f}"
            print(line)


@contextmanager
def cluster(folder: Path, site: Path | None) -> Iterator[dict[str, str]]:
    """What the environment of snakemake needs for SLURM; one of our own unless there is one."""
    if site:
        yield {"OLMO_SITE": str(site.resolve())}
        return
    scripts, lab = REPOSITORY / "tests/slurm", folder / "slurm"
    try:
        subprocess.run([scripts / "up.sh", lab], check=True, stdout=subprocess.DEVNULL)
        (folder / "site.yaml").write_text(SITE)
        yield {
            "OLMO_SITE": str(folder / "site.yaml"),
            "SLURM_CONF": str(lab / "slurm.conf"),
            "PATH": f"{lab / 'bin'}:{os.environ['PATH']}",
        }
    finally:
        subprocess.run([scripts / "down.sh", lab], check=True)


def run(
    root: Path, words: list[str], environment: dict[str, str]
) -> tuple[float, dict[str, float], dict[str, tuple[float, float]]]:
    """Make a target from nothing.

    Returns:
        Wall seconds; of each rule, from its choice to its end; of those that were a SLURM job, how
        long it waited and how long it ran.
    """
    for name in ("rules", "profiles", "envs", "config"):
        shutil.copytree(REPOSITORY / name, root / name)
    shutil.copy(REPOSITORY / "Snakefile", root)
    (root / "environments").symlink_to(REPOSITORY / "environments")
    env = os.environ | environment | {"OLMO_STORE": str(root / "store")}
    env["PYTHONPATH"] = str(REPOSITORY)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words],
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wall = time.monotonic() - began
    if done.returncode:
        sys.exit(done.stdout[-4000:])
    chosen = re.findall(STAMP + r"(?:local)?rule (\w+):.*?jobid: (\d+)", done.stdout, re.S)
    ended = {
        number: moment(when)
        for when, number in re.findall(STAMP + r"Finished jobid: (\d+)", done.stdout)
    }
    submitted = dict(
        re.findall(r"Job (\d+) has been submitted with SLURM jobid (\d+)", done.stdout)
    )
    rules: dict[str, float] = {}
    jobs: dict[str, tuple[float, float]] = {}
    for when, rule, number in chosen:
        rules[rule] = rules.get(rule, 0.0) + ended[number] - moment(when)
        if number in submitted:
            queued, ran = jobs.get(rule, (0.0, 0.0))
            more = slurm_says(submitted[number], env)
            jobs[rule] = (queued + more[0], ran + more[1])
    return wall, rules, jobs


def slurm_says(job: str, env: dict[str, str]) -> tuple[float, float]:
    """How long a job waited and ran."""
    said = subprocess.check_output(["scontrol", "show", "job", job], env=env, text=True)
    submit, start, end = (
        datetime.fromisoformat(re.search(rf"\b{what}Time=(\S+)", said)[1]).timestamp()
        for what in ("Submit", "Start", "End")
    )
    return start - submit, end - start


def moment(stamp: str) -> float:
    """Snakemake's way to write a time, in seconds."""
    return datetime.strptime(stamp, "%a %b %d %H:%M:%S %Y").timestamp()


if __name__ == "__main__":
    main()
