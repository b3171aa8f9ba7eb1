"""From text to a checkpoint through SLURM: the bytes of this machine's own run."""

import json
from pathlib import Path

import pytest
from project import Project
from slurm.cluster import Cluster, ClusterProject
from slurm.conftest import LONG, ORDER


def on_two_nodes(project: ClusterProject, by_two: Project) -> None:
    """The whole chain, training on two nodes, one process each: two processes' bytes."""
    project.change("config/train/small.yaml", **LONG)
    project.change("config/config.yaml", runs__small__nodes=2)
    project.run(timeout=1200)
    assert project.content() == by_two.content()
    jobs = project.jobs()
    assert {job.state for job in jobs} == {"COMPLETED"}
    # Two batches of sources, of documents, of tokens; a tokenizer, an order, a training.
    assert len(jobs) == 9
    assert {job.nodes for job in jobs} == {"node1", "node2", "node[1-2]"}
    (train,) = project.jobs("train")
    assert train.nodes == "node[1-2]"
    assert record(project)["conditions"] == record(by_two)["conditions"]
    again = project.run()
    assert "Nothing to be done" in again.output
    assert len(project.jobs()) == len(jobs)


def record(project: Project) -> dict:
    found: dict = json.loads((project.final / "record.json").read_text())
    return found


def test_the_chain_on_two_nodes(by_two: Project, project: ClusterProject):
    on_two_nodes(project, by_two)


@pytest.mark.long
def test_the_same_where_sacct_says_what_became_of_a_job(
    by_two: Project, with_accounting: Cluster, tmp_path: Path
):
    on_two_nodes(ClusterProject(tmp_path / "project", with_accounting), by_two)


@pytest.mark.long
def test_the_same_on_a_network_file_system(by_two: Project, with_own_clients: ClusterProject):
    """Each node sees the store through a client of its own, and has a name of its own."""
    on_two_nodes(with_own_clients, by_two)


def test_gpus_are_asked_of_slurm(by_two: Project, prepared: ClusterProject):
    """Two GPUs, two processes. SLURM counts them; these are none, so training is on the CPU."""
    train = {"cpus": 1, "memory_mb": 3500, "minutes": 15}
    prepared.settings(gpu="gpu:pretended", stages={"train": train})
    prepared.change("config/config.yaml", runs__small__gpus_per_node=2)
    prepared.run(timeout=900)
    (train,) = prepared.jobs("train")
    said = prepared.cluster.call("scontrol", "show", "job", train.id)
    assert "TresPerNode=gres:gpu:pretended:2" in said
    assert prepared.content() == by_two.content()


@pytest.mark.long
def test_a_chain_of_links_is_a_job_each(local: Project, prepared: ClusterProject):
    prepared.change("config/config.yaml", runs__small__links=[70, 130])
    prepared.run(timeout=1200)
    assert [job.state for job in prepared.jobs("link")] == ["COMPLETED"] * 2
    assert [job.state for job in prepared.jobs("train")] == ["COMPLETED"]
    assert prepared.content() == local.content()


def test_stages_of_small_data_share_a_job(local: Project, project: ClusterProject):
    stages = ["sources", "documents", "tokenizer", "tokens", "order"]
    project.settings(together=[stages], shards_per_job=4)
    project.change("config/train/small.yaml", **LONG)
    project.run(ORDER, timeout=900)
    (job,) = project.jobs()
    assert job.state == "COMPLETED"
    order = [p.root / ORDER for p in (project, local)]
    assert order[0].read_bytes() == order[1].read_bytes()
