"""The whole data half for as many sources as Dolma v1.6 has, each small: what a file costs.

    python bench/sources.py [--files 2419] [--shards-per-job 64] [--parts 4] [--cores 2]
        [--first-only] [--slurm]

A server on loopback has the files, under names as Dolma's; one in a hundred answers 503 twice
before it is sent, and one in five hundred answers 503 until the first run has failed on it. The
recipe downloads them, drops exact duplicates, tokenizes with `fast` and orders. Then one source
changes, and what runs again is counted. Wall and CPU seconds are those of snakemake and all its
jobs; memory is the peak of the process that submits. The toolkit's environment is the
repository's (`snakemake environments/dolma.json`).

With --slurm the jobs are arrays on a SLURM of two nodes of one CPU, which is started on this
machine (tests/slurm/up.sh, with slurmdbd). The table then has, for each rule, its jobs, the calls
of sbatch, and for a job: seconds in the queue, seconds until its end, CPU seconds (sacct).
"""

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from project import Project, documents, write_source
from servers import serving
from slurm.cluster import Cluster, ClusterProject
from slurm.conftest import brought_up

from olmo.bench.script import describe_run, parse_options
from olmo.corpus.tokenizer import trained_tokenizer

KINDS = ("c4", "cc_en_head", "cc_en_middle", "cc_en_tail", "pes2o", "reddit", "stack", "wiki")
TARGETS = ("data/small/statistics.txt", "checkpoints/small/global_indices.npy")
FAILURES = 2  # answers of 503 before a file is sent
ARRAYS = ["sources", "documents", "digests", "duplicates", "mixed", "tokens"]


