"""The folder in which snakemake runs: checked and locked at the start, summed up at the end."""

import atexit
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from olmo.config import read_project_config
from olmo.pipeline import screen
from olmo.pipeline.plan import LARGE_DOWNLOAD, Plan
from olmo.pipeline.terminal import print_at_exit, shorten_errors
from olmo.runtime.log import FAILED, SHOWN_ENV, STOPPED, describe_error, format_bytes
from olmo.runtime.process import JOBS_ENV
from olmo.store.lease import LEASE_TIMEOUT_S, lease
from olmo.store.record import parse_record
from olmo.store.store import Store

STARTED = time.time()
_lease = ExitStack()  # held until this process ends


def check_project() -> None:
    """Raise ValueError for what snakemake itself would not tell clearly.

    That is a config that is missing or malformed (it accepts repeated keys), and a file where a
    folder must be.
    """
    shorten_errors()
    sys.excepthook = report_interrupt
    read_project_config()
    for folder in ("data", "checkpoints", "hf", "eval", "logs", "environments", ".snakemake"):
        if Path(folder).is_file():
            raise ValueError(
                f"expected the folder {folder}, found a file; mv {folder} {folder}.old"
            )


def lock_folder(store: str, folder: Path = Path(".snakemake")) -> None:
    """Exit if another snakemake runs in this folder, on any machine, or the store is read-only.

    Two in one folder would delete each other's outputs. Snakemake's own lock is a file that
    outlives a killed process; a lease expires, and needs no locks of a network file system.
    Stages need neither: the store has leases of its own.
    """

    def format_holder(holder: dict[str, Any]) -> str:
        return f"pid {holder['pid']} on {holder['host']}"

    def refuse(holder: dict[str, Any]) -> None:
        sys.exit(
            f"another snakemake ({format_holder(holder)}) runs in {os.getcwd()}; wait for it, or "
            "use another folder with the same store (OLMO_STORE)"
        )

    def report_wait(holder: dict[str, Any]) -> None:
        if holder["host"] != socket.gethostname():
            print(
                f"waiting up to {LEASE_TIMEOUT_S:.0f} s to see whether another snakemake "
                f"({format_holder(holder)}) still runs in this folder",
                file=sys.stderr,
            )

    try:
        Store(Path(store)).create()
        _lease.enter_context(lease(folder / "leases", "running", report_wait, refuse))
    except (ValueError, OSError) as refused:
        sys.exit(describe_error(refused))
    atexit.register(_lease.close)


def forecast_at_exit(workflow: Any) -> None:
    """After a dry run, print what its jobs will find and cost, or write them to $OLMO_JOBS."""

    def forecast() -> None:
        if not workflow.dryrun or workflow.scheduler is None:  # the jobs are not known
            return
        found = {"jobs": describe_jobs(workflow), "cores": workflow.cores or os.cpu_count()}
        if place := os.environ.get(JOBS_ENV):
            Path(place).write_text(json.dumps(found))
        elif found["jobs"]:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "jobs.json")
                path.write_text(json.dumps(found))
                sys.stdout.flush()
                subprocess.run([sys.executable, "-m", "olmo.cli", "plan", "--jobs", path])

    atexit.register(forecast)


def warn_of_download(plan: Plan, workflow: Any) -> None:
    """Warn, when snakemake starts, of data sets of terabytes that it is about to download."""
    rules = ("source_list", "sources")
    jobs = [job for job in workflow.dag.needrun_jobs() if job.rule.name in rules]
    for dataset in sorted({job.wildcards.dataset for job in jobs}):
        size = plan.recipe(dataset).sources.total_bytes or 0
        if size > LARGE_DOWNLOAD:
            smaller = plan.find_smaller_run(dataset)
            hint = f"; {smaller} is the small one" if smaller else ""
            print(
                f"WARNING: {dataset} is a download of {format_bytes(size)}{hint}. Ctrl-C stops it, "
                "and the same command continues",
                file=sys.stderr,
            )


def describe_jobs(workflow: Any) -> list[dict[str, Any]]:
    """The jobs that run, each after those it needs; see olmo.pipeline.forecast.Job."""
    dag = workflow.dag
    jobs = []
    for layer in dag.toposorted(set(dag.needrun_jobs(exclude_finished=False))):
        for job in sorted(layer, key=lambda job: (job.rule.name, [*job.output])):
            if job.rule.shellcmd:
                command = None if unknown_inputs(job) else job.shellcmd
                outputs = [str(path) for path in job.output]
                jobs.append({"rule": job.rule.name, "command": command, "outputs": outputs})
    return jobs


