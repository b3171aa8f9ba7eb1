"""What snakemake shows: the logger plugin, fed with snakemake's events and jobs' logs."""

import logging
import os
import re
import time
from pathlib import Path

import pytest
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry
from snakemake_interface_logger_plugins.tests import MockOutputSettings

from olmo.pipeline.job_log import JobLog
from olmo.pipeline.screen import LogHandler, Row
from olmo.pipeline.targets import describe_unknown_target
from olmo.pipeline.terminal import shorten_error

MADE = "tokens: made (9fc45dd04ac6…): 3 documents, 1,200 tokens\n"
FOUND = "tokens: found in the store (811ca55e4d95…): 1 documents, 300 tokens\n"


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config/data").mkdir(parents=True)
    Path("config/data/stdlib.yaml").touch()
    Path("config/config.yaml").write_text(
        "runs: {tiny: {}, tiny-tulu: {}}\nsoups: {soup: [tiny]}\nladders: {rungs: {}}"
    )


def screen(**settings: object) -> LogHandler:
    known = MockOutputSettings()  # snakemake's own, for tests of plugins
    known.__dict__ |= settings
    return LogHandler(known, None)


def record(event: str | None = None, text: str = "", level: int = logging.INFO, **more: object):
    made = logging.LogRecord("snakemake", level, __file__, 1, text, (), None)
    made.__dict__ |= {"event": event} | more
    return made


def job(number: int, log: str) -> dict[str, object]:
    return {
        "jobid": number,
        "rule_name": "tokens",
        "log": [log],
        "output": [f"data/x/{number}.tsv"],
        "reason": f"Missing output files: data/x/{number}.tsv; Updated input files: a, b",
        "rule_msg": None,
    }


def run(shown: LogHandler, *logs: str) -> None:
    """One job for each log, of rule `tokens`."""
    shown.handle(record(LogEvent.RUN_INFO, "Job stats", stats={"tokens": len(logs), "total": 2}))
    for number, text in enumerate(logs):
        shown.handle(record(LogEvent.JOB_INFO, **job(number, f"{number}.log")))
        Path(f"{number}.log").write_text(text)
    for number, text in enumerate(logs):
        if "failed: " in text:
            shown.handle(record(LogEvent.JOB_ERROR, level=40, **job(number, f"{number}.log")))
        else:
            shown.handle(record(LogEvent.JOB_FINISHED, job_id=number))


def test_the_plugin_is_one_that_snakemake_finds():
    registry = LoggerPluginRegistry()
    registry.collect_plugins()
    assert registry.get_plugin("olmo").log_handler is LogHandler


def test_a_rule_is_a_line_with_sums(capsys: pytest.CaptureFixture[str]):
    shown = screen()
    runs = "tokens: runs for the first time here (9fc45dd04ac6…)\n"
    run(shown, runs + MADE, MADE.replace("made", "found in the store") + FOUND)
    shown.close()
    begin, line, found = capsys.readouterr().err.splitlines()
    assert begin == "2 jobs: 2 tokens" and found == "found in the store: tokens"
    # What two jobs share is counted once.
    assert re.split("  +", line) == ["tokens", "2/2", "0:00", "4 documents, 1,500 tokens"]


def test_a_job_says_what_it_has_to_say_without_a_hash(capsys: pytest.CaptureFixture[str]):
    shown = screen()
    run(
        shown,
        "device: cpu by 9fc45dd04ac6\nsaved store/work/9fc45dd04ac6/step3\n"
        "step 1/2  loss 1\nWARNING: a\n"
        f"tokens: runs, because it differs from 9fc45dd04ac6… in params.x: 1 → 2\n{MADE}",
        "Traceback (most recent call last):\n  9fc45dd04ac6\nfailed: expected x\n",
    )
    shown.close()
    said = capsys.readouterr().err.splitlines()
    assert said.pop(1) == "  0.log:"  # of two jobs
    assert said[1:4] == ["  device: cpu by …", "  WARNING: a", "  tokens: params.x: 1 → 2"]
    assert said[4] == "tokens       failed, see 1.log" and said[5].startswith("tokens         1/2")


def test_an_old_log_is_not_shown():
    Path("old.log").write_text("device: cpu\n")
    os.utime("old.log", (1, 1))
    log = JobLog(Path("old.log"), time.time())
    assert log.read() == []
    Path("old.log").write_text("device: gpu\n3 of 4 shards\nhal")
    assert log.read() == ["device: gpu"] and log.progress == "3 of 4 shards"


