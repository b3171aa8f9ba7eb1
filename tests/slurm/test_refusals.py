"""Invalid requests and SLURM's answers: too little memory, a partition that does not exist."""

from slurm.cluster import Cluster, ClusterProject


def test_a_job_that_needs_more_memory_is_submitted_again_with_more(project: ClusterProject):
    project.settings(stages={"sources": {"cpus": 1, "memory_mb": 110, "minutes": 10}}, attempts=6)
    project.run("data/small/sources/000.tsv", timeout=600)
    jobs = project.jobs("sources")
    assert len(jobs) > 1
    assert {job.state for job in jobs[:-1]} <= {"FAILED", "CANCELLED", "OUT_OF_MEMORY"}
    assert jobs[-1].state == "COMPLETED"
    told = project.full_log()
    assert "mem_mb=110" in told and f"mem_mb={110 * len(jobs)}" in told


def test_a_wrong_partition_is_told_in_slurms_words(project: ClusterProject):
    project.settings(partition="nosuch", attempts=1)
    outcome = project.run("data/small/sources/000.tsv", ok=False)
    assert outcome.status != 0
    assert "invalid partition specified: nosuch" in outcome.output


def test_a_wrong_account_is_told_in_slurms_words(with_accounting: Cluster, tmp_path):
    project = ClusterProject(tmp_path / "project", with_accounting)
    project.settings(account="nosuch", attempts=1)
    outcome = project.run("data/small/sources/000.tsv", ok=False)
    assert outcome.status != 0
    assert "account nosuch" in outcome.output
    assert "lab" in outcome.output  # those that there are


def test_a_setting_that_there_is_not_names_the_file(project: ClusterProject):
    project.settings(acount="lab")
    outcome = project.run("data/small/sources/000.tsv", ok=False)
    assert outcome.status != 0
    assert "acount" in outcome.output and "site.yaml" in outcome.output