def unknown_inputs(job: Any) -> bool:
    """Whether a job's inputs are known only after another job."""
    return any("<TBD>" in str(path) for path in job.input)


def set_job_environment(store: str) -> None:
    """Set the environment that the jobs of this snakemake inherit."""
    # SLURM sends SIGUSR1 before a job's time limit: the trainer handles it, snakemake must not.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ["OLMO_STORE"] = store
    os.environ[SHOWN_ENV] = "1" if screen.is_active else ""
    os.environ["OLMO_SUPERVISOR"] = str(os.getpid())  # processes of jobs end with this one
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def evaluation_folder(plan: Plan, run: str) -> list[str]:
    """eval/<run>, if there is something to evaluate a run on."""
    section, tasks = plan.recipe(plan.dataset(run)).documents, plan.run(run).evaluation
    return [f"eval/{run}"] if section.heldout_share or tasks else []


def finished_checkpoints(plan: Plan) -> list[str]:
    """The runs that are finished, each with the key of the action that made its checkpoint."""
    finals = [(run, Path("checkpoints", run, "final", "record.json")) for run in plan.pipeline.runs]
    return [f"{run} {path.resolve().stem}" for run, path in finals if path.exists()]


def describe_finished_runs(plan: Plan) -> str:
    """For each run that this process finished: its losses, and the commands to run next."""
    lines = []
    for run in plan.pipeline.runs:
        final = Path("checkpoints") / run / "final"
        record = final / "record.json"
        if not record.exists() or record.lstat().st_mtime < STARTED - 1:
            continue
        facts = parse_record(record.read_bytes(), record)["facts"]
        losses = facts.get("heldout_loss", {})
        shown = ", ".join(
            f"{float(loss['first']):.3f} → {float(loss['last']):.3f}"
            + f" ({label})" * (len(losses) > 1)
            for label, loss in losses.items()
        )
        evaluate = "".join(f"{folder} " for folder in evaluation_folder(plan, run))
        loss = f", held-out loss {shown}" if shown else ""
        lines.append(f"{final} is ready: {facts.get('steps'):,} steps{loss}")
        if run in plan.ladder_of:  # one of many
            continue
        lines.append(
            f"  Chat with it:       uv run olmo chat {run}\n"
            f"  See how it went:    uv run olmo report {run}\n"
            f"  How it was made:    uv run olmo store trace {final}\n"
            f"  {'Evaluate, export:  ' if evaluate else 'Export it:         '} "
            f"uv run snakemake --cores 2 {evaluate}hf/{run}\n"
            f"  Change one thing:   edit {plan.run(run).train}; run the same again"
        )
    made = Path("ladder").glob("*/*.md")
    lines += [f"{path} is ready" for path in sorted(made) if path.stat().st_mtime >= STARTED - 1]
    return "\n".join(lines)


def failure_messages(logs: Path = Path("logs")) -> Iterator[tuple[Path, str]]:
    """The log and the last error message of each job of this process that did not finish."""
    for path in sorted(logs.rglob("*.log")):
        if path.stat().st_mtime < STARTED - 1:
            continue
        text = "\n" + path.read_text(encoding="utf-8", errors="replace")
        _, failed, last = text.rpartition(f"\n{FAILED}")
        if failed:
            yield path, last.rstrip()


def format_failures(logs: Path = Path("logs")) -> str:
    """Why jobs failed, each with its log, for the end: early errors have scrolled off."""
    told = [(path, last) for path, last in failure_messages(logs) if not last.startswith(STOPPED)]
    lines = [f"{path}:\n{last}" for path, last in told]
    return "\n".join(["", f"What failed ({len(lines)}):", *lines]) if lines else ""


def report_failures() -> None:
    """Print `format_failures` after snakemake's own output, or that jobs were stopped or killed."""
    what = "A job was killed (`dmesg` shows whether memory ran out)"
    if any(True for _ in failure_messages()):
        what = "Interrupted"
    print_at_exit(format_failures() or format_way_on(what))


def report_interrupt(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Python's `sys.excepthook`, with a sentence for Ctrl-C while snakemake plans its jobs."""
    if kind is KeyboardInterrupt:
        print(format_way_on("Interrupted"), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def format_way_on(what: str) -> str:
    """What ended this snakemake, and the command that carries on."""
    return f"\n{what}; this carries on:\n{format_command()}"


def format_command() -> str:
    """The command line of this snakemake, to be pasted."""
    runner = ["uv", "run"] if "UV" in os.environ else []  # set by `uv run`
    return shlex.join([*runner, Path(sys.argv[0]).name, *sys.argv[1:]])
