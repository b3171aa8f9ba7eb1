"""What happens to a training job on a cluster, and that its bytes are the undisturbed run's."""

import contextlib
import json
import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from project import Project, processes
from slurm.cluster import Cluster, ClusterProject, Job, until

AFTER = 30  # steps, of 200, with a checkpoint at each twentieth: something is there, much is left


def trained(
    project: ClusterProject, disturb: Callable[[Job], object], mark: str = ""
) -> list[tuple[str, int]]:
    """Train on the cluster, do something in the middle; the jobs that it took, and their restarts.

    What is checked of every one: nothing was trained again but what no checkpoint held.
    """
    process = project.start("checkpoints/small/final", mark=mark)
    job = project.running("train")
    until(lambda: project.steps() > AFTER, 300)
    disturb(job)
    assert process.wait(900) == 0, (project.root / "output.txt").read_text()[-6000:]
    record = json.loads((project.final / "record.json").read_text())
    begun = [segment["after"] for segment in record["facts"]["segments"]]
    jobs = [(job.state, job.restarts) for job in project.jobs("train")]
    assert begun[0] == 0
    assert len(begun) == sum(1 + restarts for _, restarts in jobs)
    assert all(step >= AFTER // 20 * 20 for step in begun[1:])
    return jobs


def test_a_cancelled_job_is_submitted_again(local: Project, prepared: ClusterProject):
    jobs = trained(prepared, lambda job: prepared.cluster.call("scancel", job.id))
    assert jobs == [("CANCELLED", 0), ("COMPLETED", 0)]
    assert prepared.content() == local.content()


def test_a_killed_rank_ends_its_job_which_is_submitted_again(
    local: Project, prepared: ClusterProject
):
    mark = uuid.uuid4().hex

    def kill_a_rank(job: Job) -> None:
        ranks = [pid for pid, words in processes(mark).items() if "-m olmo.train" in words]
        os.kill(max(ranks), signal.SIGKILL)

    jobs = trained(prepared, kill_a_rank, mark)
    assert jobs == [("FAILED", 0), ("COMPLETED", 0)]
    assert prepared.content() == local.content()


def test_a_cancelled_job_is_noticed_through_sacct(with_accounting: Cluster, tmp_path: Path):
    project = ClusterProject(tmp_path / "project", with_accounting)
    process = project.start("data/small/sources/000.tsv")
    project.cluster.call("scancel", project.running("sources").id)
    assert process.wait(600) == 0, (project.root / "output.txt").read_text()[-6000:]
    assert [job.state for job in project.jobs()] == ["CANCELLED", "COMPLETED"]


@pytest.mark.long
def test_a_requeued_job_goes_on_under_its_number(local: Project, prepared: ClusterProject):
    jobs = trained(prepared, lambda job: prepared.cluster.call("scontrol", "requeue", job.id))
    assert jobs == [("COMPLETED", 1)]
    assert prepared.content() == local.content()


@pytest.mark.long
def test_a_preempted_job_goes_on_under_its_number(local: Project, prepared: ClusterProject):
    def preempt(job: Job) -> None:
        words = ["--partition=urgent", "--nodes=2", "--ntasks=2", "--exclusive", "--wrap=sleep 5"]
        prepared.cluster.call("sbatch", *words, "--output=/dev/null")

    assert trained(prepared, preempt) == [("COMPLETED", 1)]
    assert prepared.content() == local.content()


@pytest.mark.long
def test_a_drained_node_gets_no_more_jobs(local: Project, prepared: ClusterProject):
    call = prepared.cluster.call
    drained = []

    def drain(job: Job) -> None:
        drained.append(job.nodes)
        call("scontrol", "update", f"nodename={job.nodes}", "state=drain", "reason=test")
        call("scancel", job.id)

    try:
        jobs = trained(prepared, drain)
    finally:
        call("scontrol", "update", f"nodename={drained[0]}", "state=resume")
    assert jobs == [("CANCELLED", 0), ("COMPLETED", 0)]
    assert prepared.jobs("train")[1].nodes not in drained
    assert prepared.content() == local.content()


@pytest.mark.long
def test_a_node_that_dies_is_left(local: Project, prepared: ClusterProject):
    """Its daemon is gone with all that ran there; SLURM finds out in bounded time.

    Then it requeues the job; or it ends it, and snakemake submits it again.
    """
    mark = uuid.uuid4().hex
    call, folder = prepared.cluster.call, prepared.cluster.folder
    died = []

    def die(job: Job) -> None:
        died.append(job.nodes)
        daemon = int((folder / f"run/slurmd-{job.nodes}.pid").read_text())
        snakemake = "--workflow-profile"  # the one that waits is not on the node
        there = [pid for pid, words in processes(mark).items() if snakemake not in words]
        for pid in [daemon, *there]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    try:
        jobs = trained(prepared, die, mark)
    finally:
        call("slurmd", "-N", died[0])
    assert jobs in ([("COMPLETED", 1)], [("FAILED", 0), ("COMPLETED", 0)])
    assert prepared.jobs("train")[-1].nodes not in died
    assert prepared.content() == local.content()


@pytest.mark.long
def test_the_controller_may_be_restarted_meanwhile(local: Project, prepared: ClusterProject):
    def restart(job: Job) -> None:
        pid = int((prepared.cluster.folder / "run/slurmctld.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        until(lambda: not Path(f"/proc/{pid}").exists(), 60)
        prepared.cluster.call("slurmctld")

    assert trained(prepared, restart) == [("COMPLETED", 0)]
    assert prepared.content() == local.content()


@pytest.mark.long
def test_a_time_limit_is_a_pause(prepared: ClusterProject):
    """A minute, then two, …: the trainer is told before, saves where none was due, and leaves."""
    prepared.change("config/train/small.yaml", max_duration=6000, save_interval_unsharded=6000)
    train = {"cpus": 1, "memory_mb": 1500, "minutes": 1}
    prepared.settings(stages={"train": train}, warning_seconds=20, attempts=9)
    prepared.run(timeout=1500)
    jobs = prepared.jobs("train")
    assert len(jobs) > 1
    assert {job.state for job in jobs[:-1]} <= {"FAILED", "TIMEOUT"}
    record = json.loads((prepared.final / "record.json").read_text())
    begun = [segment["after"] for segment in record["facts"]["segments"]]
    # A job that had hardly begun has nothing to save; all others went on where the last one left.
    assert 1 < len(begun) <= len(jobs) and begun == sorted(set(begun))
