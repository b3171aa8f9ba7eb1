"""A thousand shards: how many jobs, how much memory the process that submits them takes. Arrays."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from project import documents, write_source
from slurm.cluster import Cluster, ClusterProject


def test_a_thousand_shards_are_at_most_60_jobs(project: ClusterProject):
    project.settings(shards_per_job=64)
    sources = project.root / "sources"
    write_source(sources / "first.json.gz", documents(0, 20))
    for number in range(997):
        os.link(sources / "first.json.gz", sources / f"more-{number:04d}.json.gz")
    words = ["--workflow-profile", "profiles/slurm", "-n", "checkpoints/small/final"]
    with (project.root / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "snakemake", *words],
            cwd=project.root,
            env=project.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    said = (project.root / "output.txt").read_text()
    assert process.returncode == 0, said[-4000:]
    assert int(re.search(r"^total +(\d+)$", said, re.M)[1]) <= 60
    assert used.ru_maxrss < 1024 * 1024  # kilobytes


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
