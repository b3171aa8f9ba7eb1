"""From text to a checkpoint through SLURM: the bytes of this machine's own run."""

import pytest
from project import Project
from slurm.cluster import Cluster, ClusterProject


def test_the_chain_through_slurm_ends_with_the_local_bytes(local: Project, project: ClusterProject):
    project.write("config/train/small.yaml", local.read("config/train/small.yaml"))
    project.run(timeout=900)
    assert project.content() == local.content()
    jobs = project.jobs()
    assert {job.state for job in jobs} == {"COMPLETED"}
    assert {job.nodes for job in jobs} == {"node1", "node2"}
    # Two batches of sources, of documents, of tokens; a tokenizer, an order, a training.
    assert len(jobs) == 9
    again = project.run()
    assert "Nothing to be done" in again.output
    assert len(project.jobs()) == len(jobs)


@pytest.mark.long
def test_the_same_where_sacct_says_what_became_of_a_job(
    local: Project, with_accounting: Cluster, tmp_path
):
    project = ClusterProject(tmp_path / "project", with_accounting)
    project.write("config/train/small.yaml", local.read("config/train/small.yaml"))
    project.run(timeout=900)
    assert project.content() == local.content()
    assert {job.state for job in project.jobs()} == {"COMPLETED"}
