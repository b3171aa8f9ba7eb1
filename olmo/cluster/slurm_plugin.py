"""Where Snakemake's executor plugin for SLURM (2.8.0) waits for ever, and what it does instead.

One function a defect. Each puts a function in the place of one of the plugin's, and calls that.
What they have in common: Snakemake forgets a job that its executor neither reports nor hands back.
"""

import math
import shlex
import sys
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any

NAME = "snakemake-executor-plugin-slurm"
VERSION = "2.8.0"
REPLACED = (
    "Executor.run_jobs",
    "Executor.check_active_jobs",
    "pending_jobs_for_rule",
    "get_min_job_age",
    "query_job_status",
    "query_job_status_sacct",
    "query_job_status_squeue",
)


def patch_plugin() -> None:
    """Mend the plugin, where snakemake runs with it.

    Raises:
        ValueError: it is another version, and has not what is replaced here.
    """
    plugin: Any = sys.modules.get(NAME.replace("-", "_"))
    if plugin is None:
        return
    for name in REPLACED:
        place: Any = plugin
        for part in name.split("."):
            place = getattr(place, part, None)
        if place is None:
            raise ValueError(
                f"{NAME}: expected {VERSION}, whose {name} is mended by "
                f"olmo/cluster/slurm_plugin.py, found {version(NAME)}, which has "
                "none; uv sync --extra slurm"
            )
    # Of those that replace the same function the later one calls the earlier one: an answer is put
    # into the plugin's words first, and what is missing in it is looked at last.
    defects: tuple[Callable[[Any], None], ...] = (
        arrays_that_wait,
        arrays_with_the_first_ones_memory,
        tasks_of_an_array,
        cancelled_by,
        preempted_for_good,
        forgotten_by_squeue,
        no_answer,
    )
    for defect in defects:
        defect(plugin)


def arrays_that_wait(plugin: Any) -> None:
    """Jobs of a rule in `arrays` were kept until all that are ready had come; now none is kept.

    Snakemake hands over what `jobs` allows, and hands over nothing twice. So those that were kept
    counted as running and were never submitted. Those that come together are an array.
    """
    plugin.pending_jobs_for_rule = lambda dag, rule: 0


def arrays_with_the_first_ones_memory(plugin: Any) -> None:
    """An array is asked for with its first job's resources: jobs of another attempt get their own.

    Else one that failed for want of memory, in an array behind a new one, would have no more of it.
    """
    run = plugin.Executor.run_jobs

    def mended(self: Any, jobs: list[Any]) -> None:
        for attempt in sorted({job.attempt for job in jobs}):
            run(self, [job for job in jobs if job.attempt == attempt])

    plugin.Executor.run_jobs = mended


def tasks_of_an_array(plugin: Any) -> None:
    """Tasks of an array are looked for by `7_2`, and were asked for by other names.

    sacct was to say raw numbers: the last task's is the array's, and it spoke for all. squeue puts
    tasks that wait into one line, `7_[2-4]`; it also leaves out partitions that a site hides.
    """
    sacct, squeue = plugin.query_job_status_sacct, plugin.query_job_status_squeue
    plugin.query_job_status_sacct = lambda run: sacct(run).replace("JobIdRaw", "JobID")
    plugin.query_job_status_squeue = lambda run: f"{squeue(run)} --array --all"


def cancelled_by(plugin: Any) -> None:
    """sacct says "CANCELLED by 1000", which is none of the words that the plugin knows."""
    ask = plugin.query_job_status

    async def mended(command: str, logger: Any) -> Any:
        states, seconds = await ask(command, logger)
        if states is not None:
            states = {job: state.partition(" ")[0] for job, state in states.items()}
        return states, seconds

    plugin.query_job_status = mended


def preempted_for_good(plugin: Any) -> None:
    """Where PreemptMode is CANCEL nobody puts a preempted job back; the plugin waited for that.

    The controller (squeue) calls a job preempted only when that is its end: one that was put back
    is pending. sacct's books may be behind, so squeue is asked about what sacct calls preempted.
    """
    ask = plugin.query_job_status
    told: set[str] = set()

    async def mended(command: str, logger: Any) -> Any:
        states, seconds = await ask(command, logger)
        preempted = {job for job, state in (states or {}).items() if state == "PREEMPTED"}
        if not preempted:
            return states, seconds
        now = states
        if not command.startswith("squeue"):
            run = shlex.split(command)[-1]
            now, _ = await ask(plugin.query_job_status_squeue(run), logger)
        for job in preempted:
            over = now is not None and now.get(job, "PREEMPTED") == "PREEMPTED"
            states[job] = "CANCELLED" if over else "PENDING"
            if over and job not in told:
                told.add(job)
                logger.warning(f"SLURM preempted job {job} for good: it counts as cancelled.")
        return states, seconds

    plugin.query_job_status = mended


def forgotten_by_squeue(plugin: Any) -> None:
    """SLURM's controller forgets a job MinJobAge after its end; the plugin took it for running.

    It looks less and less often, every three minutes in the end. Now that is never less often than
    twice in MinJobAge; and a job that squeue still does not list, after an outage, has failed:
    nothing says how it ended, and files may be left from before it. What it made is in the store.

    Where squeue is to be asked, sacct is not, which the plugin does if MinJobAge is short: there
    are no accounts.
    """
    check, ask, age = (
        plugin.Executor.check_active_jobs,
        plugin.query_job_status,
        plugin.get_min_job_age,
    )
    expected: set[str] = set()

    async def asked(command: str, logger: Any) -> Any:
        states, seconds = await ask(command, logger)
        if states is not None and command.startswith("squeue"):
            for job in sorted(expected - states.keys()):
                logger.warning(f"squeue lists job {job} no longer: it counts as failed.")
                states[job] = "FAILED"
        return states, seconds

    async def checked(self: Any, jobs: list[Any]) -> AsyncIterator[Any]:
        expected.clear()
        expected.update(job.external_jobid for job in jobs)
        async for job in check(self, jobs):
            yield job
        # No answer: it was told at an earlier look. Zero: SLURM forgets nothing.
        if self.get_status_command() == "squeue" and (seconds := age()):
            wait = min(self.next_seconds_between_status_checks, max(seconds // 2, 1))
            self.next_seconds_between_status_checks = wait

    plugin.Executor.check_active_jobs = checked
    plugin.query_job_status = asked
    plugin.get_min_job_age = lambda: math.inf


def no_answer(plugin: Any) -> None:
    """When squeue or sacct failed five times in a row, all jobs were forgotten; they are kept."""
    check, ask = plugin.Executor.check_active_jobs, plugin.query_job_status
    answered = True

    async def asked(command: str, logger: Any) -> Any:
        nonlocal answered
        states, seconds = await ask(command, logger)
        answered = states is not None
        return states, seconds

    async def checked(self: Any, jobs: list[Any]) -> AsyncIterator[Any]:
        kept = []
        async for job in check(self, jobs):
            kept.append(job)
            yield job
        if jobs and not answered:
            numbers = ", ".join(job.external_jobid for job in jobs)
            self.logger.warning(
                f"{self.get_status_command()} does not answer: what became of {numbers} is asked "
                f"again in {self.next_seconds_between_status_checks} seconds."
            )
            for job in jobs:
                if job not in kept:
                    yield job

    plugin.Executor.check_active_jobs = checked
    plugin.query_job_status = asked
