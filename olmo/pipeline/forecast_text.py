"""`olmo plan`: the jobs of a target by a dry run, and their forecast as text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from olmo.config import read_project_config, require_project
from olmo.pipeline.forecast import Forecast, Job, Row
from olmo.pipeline.plan import LARGE_DOWNLOAD, Plan
from olmo.pipeline.rates import Range
from olmo.runtime.log import format_bytes, format_count
from olmo.runtime.process import JOBS_ENV
from olmo.store.lookup import FOUND

NOTHING = Range()
JOB_SECONDS = 1.5  # of a job's process, on a core, besides its work
START_SECONDS = 5.0  # of snakemake
UNITS = (("years", 365.25 * 86400), ("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


def plan(targets: list[str], /, jobs: Path | None = None) -> None:
    """Say what a target needs: what the store has, what will run and why, its size, time and cost.

    Nothing is run.

    Args:
        targets: paths, as given to snakemake
        jobs: file of the jobs that a dry run of snakemake found

    Example: olmo plan checkpoints/olmo-tiny/final
    """
    found = read_jobs(jobs) if jobs else list_jobs(targets)
    if not found["jobs"]:
        print("nothing to be done: every file is there and up to date")
        return
    project = Plan(read_project_config())
    forecast = Forecast(project, [Job(**job) for job in found["jobs"]], int(found["cores"]))
    print(format_forecast(forecast))


def list_jobs(targets: list[str]) -> Any:
    """The jobs that snakemake would run for some targets, by a dry run."""
    require_project()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "jobs.json")
        command = [sys.executable, "-m", "snakemake", "-n", *targets]
        environment = {**os.environ, JOBS_ENV: str(place)}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if not place.exists():
            raise ValueError(done.stdout.strip().splitlines()[-1])
        return read_jobs(place)


def read_jobs(path: Path) -> Any:
    return json.loads(path.read_text())


def format_forecast(forecast: Forecast) -> str:
    """A plan as text: a line a place, then the sums."""
    rows, cores = list(forecast.rows.values()), forecast.cores
    lines = []
    if found := [row for row in rows if row.states[FOUND] and not row.runs]:
        count = sum(row.states[FOUND] for row in found)
        lines += [f"found in the store: {count}", *wrap(row.place for row in found)]
    if running := [row for row in rows if row.runs]:
        lines.append(f"will run: {sum(row.runs for row in running)}")
        width = max(len(row.place) for row in running)
        lines += [format_row(row, width, cores) for row in running]
    if not running:
        return "\n".join([*lines, "nothing has to be computed"])
    return "\n".join(lines + format_sums(forecast, running))


def format_row(row: Row, width: int, cores: int) -> str:
    """One place: how many of its stages' calls run, why, and how long."""
    total = sum(row.states.values())
    count = f"{row.runs} of {total}" if row.states[FOUND] else f"{total}"
    reason, times = row.reasons.most_common(1)[0]
    reason += f" ({times} of {row.runs})" * (len(row.reasons) > 1)
    amount = format_time(row_seconds(row, cores).middle) if row.is_time_known else "?"
    return f"  {row.place:{width}}  {count:>7}  {amount:>8}  {reason}"


def row_seconds(row: Row, cores: int) -> Range:
    """The time of a place's jobs, which run side by side, on so many cores."""
    beside = max(1, min(cores, row.jobs))
    start = row.jobs * JOB_SECONDS / beside
    return row.seconds / beside + Range(start, start, start)


