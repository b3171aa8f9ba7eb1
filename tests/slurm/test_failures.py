"""What happens to a training job on a cluster, and that its bytes are the undisturbed run's."""

import contextlib
import os
import re
import signal
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from project import Project, processes, until
from slurm.cluster import Cluster, ClusterProject, Job

from olmo.report.series import LOSS, MetricsFollower, find_metrics

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
    assert process.wait(900) == 0, project.said()[-6000:]
    begun = [segment["after"] for segment in project.segments()]
    assert begun[0] == 0
    assert all(step >= AFTER // 20 * 20 for step in begun[1:])
    return [(job.state, job.restarts) for job in project.jobs("train")]


def of_node(node: str, mark: str) -> dict[int, str]:
    """The processes of a run that SLURM started on a node."""
    wanted = f"SLURMD_NODENAME={node}".encode()
    found = {}
    for pid, words in processes(mark).items():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found[pid] = words
    return found


def node_dies(cluster: Cluster, node: str, mark: str) -> None:
    """Its daemon and all that ran there are gone at one moment."""
    daemon = int((cluster.folder / f"run/slurmd-{node}.pid").read_text())
    for pid in [daemon, *of_node(node, mark)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def preempt(cluster: Cluster) -> None:
    """A job that goes first wants both nodes, for some seconds."""
    words = ["--partition=urgent", "--nodes=2", "--ntasks=2", "--exclusive", "--wrap=sleep 5"]
    cluster.call("sbatch", *words, "--output=/dev/null")


@contextlib.contextmanager
def controller_away(cluster: Cluster) -> Iterator[None]:
    """The controller is ended, and started again."""
    pid = int((cluster.folder / "run/slurmctld.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{pid}").exists(), 60)
    try:
        yield
    finally:
        cluster.call("slurmctld")


def test_a_cancelled_job_is_submitted_again(local: Project, prepared: ClusterProject):
    """And `olmo watch`, on the submitting machine, follows it: no gap, no step twice."""
    metrics = MetricsFollower(partial(find_metrics, prepared.root / "checkpoints/small"))
    seen: list[str] = []

    def disturb(job: Job) -> None:
        seen.append(prepared.olmo("watch", "small").output)
        assert metrics.update()
        prepared.cluster.call("scancel", job.id)

    assert trained(prepared, disturb) == [("CANCELLED", 0), ("COMPLETED", 0)]
    assert prepared.content() == local.content()
    seen.append(prepared.olmo("watch", "small").output)
    assert re.match(r"small: running, step \d\d/200, .* left", seen[0]), seen[0]
    assert seen[1].startswith("small: done, step 200/200"), seen[1]
    metrics.update()
    loss = metrics.series[LOSS]
    expected = {row["step"]: row[LOSS] for row in prepared.metrics() if LOSS in row}
    assert loss.steps == list(range(1, 201))
    assert dict(zip(loss.steps, loss.values, strict=True)) == expected


@pytest.mark.long  # as that of two nodes, below
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
    assert process.wait(600) == 0, project.said()[-6000:]
    assert [job.state for job in project.jobs()] == ["CANCELLED", "COMPLETED"]


@pytest.mark.parametrize(
    "which", ["without_accounting", pytest.param("with_accounting", marks=pytest.mark.long)]
)
def test_a_job_that_is_preempted_for_good_is_submitted_again(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
):
    """Where the site cancels what it preempts, nobody puts the job back."""
    cluster: Cluster = request.getfixturevalue(which)
    project = ClusterProject(tmp_path / "project", cluster)
    update = ("scontrol", "update", "partitionname=main")
    cluster.call(*update, "preemptmode=cancel")
    try:
        process = project.start("data/small/sources/000.tsv")
        project.running("sources")
        preempt(cluster)
        assert process.wait(600) == 0, project.said()[-6000:]
    finally:
        cluster.call(*update, "preemptmode=requeue")
    assert [job.state for job in project.jobs()] == ["PREEMPTED", "COMPLETED"]


@pytest.mark.long  # squeue itself tries for ten seconds each time
def test_no_job_is_forgotten_while_the_controller_is_away(project: ClusterProject):
    """For several looks: squeue fails meanwhile."""
    process = project.start("data/small/sources/000.tsv")
    project.running("sources")
    with controller_away(project.cluster):
        until(lambda: project.said().count("squeue does not answer") > 1, 300)
    assert process.wait(600) == 0, project.said()[-6000:]
    assert project.jobs("sources")[-1].state == "COMPLETED"


@pytest.mark.long
def test_a_requeued_job_goes_on_under_its_number(local: Project, prepared: ClusterProject):
    jobs = trained(prepared, lambda job: prepared.cluster.call("scontrol", "requeue", job.id))
    assert jobs == [("COMPLETED", 1)]
    assert prepared.content() == local.content()


@pytest.mark.long
def test_a_preempted_job_goes_on_under_its_number(local: Project, prepared: ClusterProject):
    assert trained(prepared, lambda _: preempt(prepared.cluster)) == [("COMPLETED", 1)]
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
    died = []

    def die(job: Job) -> None:
        died.append(job.nodes)
        node_dies(prepared.cluster, job.nodes, mark)

    try:
        jobs = trained(prepared, die, mark)
    finally:
        prepared.cluster.call("slurmd", "-N", died[0])
    assert jobs in ([("COMPLETED", 1)], [("FAILED", 0), ("COMPLETED", 0)])
    assert prepared.jobs("train")[-1].nodes not in died
    assert prepared.content() == local.content()


def test_of_two_nodes_a_killed_rank_ends_the_job(by_two: Project, prepared: ClusterProject):
    """The other node's rank does not wait for it for ever; the next job has the bytes of two."""
    mark = uuid.uuid4().hex

    def kill_a_rank(job: Job) -> None:
        trainers = [p for p, w in of_node("node2", mark).items() if w.endswith("given.yaml")]
        os.kill(max(trainers), signal.SIGKILL)  # torchrun began before its rank

    prepared.change("config/config.yaml", runs__small__nodes=2)
    jobs = trained(prepared, kill_a_rank, mark)
    assert jobs == [("FAILED", 0), ("COMPLETED", 0)]
    assert [segment["processes"] for segment in prepared.segments()] == [2, 2]
    assert prepared.content() == by_two.content()


@pytest.mark.long
def test_of_two_nodes_one_dies_and_the_job_goes_on(local: Project, prepared: ClusterProject):
    """With min_nodes the same job trains on with what is left, from the last checkpoint."""
    mark = uuid.uuid4().hex
    run = {"runs__small__nodes": 2, "runs__small__min_nodes": 1, "runs__small__max_restarts": 1}
    prepared.change("config/config.yaml", **run)
    try:
        jobs = trained(prepared, lambda _: node_dies(prepared.cluster, "node2", mark), mark)
    finally:
        prepared.cluster.call("slurmd", "-N", "node2")
    assert jobs == [("COMPLETED", 0)]
    begun = [(segment["processes"], segment["restart"]) for segment in prepared.segments()]
    assert begun == [(2, 0), (1, 1)]
    same_order(prepared, local)


@pytest.mark.long
def test_of_two_nodes_one_dies_and_the_next_job_has_what_is_left(
    local: Project, prepared: ClusterProject
):
    """That of the rendezvous: no job outlives it. The next one takes the nodes that there are."""
    mark = uuid.uuid4().hex
    prepared.change("config/config.yaml", runs__small__nodes=2, runs__small__min_nodes=1)
    try:
        jobs = trained(prepared, lambda _: node_dies(prepared.cluster, "node1", mark), mark)
    finally:
        prepared.cluster.call("slurmd", "-N", "node1")
    assert len(jobs) == 2 and jobs[1] == ("COMPLETED", 0)
    assert [segment["processes"] for segment in prepared.segments()] == [2, 1]
    same_order(prepared, local)


def same_order(project: Project, straight: Project) -> None:
    """Whether the losses are those of the same data in the same order, to what sums differ by."""
    losses = [
        [row["train/CrossEntropyLoss"] for row in p.metrics() if row["step"]]
        for p in (project, straight)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.long
def test_the_controller_may_be_restarted_meanwhile(local: Project, prepared: ClusterProject):
    def restart(job: Job) -> None:
        with controller_away(prepared.cluster):
            pass

    assert trained(prepared, restart) == [("COMPLETED", 0)]
    assert prepared.content() == local.content()


@pytest.mark.long
@pytest.mark.parametrize("which", ["prepared", "accounted"])
def test_a_time_limit_is_a_pause(
    which: str, request: pytest.FixtureRequest, local: Project, tmp_path: Path
):
    """A minute; the trainer is told before, saves where none was due, and has its job put back.

    A busy machine may need more than a minute to begin. Then the job fails, and the next one has
    two. A pause takes none of the attempts. After the first one there is time enough.
    """
    project: ClusterProject = request.getfixturevalue(which)
    alone = Project(local.root.parent / "project").copy(tmp_path / "alone")
    for one in (project, alone):
        one.change("config/train/small.yaml", max_duration=6000, save_interval_unsharded=6000)
    train = {"cpus": 1, "memory_mb": 2500, "minutes": 1}
    project.settings(stages={"train": train}, warning_seconds=20, attempts=3)
    process = project.start("checkpoints/small/final")
    until(lambda: any(job.restarts for job in project.jobs("train")), 600)
    job = project.jobs("train")[-1].id
    project.cluster.call("scontrol", "update", f"jobid={job}", "timelimit=30")
    assert process.wait(1500) == 0, project.said()[-6000:]
    *failed, last = project.jobs("train")
    assert {job.state for job in failed} <= {"FAILED", "TIMEOUT"}
    assert (last.id, last.state, last.restarts) == (job, "COMPLETED", 1)
    begun = [segment["after"] for segment in project.segments()]
    assert begun[0] == 0 and len(begun) == 2 and begun[1] > 0
    alone.run(timeout=1500)
    assert project.content() == alone.content()
