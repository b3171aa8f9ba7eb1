"""A thousand shards: how many jobs, how much memory the process that submits them takes."""

import os
import re
import subprocess
import sys

from project import documents, write_source
from slurm.cluster import ClusterProject


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
