"""What snakemake shows: a line for each rule, a bar while it runs, and errors in one sentence.

A logger plugin of snakemake (`logger: olmo` in a profile). Jobs write to their log files only, and
this is the one who writes to the terminal: it follows the log files (olmo.pipeline.job_log).
Snakemake's own messages are in .snakemake/log, and with --verbose on the terminal.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import ERROR, WARNING, Handler, LogRecord
from pathlib import Path
from typing import Any

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from olmo.pipeline.dry_run import PlannedJob, format_planned
from olmo.pipeline.job_log import JobLog, progress_fraction, sum_counts
from olmo.pipeline.terminal import is_about_a_job, shorten_error
from olmo.runtime.log import FAILED, STOPPED, format_count, format_duration

REFRESH_S = 0.5
FIRST_REPORT_S, LAST_REPORT_S = 60.0, 600.0  # without a terminal: after 1, 2, 4, 8, 18, 28 minutes
BAR_WIDTH = 10
# Snakemake's messages that a user needs; by the run's ID, `scancel` ends the jobs of a killed run.
SHOWN = (
    "Nothing to be done",
    "The run involves checkpoint jobs",
    "Trying to restart",
    "SLURM run ID",
)

is_active = False  # whether this process shows what jobs write to their log files


@dataclass
class Row:
    """The jobs of one rule."""

    rule: str
    total: int = 0
    done: int = 0
    began: float | None = None  # its first job, by time.monotonic
    running: dict[int, JobLog] = field(default_factory=dict)  # by the job's id
    results: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    tells_rate: bool = False  # its jobs do, over the time in which they did the work
    next_report: float = FIRST_REPORT_S

    @property
    def elapsed(self) -> float:
        """Seconds since the first job began."""
        return time.monotonic() - (self.began or time.monotonic())

    @property
    def fraction(self) -> float:
        """How much of the rule's work is done, from 0 to 1."""
        lines = [log.progress for log in self.running.values()]
        of_data_set = [progress_fraction(line) for line in lines if " files, " in line]
        jobs = self.done + sum(map(progress_fraction, lines))
        return max(of_data_set) if of_data_set else min(jobs / max(self.total, 1), 1.0)

    def start(self, job: int, log: JobLog) -> None:
        """Follow a job that begins."""
        self.began = self.began or time.monotonic()
        self.running[job] = log

    def finish(self, job: int) -> None:
        """Count a job that has ended, and what it made."""
        log = self.running.pop(job)
        for key, result in log.results.items():
            if result[0] == "made" or key not in self.results:  # what one job made, another found
                self.results[key] = result
        self.tells_rate |= "/s" in log.progress
        self.done += 1

    def format_result(self) -> str:
        """The line that stays: jobs, time, what was made, and how fast."""
        counted = sum_counts([counts for origin, counts in self.results.values()])
        shown = ", ".join(f"{number:,} {unit}" for unit, number in counted.items())
        is_made = all(origin == "made" for origin, _ in self.results.values())
        if counted and is_made and not self.tells_rate:
            unit, number = list(counted.items())[-1]
            shown += f", {format_count(number / max(self.elapsed, 0.1))} {unit}/s"
        return f"{self._format_jobs()}  {format_duration(self.elapsed):>5}  {shown}".rstrip()

    def format_progress(self, width: int | None = None) -> str:
        """How far it is. With `width`, the terminal's, the line has a bar and is not longer."""
        lines = [log.progress for log in self.running.values() if log.progress]
        parts = lines[-1].split("  ") if lines else []
        if not any("ETA" in part or " left" in part for part in parts):
            parts.append(format_duration(self.elapsed))
            if fraction := self.fraction:
                left = self.elapsed * (1 - fraction) / fraction
                parts.append(f"ETA {format_duration(left)}")
        begin = [self._format_jobs() if self.total > 1 else self.rule]
        if width:
            filled = round(BAR_WIDTH * self.fraction)
            begin[0] += "  " + "█" * filled + "░" * (BAR_WIDTH - filled)
        while width and len(parts) > 3 and len("  ".join(begin + parts)) >= width:
            del parts[2]  # of a training's line, the gradient's norm first
        return "  ".join(begin + parts)[: width and width - 1]

    def _format_jobs(self) -> str:
        return f"{self.rule:<12} {f'{self.done}/{max(self.total, self.done)}':>5}"


