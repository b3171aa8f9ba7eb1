"""The cost of running on a cluster: the tiny chain on this machine, then through SLURM.

    python bench/cluster.py [--target checkpoints/olmo-tiny/final] [--site FILE]

Without --site a SLURM of two nodes is started on this machine (tests/slurm/up.sh), and stopped at
the end. A job's extra time is split into waiting in the queue, what a job does beside its stage
(two snakemakes start, srun), and the time until snakemake noticed its end. The toolkit's
environment is the repository's (`snakemake environments/dolma.json`).
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from olmo.bench.script import describe_run, parse_options

REPOSITORY = Path(__file__).parent.parent
STAMP = r"\[(\w{3} \w{3} +\d+ [\d:]+ \d{4})\]\n"
SITE = """\
gpu: null
accounting: false
most_memory_mb: 4000
together: [[sources, documents, tokenizer, tokens, order]]
stages: {train: {cpus: 2}, tokenizer: {cpus: 2}}
"""


def main() -> None:
    options = parse_options(
        __doc__,
        target="checkpoints/olmo-tiny/final",
        site={"type": Path, "help": "settings of an existing cluster"},
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # stops SLURM, too
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster(Path(folder), options.site) as environment,
    ):
        print(describe_run(), flush=True)
        # As many files a job as in profiles/slurm, so that the jobs are the same.
        here_words = ["--cores", "2", options.target, "--config", "shards_per_job=64"]
        here, local = make_target(Path(folder) / "local", here_words, {})
        words = ["--workflow-profile", "profiles/slurm", options.target]
        there, jobs = make_target(Path(folder) / "cluster", words, environment)
        print(f"here {here:.0f} s, through SLURM {there:.0f} s: {there - here:.0f} s more")
        print(f"{'here':>6} {'there':>6} {'queue':>6} {'start':>6} {'look':>6}  (seconds)")
        for rules, (seconds, queued, ran) in jobs.items():
            alone = sum(local[rule,][0] for rule in rules if (rule,) in local)
            start = max(0.0, ran - alone) if ran else 0.0
            look = max(0.0, seconds - queued - ran) if ran else 0.0
            times = f"{alone:6.0f} {seconds:6.0f} {queued:6.0f} {start:6.0f} {look:6.0f}"
            print(f"{times}  {', '.join(rules)}")


@contextmanager
def cluster(folder: Path, site: Path | None) -> Iterator[dict[str, str]]:
    """Environment variables for snakemake to use a SLURM: that of `site`, or one started here."""
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


def make_target(
    root: Path, words: list[str], environment: dict[str, str]
) -> tuple[float, dict[tuple[str, ...], tuple[float, float, float]]]:
    """Make a target in a fresh project.

    Returns:
        Wall seconds; by the rules of a job, the seconds from its selection to its end and, for a
        SLURM job, how long it waited and ran.
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
    selected = re.findall(STAMP + r" *(?:local)?rule (\w+):.*?jobid: (\d+)", done.stdout, re.S)
    ended = {
        number: parse_stamp(when)
        for when, number in re.findall(STAMP + r"Finished jobid: (\d+)", done.stdout)
    }
    submitted = dict(
        re.findall(r"Job (\S+) has been submitted with SLURM jobid (\d+)", done.stdout)
    )
    # The rules of a group job are indented; the group is submitted under a name, not a number.
    shared = re.findall(r"Group job [^\n]*\n(.*?)(?=^\[|^Job \S+ has)", done.stdout, re.S | re.M)
    names = [name for name in submitted if not name.isdigit()]
    for name, listed in zip(names, shared, strict=True):
        submitted |= dict.fromkeys(re.findall(r"jobid: (\d+)", listed), submitted[name])
    jobs: dict[str, list[tuple[str, float, float]]] = {}
    for when, rule, number in selected:
        spell = (rule, parse_stamp(when), ended[number])
        jobs.setdefault(submitted.get(number, f"here {number}"), []).append(spell)
    found: dict[tuple[str, ...], tuple[float, float, float]] = {}
    for job, spells in jobs.items():
        rules = tuple(rule for rule, _, _ in spells)
        seconds = max(end for _, _, end in spells) - min(begin for _, begin, _ in spells)
        queued, ran = slurm_times(job, env) if job.isdigit() else (0.0, 0.0)
        before = found.get(rules, (0.0, 0.0, 0.0))
        found[rules] = (before[0] + seconds, before[1] + queued, before[2] + ran)
    return wall, found


def slurm_times(job: str, env: dict[str, str]) -> tuple[float, float]:
    """How many seconds a job waited and ran."""
    text = subprocess.check_output(["scontrol", "show", "job", job], env=env, text=True)
    submit, start, end = (
        datetime.fromisoformat(re.search(rf"\b{what}Time=(\S+)", text)[1]).timestamp()
        for what in ("Submit", "Start", "End")
    )
    return start - submit, end - start


def parse_stamp(stamp: str) -> float:
    """A time in snakemake's log, in seconds."""
    return datetime.strptime(stamp, "%a %b %d %H:%M:%S %Y").timestamp()


if __name__ == "__main__":
    main()
