"""What happens to a training job on a cluster, and that its bytes are the undisturbed run's."""

import os
import signal
import uuid
from pathlib import Path

import pytest
from project import Project, processes
from slurm.cluster import ClusterProject, Job, until

AFTER = 30  # steps, of 200: there is a checkpoint, and much is left


def trained(project: ClusterProject, disturb, mark: str = "", **settings) -> list[Job]:
    """Train on the cluster, do something in the middle; the jobs that it took."""
    project.settings(**settings)
    process = project.start("checkpoints/small/final", mark=mark)
    job = project.running("train")
    until(lambda: project.steps() > AFTER, 240)
    disturb(job)
    status = process.wait(900)
    assert status == 0, (project.root / "output.txt").read_text()[-6000:]
    return project.jobs("train")


def went_on(project: ClusterProject) -> None:
    """No step that a checkpoint held was trained again: the second attempt began later."""
    starts = [line for line in project.train_log() if "starts at step" in line]
    assert len(starts) > 1


def test_a_cancelled_job_is_submitted_again(local: Project, prepared: ClusterProject):
    jobs = trained(prepared, lambda job: prepared.cluster.call("scancel", job.id))
    assert [job.state for job in jobs] == ["CANCELLED", "COMPLETED"]
    assert prepared.content() == local.content()


def test_a_killed_rank_ends_its_job_which_is_submitted_again(
    local: Project, prepared: ClusterProject
):
    mark = uuid.uuid4().hex

    def kill_a_rank(job: Job) -> None:
        ranks = [pid for pid, words in processes(mark).items() if "-m olmo.train" in words]
        os.kill(max(ranks), signal.SIGKILL)

    jobs = trained(prepared, kill_a_rank, mark)
    assert [job.state for job in jobs] == ["FAILED", "COMPLETED"]
    assert prepared.content() == local.content()


@pytest.mark.long
def test_a_requeued_job_goes_on_under_its_number(local: Project, prepared: ClusterProject):
    jobs = trained(prepared, lambda job: prepared.cluster.call("scontrol", "requeue", job.id))
    assert [(job.state, job.restarts) for job in jobs] == [("COMPLETED", 1)]
    assert prepared.content() == local.content()


@pytest.mark.long
def test_a_preempted_job_goes_on_under_its_number(local: Project, prepared: ClusterProject):
    def preempt(job: Job) -> None:
        words = ["--partition=urgent", "--nodes=2", "--ntasks=2", "--exclusive", "--wrap=sleep 5"]
        prepared.cluster.call("sbatch", *words, "--output=/dev/null")

    jobs = trained(prepared, preempt)
    assert [(job.state, job.restarts) for job in jobs] == [("COMPLETED", 1)]
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
    assert [job.state for job in jobs] == ["CANCELLED", "COMPLETED"]
    assert jobs[1].nodes not in drained
    assert prepared.content() == local.content()


@pytest.mark.long
def test_the_controller_may_be_restarted_meanwhile(local: Project, prepared: ClusterProject):
    def restart(job: Job) -> None:
        pid_file = prepared.cluster.folder / "run/slurmctld.pid"
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        until(lambda: not Path(f"/proc/{pid}").exists(), 60)
        prepared.cluster.call("slurmctld")

    jobs = trained(prepared, restart)
    assert [job.state for job in jobs] == ["COMPLETED"]
    assert prepared.content() == local.content()


@pytest.mark.long
def test_a_time_limit_is_a_pause(prepared: ClusterProject, tmp_path: Path):
    """One minute a job: the trainer is told half a minute before, saves, and the next goes on."""
    prepared.change("config/train/small.yaml", max_duration=4000, save_interval_unsharded=4000)
    prepared.settings(
        stages={"train": {"cpus": 1, "memory_mb": 1500, "minutes": 1}},
        warning_seconds=30,
        most_minutes=1,
        attempts=8,
    )
    prepared.run(timeout=1500)
    jobs = prepared.jobs("train")
    assert len(jobs) > 1
    assert [job.state for job in jobs[1:]] == ["FAILED"] * (len(jobs) - 2) + ["COMPLETED"]
