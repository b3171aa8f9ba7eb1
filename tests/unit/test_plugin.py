"""Snakemake and its executor plugin for SLURM, over stand-ins for SLURM's commands.

Without the patches of `olmo.cluster.slurm_plugin` snakemake hangs in most of them.
"""

import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from olmo.cluster import slurm_plugin

REPOSITORY = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in_slurm.py")
SNAKEFILE = """
from olmo.cluster.slurm_plugin import patch_plugin
if workflow.is_main_process:
    patch_plugin()
rule all:
    input:
        expand("out/{n}", n=range(config["count"])),
rule one:
    output:
        "out/{n}",
    resources:
        mem_mb=lambda w, attempt: 100 * attempt,
    shell:
        "touch {output}"
"""


class Slurm:
    """Stand-ins in `bin`, and a workflow of `count` jobs that make a file each."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin = root, root / "bin"
        (self.bin / "jobs").mkdir(parents=True)
        for name in ("sbatch", "squeue", "sacct", "scontrol", "sinfo", "scancel"):
            (self.bin / name).write_text(f"#!{sys.executable} -IS\n{STAND_IN.read_text()}")
            (self.bin / name).chmod(0o755)
        (self.bin / "submitted").touch()
        self.says(config="MinJobAge = 300 sec")
        (root / "Snakefile").write_text(SNAKEFILE)

    def says(self, **files: str) -> None:
        for name, text in files.items():
            (self.bin / name).write_text(text)

    def run(self, count: int, *words: str, jobs: int = 100, command: str = "squeue") -> str:
        """Run the workflow to its end; what snakemake said."""
        settings = [
            *("--executor=slurm", f"--slurm-status-command={command}"),
            *("--slurm-init-seconds-before-status-checks=1", "--latency-wait=1"),
            *(f"--jobs={jobs}", "--retries=2", "--scheduler=greedy", "--workflow-profile=none"),
            *("--config", f"count={count}"),
        ]
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", *words, *settings],
            cwd=self.root,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stdout
        assert sorted(int(path.name) for path in self.root.glob("out/*")) == list(range(count))
        return done.stdout

    @property
    def submitted(self) -> list[str]:
        return (self.bin / "submitted").read_text().splitlines()


pytestmark = pytest.mark.slow


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("no executor plugin for SLURM; uv run --extra slurm pytest")
    return Slurm(tmp_path)


@pytest.mark.parametrize("command", ["squeue", "sacct"])
def test_an_outage_forgets_no_job(slurm: Slurm, command: str):
    slurm.says(silent="error\n" * 5)
    said = slurm.run(2, command=command)
    assert f"{command} does not answer: the states of jobs " in said
    assert len(slurm.submitted) == 2


@pytest.mark.parametrize(
    ("jobs", "command"), [(1, "squeue"), (2, "squeue"), (100, "squeue"), (100, "sacct")]
)
def test_an_array_of_more_jobs_than_may_run(slurm: Slurm, jobs: int, command: str):
    """Those that may run come first, as an array; the others as arrays, too."""
    slurm.run(5, "--slurm-array-jobs=one", jobs=jobs, command=command)
    if jobs > 1:
        assert f"--array=1-{min(jobs, 5)} " in slurm.submitted[0]
    assert len(slurm.submitted) == math.ceil(5 / jobs)


def test_jobs_of_an_array_that_come_one_by_one_are_submitted_together(monkeypatch):
    """As after a check that found many finished: snakemake may pass each job on in a call."""
    monkeypatch.setattr(slurm_plugin, "COLLECT_S", 0.05)
    submitted: list[list[str]] = []

    class Executor:
        wait, array_jobs = True, {"one"}

        def run_jobs(self, jobs: list) -> None:
            submitted.append([job.name for job in jobs])

    def job(name: str, rule: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, rule=SimpleNamespace(name=rule), is_group=lambda: rule == "group"
        )

    slurm_plugin.collect_arrays(SimpleNamespace(Executor=Executor))
    executor = Executor()
    for name, rule in (("a", "one"), ("b", "other"), ("c", "one"), ("d", "group"), ("e", "one")):
        executor.run_jobs([job(name, rule)])
    time.sleep(0.5)
    assert submitted == [["b"], ["d"], ["a", "c", "e"]]
    executor.run_jobs([job("f", "one")])
    executor.wait = False  # stopped before the moment has passed
    time.sleep(0.5)
    assert submitted == [["b"], ["d"], ["a", "c", "e"]]


def test_a_task_that_failed_gets_memory_of_its_own(slurm: Slurm):
    """It is ready again when others are, whose first attempt it is."""
    slurm.says(states="COMPLETED\nFAILED\n")
    slurm.run(5, "--slurm-array-jobs=one", jobs=2)
    again = [call for call in slurm.submitted if "--mem 20" in call]
    assert len(again) == 1 and "--array" not in again[0]


@pytest.mark.parametrize("command", ["squeue", "sacct"])
def test_a_job_that_is_preempted_for_good_is_submitted_again(slurm: Slurm, command: str):
    slurm.says(states="PREEMPTED\n")
    said = slurm.run(1, command=command)
    assert said.count("SLURM preempted job 1 for good: it counts as cancelled.") == 1
    assert len(slurm.submitted) == 2


def test_a_preempted_job_that_was_put_back_is_waited_for(slurm: Slurm):
    slurm.says(states="PREEMPTED, PUT BACK\n")
    said = slurm.run(1, command="sacct")
    assert "for good" not in said
    assert len(slurm.submitted) == 1


def test_a_cancelled_job_is_submitted_again(slurm: Slurm):
    slurm.says(states="CANCELLED by 1000\n")
    slurm.run(1, command="sacct")
    assert len(slurm.submitted) == 2


@pytest.mark.parametrize("age", [0, 2])
def test_a_job_that_squeue_forgot_is_submitted_again(slurm: Slurm, age: int):
    """Also where SLURM remembers so shortly that the plugin would ask sacct, which fails."""
    slurm.says(states="FORGOTTEN\n", config=f"MinJobAge = {age} sec")
    said = slurm.run(1)
    assert "squeue lists job 1 no longer: it counts as failed." in said
    assert len(slurm.submitted) == 2


def test_a_plugin_without_what_is_replaced_is_refused(monkeypatch: pytest.MonkeyPatch):
    methods = ("run_jobs", "check_active_jobs", "_report_job_submission_threadsafe")
    other = SimpleNamespace(Executor=SimpleNamespace(**dict.fromkeys(methods, 1)))
    monkeypatch.setitem(sys.modules, "snakemake_executor_plugin_slurm", other)
    monkeypatch.setattr(slurm_plugin, "version", lambda name: "2.9.0")
    with pytest.raises(ValueError, match=r"expected 2\.8\.0, .*pending_jobs.*; found 2\.9\.0"):
        slurm_plugin.patch_plugin()
