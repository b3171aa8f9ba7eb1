"""A thousand shards: how many jobs, how much memory the process that submits them takes. Arrays."""

import os
import re
from pathlib import Path

import polars as pl
import pytest
from project import documents, write_source
from slurm.cluster import Cluster, ClusterProject


@pytest.fixture
def thousand(project: ClusterProject) -> ClusterProject:
    """A thousand files, no two alike, 64 in a job as profiles/slurm has it."""
    project.settings(shards_per_job=64, jobs=100)
    lines = documents(0, 20)
    for number in range(997):
        own = [line | {"text": f"{number}: {line['text']}"} for line in lines]
        write_source(project.root / f"sources/more-{number:04d}.json.gz", own)
    return project


def test_a_thousand_shards_are_at_most_60_jobs(thousand: ClusterProject):
    said, kilobytes = finished(thousand, "-n", "--verbose", "checkpoints/small/final")
    assert int(re.search(r"^total +(\d+)$", said, re.M)[1]) <= 60
    assert kilobytes < 1024 * 1024


@pytest.mark.long
def test_a_thousand_shards_are_made(thousand: ClusterProject):
    said, kilobytes = finished(thousand, "--verbose", "checkpoints/small/final")
    assert kilobytes < 1024 * 1024
    assert 48 < said.count("submitted with SLURM jobid") <= 60
    # SLURM forgets a job in ten minutes; of those that it knows none was tried twice.
    assert {job.state for job in thousand.jobs()} == {"COMPLETED"}
    for stage, output in (("sources", "source"), ("tokens", "tokens")):
        listings = thousand.root.glob(f"data/small/{stage}/*.tsv")
        made = pl.concat(pl.read_csv(path, separator="\t") for path in listings)
        made = made.filter(pl.col("output") == output)
        assert made["shard"].n_unique() == made["sha256"].n_unique() == len(made) == 1000
    said, _ = finished(thousand, "checkpoints/small/final")
    assert "Nothing to be done" in said


def finished(project: ClusterProject, *words: str) -> tuple[str, int]:
    """Run snakemake to its end; what it said, and the most memory it took, in kilobytes."""
    process = project.start(*words)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    said = (project.root / "output.txt").read_text()
    assert process.returncode == 0, said[-4000:]
    print(f"{' '.join(words)}: {used.ru_maxrss / 1024:.0f} MB at most")
    return said, used.ru_maxrss


@pytest.mark.long
@pytest.mark.parametrize("which", ["without_accounting", "with_accounting"])
def test_shards_as_an_array(which: str, request: pytest.FixtureRequest, tmp_path: Path):
    cluster: Cluster = request.getfixturevalue(which)
    project = ClusterProject(tmp_path / "project", cluster)
    project.settings(arrays=["sources"], shards_per_job=1)
    names = [f"data/small/sources/00{batch}.tsv" for batch in range(3)]
    project.run(*names, timeout=600)
    tasks = [job.id.split("_") for job in project.jobs("sources")]
    assert [task for _, task in tasks] == ["1", "2", "3"]
    assert len({job for job, _ in tasks}) == 1
    assert all((project.root / name).exists() for name in names)


def test_a_task_that_fails_fails_no_other_and_names_its_log(project: ClusterProject):
    project.settings(arrays=["sources"], shards_per_job=1, attempts=1)
    for bad in (0, 2):  # the first task is one of these two in most runs
        (project.root / f"sources/part-{bad}.json.gz").write_bytes(b"no gz")
    made = [f"data/small/sources/00{batch}.tsv" for batch in range(3)]
    outcome = project.run(*made, ok=False, timeout=600)
    assert outcome.status != 0
    states = [job.state for job in project.jobs("sources")]
    assert sorted(states) == ["COMPLETED", "FAILED", "FAILED"]
    assert [(project.root / name).exists() for name in made] == [False, True, False]
    logs = list(project.root.glob(".snakemake/slurm_logs/rule_sources/**/*.log"))
    assert len(logs) == 2 and all(f" and {log}" in outcome.output for log in logs)
    assert all(f"part-{bad}.json.gz" in outcome.output for bad in (0, 2))
