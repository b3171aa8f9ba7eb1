"""Patches of Snakemake's executor plugin for SLURM (2.8.0), each for a case in which it hangs.

Each patch wraps a function of the plugin. The common cause: Snakemake loses a job that its executor
neither reports as finished nor yields back as active.
"""

import base64
import json
import math
import os
import shlex
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any

NAME = "snakemake-executor-plugin-slurm"
VERSION = "2.8.0"
COLLECT_S = 2.0
ARRAY_OPTION = "--slurm-jobstep-array-execs="  # the later tasks' commands, by their numbers
REPLACED = (
    "Executor.run_jobs",
    "Executor.check_active_jobs",
    "Executor._report_job_submission_threadsafe",
    "pending_jobs_for_rule",
    "get_min_job_age",
    "query_job_status",
    "query_job_status_sacct",
    "query_job_status_squeue",
)


def patch_plugin() -> None:
    """Patch the plugin, if snakemake has loaded it.

    Raises:
        ValueError: another version of the plugin, which lacks a function that is replaced here.
    """
    plugin: Any = sys.modules.get(NAME.replace("-", "_"))
    if plugin is None:
        return
    for name in REPLACED:
        found: Any = plugin
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            raise ValueError(
                f"{NAME}: expected {VERSION}, whose {name} olmo/cluster/slurm_plugin.py replaces; "
                f"found {version(NAME)}, which has none; run uv sync --extra slurm"
            )
    # If two wrap the same function, the later one calls the earlier one: first the states are
    # translated, then missing ones are filled in.
    patches: tuple[Callable[[Any], None], ...] = (
        submit_arrays_at_once,
        split_arrays_by_attempt,
        collect_arrays,
        name_array_logs,
        query_array_tasks,
        parse_cancelled_state,
        detect_final_preemption,
        fail_jobs_unknown_to_squeue,
        keep_jobs_after_failed_queries,
    )
    for patch in patches:
        patch(plugin)


def become_array_task() -> None:
    """Replace this snakemake by that of its own job, if it is a later task of a SLURM array.

    The plugin starts each task with the command of the first one, whose snakemake then started the
    task's own. But it also waited for the first task's output: all tasks failed with that one.
    """
    tasks = [word for word in sys.argv if word.startswith(ARRAY_OPTION)]
    if tasks:
        commands = json.loads(base64.b64decode(tasks[0].removeprefix(ARRAY_OPTION)))
        own = commands.get(os.environ.get("SLURM_ARRAY_TASK_ID"))  # the first task has none
        if own:
            command = zlib.decompress(bytes.fromhex(own)).decode()
            os.execvp("sh", ["sh", "-c", command])


def submit_arrays_at_once(plugin: Any) -> None:
    """Submit jobs of a rule in `arrays` as they come; those that come together form an array.

    The plugin held them back until all ready jobs of the rule had come. But Snakemake passes on at
    most `jobs` at a time, and each job once: held jobs counted as running and were never submitted.
    """
    plugin.pending_jobs_for_rule = lambda dag, rule: 0


def split_arrays_by_attempt(plugin: Any) -> None:
    """Submit one array for each attempt, since an array gets the resources of its first job.

    Else a job that ran out of memory would get no more, if its array begins with a new job.
    """
    run = plugin.Executor.run_jobs

    def patched(self: Any, jobs: list[Any]) -> None:
        for attempt in sorted({job.attempt for job in jobs}):
            run(self, [job for job in jobs if job.attempt == attempt])

    plugin.Executor.run_jobs = patched


def collect_arrays(plugin: Any) -> None:
    """Wait `COLLECT_S` for further jobs of the rules in `arrays`, and submit them together.

    Snakemake passes on the jobs that can begin after each job that it finds finished. So a check
    that found many finished led to as many calls of sbatch, with one job each.
    """
    run = plugin.Executor.run_jobs
    lock, collected = threading.Lock(), list[Any]()

    def submit(executor: Any) -> None:
        with lock:
            jobs = [*collected]
            collected.clear()
        if executor.wait:  # else snakemake has been stopped meanwhile
            run(executor, jobs)

    def patched(self: Any, jobs: list[Any]) -> None:
        arrays = [job for job in jobs if not job.is_group() and job.rule.name in self.array_jobs]
        if others := [job for job in jobs if job not in arrays]:
            run(self, others)
        with lock:
            if arrays and not collected:
                timer = threading.Timer(COLLECT_S, submit, [self])
                timer.daemon = True
                timer.start()
            collected.extend(arrays)

    plugin.Executor.run_jobs = patched


def name_array_logs(plugin: Any) -> None:
    """Name the log that a task of an array writes: those of a rule are in one folder.

    The plugin expected it in a folder of the job's wildcards, as that of any other job. It named a
    file that did not exist, and deleted no log of a task that succeeded.
    """
    report = plugin.Executor._report_job_submission_threadsafe

    def patched(self: Any, submitted: Any) -> None:
        if "_" in submitted.external_jobid:
            folder = self.slurm_logdir / f"rule_{submitted.job.name}"
            submitted.aux["slurm_logfile"] = folder / f"{submitted.external_jobid}.log"
        report(self, submitted)

    plugin.Executor._report_job_submission_threadsafe = patched