def main() -> None:
    options = parse_options(
        __doc__,
        files=2419,
        shards_per_job=64,
        parts=4,
        cores=2,
        first_only={"action": "store_true", "help": "change nothing afterwards"},
        slurm={"action": "store_true", "help": "on a SLURM that is started here"},
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = make_sources(root / "served", options.files)
        served = Served(root / "served")
        with (
            serving(functools.partial(Flaky, served)) as address,
            contextmanager(brought_up)(root / "slurm", accounting=True)
            if options.slurm
            else nullcontext() as cluster,
        ):
            project = make_project(root, address, names, cluster, options)
            print(describe_run(f"{options.files:,} files, {options.shards_per_job} in a job"))
            run(project, "all", options.cores)
            print(f"{'':12} {sum(map(bool, served.failed.values()))} sources failed at first")
            served.is_mended = True
            run(project, "what is left", options.cores)
            if not options.first_only:
                change(root / "served" / names[len(names) // 2], project)
                run(project, "one changed", options.cores)
                run(project, "no-op", options.cores)


class Served:
    """A folder, and which of its files were asked for in vain, how often."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.failed, self.is_mended = folder, Counter[str](), False

    def fails(self, path: str) -> bool:
        """Whether the file of this path is not available now."""
        number = int(path.removesuffix(".json.gz").rpartition("-")[2])
        never = number % 500 == 57 and not self.is_mended
        at_first = number % 100 == 7 and self.failed[path] < FAILURES
        self.failed[path] += never or at_first
        return never or at_first


class Flaky(http.server.SimpleHTTPRequestHandler):
    """A folder's files, some of which are not available at first."""

    def __init__(self, served: Served, *args: object) -> None:
        self.served = served
        super().__init__(*args, directory=str(served.folder))  # type: ignore[arg-type]

    def do_GET(self) -> None:
        if self.served.fails(self.path):
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def make_sources(folder: Path, files: int) -> list[str]:
    names = []
    for number in range(files):
        kind = KINDS[number * len(KINDS) // files]
        names.append(f"{kind}/{kind}-{number:04}.json.gz")
        lines = [{**line, "id": f"{number}-{line['id']}"} for line in documents(number % 3, 20)]
        lines[0]["text"] += f" {number}"
        (folder / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        write_source(folder / names[-1], lines)
    return names


def make_project(
    root: Path, address: str, names: list[str], cluster: Cluster | None, options: Namespace
) -> Project:
    if cluster:
        project: Project = ClusterProject(root / "project", cluster)
        changes = {"arrays": ARRAYS, "jobs": 100, "attempts": 2}
        project.settings(shards_per_job=options.shards_per_job, poll_seconds=5, **changes)
    else:
        project = Project(root / "project")
    table = ["url\tbytes\tsha256\tlicence", *(f"{address}/{name}\t\t\t" for name in names)]
    (project.root / "table.tsv").write_text("\n".join(table) + "\n")
    given = {"dedupe": {"exact": True, "parts": options.parts}}
    given |= {"sources": {"table": "table.tsv"}, "tokens": {"engine": "fast", "audit_share": 0.0}}
    project.change("config/data/small.yaml", documents={"heldout_share": 0.02}, **given)
    project.change("config/config.yaml", shards_per_job=options.shards_per_job)
    local = sorted((project.root / "sources").iterdir())
    trained_tokenizer.build(documents=local, tokenizer=root / "trained.json", vocab_size=512)
    project.use_given_tokenizer(root / "trained.json")
    return project


def change(source: Path, project: Project) -> None:
    """Another text in one source; the table forgets its digest, and the recipe its download."""
    write_source(source, [{**line, "id": f"new-{line['id']}"} for line in documents(1, 25)])
    table = project.root / "table.tsv"
    rows = table.read_text().splitlines()
    place = next(i for i, row in enumerate(rows) if source.name in row)
    url, _, _, *rest = rows[place].split("\t")
    size, digest = source.stat().st_size, subprocess.check_output(["sha256sum", source], text=True)
    rows[place] = "\t".join([url, str(size), digest.split()[0], *rest])
    table.write_text("\n".join(rows) + "\n")


def run(project: Project, name: str, cores: int) -> None:
    """Run snakemake; print what it cost, how many actions each stage did, and why it failed."""
    before, start = count_actions(project), time.monotonic()
    process = project.start(*TARGETS, cores=cores)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall, cpu = time.monotonic() - start, usage.ru_utime + usage.ru_stime
    print(f"{name:12} {wall:7.0f} s {cpu:7.0f} CPU-s, {usage.ru_maxrss / 1e3:,.0f} MB", flush=True)
    ran = count_actions(project)
    ran.subtract(before)
    print(f"{'':12} {', '.join(f'{n:,} {stage}' for stage, n in ran.items() if n) or 'nothing'}")
    if isinstance(project, ClusterProject):
        print_jobs(project)
    if process.returncode:
        told = project.outcome().output
        print(f"{'':12} exit status {process.returncode}, which tells:\n{told[-2000:]}")


def print_jobs(project: ClusterProject) -> None:
    """What the jobs of the last run cost, by sacct, for each rule."""
    said = project.full_log()
    found = re.search("SLURM run ID: (.*)", said)
    if not found:
        return
    rules = {job: rule for rule, job in re.findall(r"rule (\w+):.*?jobid: (\d+)", said, re.S)}
    submitted = re.findall(r"Job (\d+) has been submitted with SLURM jobid (\d+)", said)
    submitted += re.findall(r"Snakemake IDs (\d+)\S* and SLURM job ID (\d+)", said)
    rule_of = {call: rules[job] for job, call in submitted}
    columns = "JobID,State,Submit,Start,End,TotalCPU"
    rows = project.cluster.call("sacct", "-nP", f"--name={found[1]}", f"--format={columns}")
    table: dict[str, list[tuple[str, str, float, float, float]]] = {}
    for row in rows.splitlines():
        job, state, *times, cpu = row.split("|")
        if "." in job:  # a step, which is part of its job
            continue
        submit, start, end = (datetime.fromisoformat(at).timestamp() for at in times)
        call = job.partition("_")[0]
        table.setdefault(rule_of[call], []).append(
            (call, state, start - submit, end - start, parse_cpu(cpu))
        )
    print(f"{'':12} {'jobs':>6} {'calls':>6} {'queue':>7} {'s':>7} {'CPU-s':>7}  states")
    for rule, jobs in table.items():
        calls, states = len({job[0] for job in jobs}), Counter(job[1] for job in jobs)
        costs = zip(*(job[2:] for job in jobs), strict=True)
        means = " ".join(f"{sum(cost) / len(jobs):7.1f}" for cost in costs)
        numbers = f"{len(jobs):6} {calls:6} {means}"
        print(f"{rule:>12} {numbers}  {dict(states)}", flush=True)


def parse_cpu(time: str) -> float:
    """Seconds of sacct's [days-][hours:]minutes:seconds."""
    days, _, rest = time.rpartition("-")
    parts = [float(part) for part in rest.split(":")]
    return sum(part * 60**i for i, part in enumerate(reversed(parts))) + int(days or 0) * 86400


def count_actions(project: Project) -> Counter[str]:
    paths = project.store.glob("actions/*/*.json")
    return Counter(json.loads(path.read_text())["action"]["stage"] for path in paths)


if __name__ == "__main__":
    os.environ.pop("OLMO_STORE", None)
    main()