def format_sums(forecast: Forecast, running: list[Row]) -> list[str]:
    """Download, disk, time, GPU-hours, energy and money of a plan, and a warning if it is large."""
    start = Range(START_SECONDS, START_SECONDS, START_SECONDS)
    cores = forecast.cores
    total = sum((row_seconds(row, cores) for row in running), start)
    unknown = [row.place for row in running if not row.is_time_known]
    downloaded = sum(row.downloaded for row in running)
    disk = sum((row.written + Range.exactly(row.attempt) for row in running), NOTHING)
    free = shutil.disk_usage(forecast.store.root if forecast.store.root.exists() else ".").free
    amounts = {
        "documents": sum((row.documents for row in running), NOTHING),
        "tokens": sum((row.tokens for row in running), NOTHING),
        "tokens to train on": Range.exactly(sum(row.trained_tokens for row in running)),
    }
    lines = [
        f"time: about {format_time(total.middle)} ({format_time(total.low)} to "
        f"{format_time(total.high)}) on {cores} cores",
        f"disk: {format_bytes(downloaded)} to download, "
        f"{format_amount(disk, format_bytes)} to write, {format_bytes(free)} free",
    ]
    if unknown:
        lines[0] += f"; without {len(unknown)} of unknown time"
    known = [
        f"{format_amount(amount, format_count)} {name}"
        for name, amount in amounts.items()
        if amount.middle
    ]
    if known:
        lines.append("data: about " + ", ".join(known))
    lines += [
        f"data of {dataset}: by fixed rates; for a range from the beginnings of some sources: "
        f"uv run snakemake --cores {cores} data/{dataset}/sample.txt"
        for dataset in forecast.datasets_without_sample()
    ]
    gpu_hours = sum((row.seconds * row.gpus for row in running), Range()) / 3600
    lines += format_cost(forecast, gpu_hours, sum((row.seconds for row in running), Range()))
    if downloaded > LARGE_DOWNLOAD or disk.middle > free:
        datasets = {Path(row.place).parts[1] for row in running if row.downloaded}
        found = map(forecast.project.find_smaller_run, sorted(datasets))
        smaller = next(filter(None, found), None)
        lines.append(
            "WARNING: this is large; "
            + (f"{smaller} is the small one" if smaller else "keep fewer documents, or free space")
        )
    return lines


def format_cost(forecast: Forecast, gpu_hours: Range, seconds: Range) -> list[str]:
    """GPU-hours, energy and money, as far as they are known."""
    price, watts = forecast.project.pipeline.price, forecast.rates.watts
    parts, money = [], Range()
    if gpu_hours.middle:
        parts.append(f"{format_range(gpu_hours)} GPU-hours")
        money += gpu_hours * (price.gpu_hour or 0)
    if watts:
        energy = seconds * (watts / 3.6e6)
        parts.append(f"{format_range(energy)} kWh")
        money += energy * (price.kwh or 0)
    if money.middle:
        parts.append(f"{format_range(money)} {price.currency}")
    return ["cost: " + ", ".join(parts)] if parts else []


def format_range(found: Range) -> str:
    """A number with its range.

    >>> format_range(Range(1, 2, 4))
    '2 (1 to 4)'
    """
    return f"{found.middle:.2g} ({found.low:.2g} to {found.high:.2g})"


def format_amount(found: Range, form: Callable[[int], str]) -> str:
    """An amount, with its range if it has one.

    >>> format_amount(Range(900, 1500, 2000), format_count)
    '1.5k (900 to 2k)'
    """
    low, middle, high = (form(int(number)) for number in (found.low, found.middle, found.high))
    return middle if low == high else f"{middle} ({low} to {high})"


def wrap(words: Iterable[str], width: int = 78) -> list[str]:
    return textwrap.wrap(", ".join(words), width, initial_indent="  ", subsequent_indent="  ")


def format_time(seconds: float) -> str:
    """A time in its largest unit.

    >>> format_time(50), format_time(5400), format_time(3e9)
    ('50 s', '1.5 h', '95 years')
    """
    name, size = next(((n, s) for n, s in UNITS if seconds >= 1.5 * s), UNITS[-1])
    return (
        f"{seconds / size:.2g} {name}" if seconds < 99 * size else f"{seconds / size:,.0f} {name}"
    )