def query_array_tasks(plugin: Any) -> None:
    """Query the tasks of an array by the names that the plugin looks for, such as `7_2`.

    It queried sacct for raw ids. The last task's raw id is the array's id, so the plugin used that
    task's state for all tasks. squeue lists waiting tasks in one line, `7_[2-4]`, unless it gets
    --array; without --all it omits partitions that a site hides.
    """
    sacct, squeue = plugin.query_job_status_sacct, plugin.query_job_status_squeue
    plugin.query_job_status_sacct = lambda run: sacct(run).replace("JobIdRaw", "JobID")
    plugin.query_job_status_squeue = lambda run: f"{squeue(run)} --array --all"


def parse_cancelled_state(plugin: Any) -> None:
    """Shorten sacct's "CANCELLED by 1000" to the state that the plugin knows."""
    query = plugin.query_job_status

    async def patched(command: str, logger: Any) -> Any:
        states, seconds = await query(command, logger)
        if states is not None:
            states = {job: state.partition(" ")[0] for job, state in states.items()}
        return states, seconds

    plugin.query_job_status = patched


def detect_final_preemption(plugin: Any) -> None:
    """Treat preempted jobs that SLURM does not requeue as cancelled (PreemptMode=CANCEL).

    The plugin waited for their requeue. squeue shows a job as preempted only if that is its end; a
    requeued one is pending. sacct may be out of date, so its preempted jobs are checked by squeue.
    """
    query = plugin.query_job_status
    reported: set[str] = set()

    async def patched(command: str, logger: Any) -> Any:
        states, seconds = await query(command, logger)
        preempted = {job for job, state in (states or {}).items() if state == "PREEMPTED"}
        if not preempted:
            return states, seconds
        now = states
        if not command.startswith("squeue"):
            run = shlex.split(command)[-1]
            now, _ = await query(plugin.query_job_status_squeue(run), logger)
        for job in preempted:
            is_final = now is not None and now.get(job, "PREEMPTED") == "PREEMPTED"
            states[job] = "CANCELLED" if is_final else "PENDING"
            if is_final and job not in reported:
                reported.add(job)
                logger.warning(f"SLURM preempted job {job} for good: it counts as cancelled.")
        return states, seconds

    plugin.query_job_status = patched


def fail_jobs_unknown_to_squeue(plugin: Any) -> None:
    """Report jobs that squeue no longer lists as failed, and query it often enough to see them end.

    SLURM's controller forgets a job MinJobAge after its end, and the plugin then took it for
    running. It queries less and less often, at last every three minutes; now at least twice in
    MinJobAge. After an outage a job may still be unlisted: it counts as failed, since its exit
    state is unknown. If it did succeed, the next attempt finds its results in the store.

    A plugin that is set to use squeue never switches to sacct, which it did for a short MinJobAge:
    there may be no accounting.
    """
    check, query, age = (
        plugin.Executor.check_active_jobs,
        plugin.query_job_status,
        plugin.get_min_job_age,
    )
    expected: set[str] = set()

    async def query_and_fail_unlisted(command: str, logger: Any) -> Any:
        states, seconds = await query(command, logger)
        if states is not None and command.startswith("squeue"):
            for job in sorted(expected - states.keys()):
                logger.warning(f"squeue lists job {job} no longer: it counts as failed.")
                states[job] = "FAILED"
        return states, seconds

    async def patched(self: Any, jobs: list[Any]) -> AsyncIterator[Any]:
        expected.clear()
        expected.update(job.external_jobid for job in jobs)
        async for job in check(self, jobs):
            yield job
        # `seconds` is falsy if scontrol failed, or if SLURM forgets no job (0).
        if self.get_status_command() == "squeue" and (seconds := age()):
            interval = min(self.next_seconds_between_status_checks, max(seconds // 2, 1))
            self.next_seconds_between_status_checks = interval

    plugin.Executor.check_active_jobs = patched
    plugin.query_job_status = query_and_fail_unlisted
    plugin.get_min_job_age = lambda: math.inf


def keep_jobs_after_failed_queries(plugin: Any) -> None:
    """Keep all jobs after squeue or sacct failed five times in a row; the plugin lost them."""
    check, query = plugin.Executor.check_active_jobs, plugin.query_job_status
    is_answered = True

    async def query_and_note(command: str, logger: Any) -> Any:
        nonlocal is_answered
        states, seconds = await query(command, logger)
        is_answered = states is not None
        return states, seconds

    async def patched(self: Any, jobs: list[Any]) -> AsyncIterator[Any]:
        yielded = []
        async for job in check(self, jobs):
            yielded.append(job)
            yield job
        if jobs and not is_answered:
            ids = ", ".join(job.external_jobid for job in jobs)
            self.logger.warning(
                f"{self.get_status_command()} does not answer: the states of jobs {ids} are "
                f"queried again in {self.next_seconds_between_status_checks} seconds."
            )
            for job in jobs:
                if job not in yielded:
                    yield job

    plugin.Executor.check_active_jobs = patched
    plugin.query_job_status = query_and_note