def test_a_traceback_of_several_errors_is_not_shown():
    log = JobLog(Path("x.log"), 0)
    chained = "Traceback (most recent call last):\nKeyError: 1\n\nThe above exception was\n"
    Path("x.log").write_text(f"5 files\n{chained}\nTraceback (most …):\nfailed: expected a\n")
    assert log.read() == ["5 files"]
    assert log.failure == "failed: expected a"


def test_an_error_of_the_machine_is_its_sentence_whatever_snakemake_shows():
    before = "Traceback (most recent call last):\n  File x\n"
    error = f"{before}NotADirectoryError: [Errno 20] Not a directory: 'a'\n"
    assert shorten_error(error) == "a: Not a directory; name another place"
    bug = f"{before}KeyError: 'a'\n"
    assert shorten_error(bug) == bug


def test_a_bar_fits_into_the_terminal():
    row = Row("train", total=1)
    row.start(1, JobLog(Path("x.log"), 0))
    long = "step  30/60  loss 7.2941  grad norm 1.86  lr 5.80e-04  1.27k tokens/s/device  ETA 0:24"
    Path("x.log").write_text(f"{long}\n")
    row.running[1].read()
    line = row.format_progress(80)
    assert line == "train  █████░░░░░  step 30/60  loss 7.2941  1.27k tokens/s/device  ETA 0:24"
    assert row.format_progress() == f"train  {long.replace('  30', ' 30')}"
    with Path("x.log").open("a") as log:
        log.write("3 of 4 files, 7B, 1B/s\n")
    row.running[1].read()
    row.began = time.monotonic() - 30.5
    assert row.format_progress() == "train  3 of 4 files, 7B, 1B/s  0:30  ETA 0:10"


def test_a_dry_run_is_two_lines_a_rule(capsys: pytest.CaptureFixture[str]):
    shown = screen(dryrun=True, stdout=True)
    for number in range(5):
        shown.handle(record(LogEvent.JOB_INFO, **job(number, "x.log")))
    shown.handle(record(None, "This was a dry-run (flag -n). The order of jobs …"))
    files, reason, end = capsys.readouterr().out.splitlines()
    assert files == "tokens       data/x/0.tsv, data/x/1.tsv, data/x/2.tsv and 2 more"
    assert reason.strip() == "missing output files; updated input files: a, b"
    assert "nothing was made" in end


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("checkpoints/tiny", "checkpoints/tiny/final"),
        ("checkpoint/tiny/final", "checkpoints/tiny/final"),
        ("checkpoints/soup", "checkpoints/soup/final"),
        ("tiny-tlu", "checkpoints/tiny-tulu/final"),
        ("hf/tiny/final", "hf/tiny"),
        ("certificates/tiny", "certificate/tiny"),
        ("certificate/tiny/bom.cdx.json", "certificate/tiny"),
        ("data/stdlib", "data/stdlib/statistics.txt"),
        ("ladder/rungs", "ladder/rungs/prediction.md"),
        ("checkpoints/mine", None),
    ],
)
def test_a_near_miss_is_told_the_target(asked: str, meant: str | None):
    said = describe_unknown_target(asked)
    assert said.startswith(f"no rule makes {asked}; ")
    assert said.endswith(
        f"the target is {meant}" if meant else "config.yaml: tiny, tiny-tulu, soup"
    )


def test_errors_are_a_sentence_and_jobs_errors_wait_for_the_end(capsys):
    shown = screen()
    said = {"event": LogEvent.ERROR, "level": logging.ERROR}
    for exception, text in (
        ("RuleException", "RuleException:\nCalledProcessError in file x, line 3:\nCommand …"),
        ("WorkflowError", "WorkflowError:\nAt least one job did not complete successfully."),
        ("MissingRuleException", "MissingRuleException:\nNo rule to produce tiny (if you use"),
        ("ApiError", "Error: you need to specify the number of cores"),
    ):
        shown.handle(record(text=text, exception=exception, **said))
    assert capsys.readouterr().err.splitlines() == [
        "no rule makes tiny; the target is checkpoints/tiny/final",
        "you need to specify the number of cores",
    ]


def test_verbose_is_snakemakes_own(capsys: pytest.CaptureFixture[str]):
    from snakemake.logging import DefaultFormatter

    assert isinstance(screen(verbose=True)._snakemakes_own.formatter, DefaultFormatter)
    assert screen()._snakemakes_own is None