def format_numbers(numbers: Mapping[str, int]) -> str:
    """How many there are of each.

    >>> format_numbers({"documents": 2, "order": 1})
    '2 documents, order'
    """
    return ", ".join(name if n == 1 else f"{n} {name}" for name, n in numbers.items())


def count_jobs(dag: Any) -> None:
    """Have each progress event of snakemake's tell how many jobs each rule has.

    Snakemake tells it at the start only, and a checkpoint (the list of URLs) adds jobs. They are
    counted in the thread that changes them, whenever their number has changed.
    """
    counted = 0

    def add_counts(record: LogRecord) -> bool:
        nonlocal counted
        total = getattr(record, "total", counted)
        if is_active and total != counted:
            counted = total
            jobs = dag.needrun_jobs(exclude_finished=False)
            record.jobs = Counter(job.rule.name for job in jobs)
        return True

    logging.getLogger("snakemake.logging").addFilter(add_counts)


class LogHandler(LogHandlerBase):
    """Shows a run of snakemake; see the module's docstring.

    Events arrive in a thread of snakemake's; another one follows the log files. The handler's lock
    is held by the one that works.
    """

    writes_to_stream = True
    writes_to_file = False
    has_filter = True
    has_formatter = True
    needs_rulegraph = False

    def __post_init__(self) -> None:
        global is_active
        self._snakemakes_own = self._make_snakemakes_own_if_asked()
        is_active = self._snakemakes_own is None and not self.common_settings.dryrun
        if self._snakemakes_own is not None:
            return
        from rich.console import Console
        from rich.live import Live

        self._console = Console(
            stderr=not self.common_settings.stdout,
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
        )
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop"
        )
        self._rows: dict[str, Row] = {}
        self._rule_of: dict[int, str] = {}  # running jobs
        self._reasons: set[str] = set()
        self._planned: list[PlannedJob] = []
        self._ended = threading.Event()
        self._follower = threading.Thread(target=self._follow, daemon=True, name="screen")

    def _make_snakemakes_own_if_asked(self) -> Handler | None:
        """Snakemake's own handler, for the options that ask for its messages."""
        settings = self.common_settings
        if not (settings.verbose or settings.debug_dag or settings.quiet):
            return None
        import sys

        from snakemake.logging import ColorizingTextHandler, DefaultFilter, DefaultFormatter

        return ColorizingTextHandler(
            nocolor=settings.nocolor,
            stream=sys.stdout if settings.stdout else sys.stderr,
            formatter=DefaultFormatter(settings.quiet, settings.show_failed_logs),
            filter=DefaultFilter(
                settings.quiet,
                settings.debug_dag,
                settings.verbose,
                settings.dryrun,
                settings.printshellcmds,
            ),
        )

    def emit(self, record: LogRecord) -> None:
        """Show what a record tells, if it tells a user anything."""
        if self._snakemakes_own is not None:
            self._snakemakes_own.handle(record)
            return
        try:
            self._show(record)
        except Exception:
            self.handleError(record)

    def _show(self, record: LogRecord) -> None:
        said: dict[str, Any] = record.__dict__
        event = said.get("event")
        if event == LogEvent.RUN_INFO:
            self._begin(said["stats"])
        elif event == LogEvent.PROGRESS:
            for rule, total in said.get("jobs", {}).items():
                self._row(rule).total = total
        elif event == LogEvent.JOB_INFO and self.common_settings.dryrun:
            self._planned.append(PlannedJob(said["rule_name"], said["output"], said["reason"]))
        elif event == LogEvent.JOB_INFO:
            row = self._row(said["rule_name"])
            path = Path(said["log"][0]) if said["log"] else Path("/dev/null")
            row.start(said["jobid"], JobLog(path, record.created))
            self._rule_of[said["jobid"]] = row.rule
        elif event == LogEvent.JOB_FINISHED:
            self._finish(said["job_id"])
        elif event == LogEvent.JOB_ERROR:
            self._fail(said)
        elif record.levelno >= WARNING:
            self._show_problem(record)
        elif event is None and record.getMessage().startswith(SHOWN):
            self._print(record.getMessage())
        elif event is None and record.getMessage().startswith("This was a dry-run"):
            self._print(format_planned(self._planned))

    def _begin(self, jobs_by_rule: dict[str, Any]) -> None:
        """Show what will run, and begin to follow the log files."""
        counts = {rule: n for rule, n in jobs_by_rule.items() if rule != "total"}
        for rule, number in counts.items():
            self._row(rule).total = int(number)
        if self.common_settings.dryrun or self._follower.is_alive():
            return
        self._print(f"{jobs_by_rule['total']} jobs: {format_numbers(counts)}")
        if self._console.is_terminal:
            self._live.start()
            self._console.show_cursor(True)  # a kill must leave no terminal without one
        self._follower.start()

    def _row(self, rule: str) -> Row:
        return self._rows.setdefault(rule, Row(rule))

    def _finish(self, job: int) -> None:
        row = self._rows[self._rule_of.pop(job)]
        self._read_log(row, row.running[job])
        row.finish(job)
        if row.done >= row.total:
            self._print(row.format_result())

    def _fail(self, said: dict[str, Any]) -> None:
        row = self._row(said["rule_name"])
        log = row.running.pop(said["jobid"])
        self._read_log(row, log)
        if not log.failure.removeprefix(FAILED).startswith(STOPPED):
            why = f": {said['rule_msg']}" if said["rule_msg"] else ""  # a scheduler's words
            logs = " and ".join(said["log"])
            self._print(f"{row.rule:<12} failed{why}, see {logs}", style="red")

    def _show_problem(self, record: LogRecord) -> None:
        text, exception = record.getMessage(), getattr(record, "exception", None)
        if not is_about_a_job(text):  # workspace.report_failures tells why jobs failed
            color = "red" if record.levelno >= ERROR else "yellow"
            self._print(shorten_error(text) if exception else text, style=color)

    def _read_log(self, row: Row, log: JobLog) -> None:
        lines = log.read()
        if lines and row.total > 1 and not log.is_introduced:
            log.is_introduced = True
            self._print(f"  {log.path}:")
        for line in lines:
            style = "yellow" if line.startswith("WARNING: ") else ""
            self._print(f"  {line.lstrip()}", style=style)
        for reason in log.reasons:
            if reason not in self._reasons:
                self._reasons.add(reason)
                self._print(f"  {reason}")

    def _follow(self) -> None:
        """Follow the log files of running jobs, until the run ends."""
        while not self._ended.wait(REFRESH_S):
            with self.lock or threading.Lock():
                running = [row for row in self._rows.values() if row.running]
                for row in running:
                    for log in row.running.values():
                        self._read_log(row, log)
                if self._console.is_terminal:
                    lines = [row.format_progress(self._console.width) for row in running]
                    self._live.update("\n".join(lines), refresh=True)
                else:
                    self._report(running)

    def _report(self, running: list[Row]) -> None:
        """Without a terminal: a line for each rule now and then."""
        for row in running:
            if row.elapsed >= row.next_report:
                row.next_report += min(row.next_report, LAST_REPORT_S)
                self._print(row.format_progress())

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style)

    def close(self) -> None:
        """Show the rules that did not end, and what was found in the store."""
        if self._snakemakes_own is None and not self._ended.is_set():
            self._ended.set()
            if self._follower.is_alive():
                self._follower.join()
                self._live.stop()
            for row in self._rows.values():
                if row.began and row.done < row.total:
                    self._print(row.format_result())
            found = Counter(
                stage
                for row in self._rows.values()
                for (stage, _), (origin, _) in row.results.items()
                if origin != "made"
            )
            if found:
                self._print(f"found in the store: {format_numbers(found)}")
        super().close()
