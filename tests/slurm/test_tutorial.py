"""The tutorial of the cluster, literally."""

import os
import signal
from pathlib import Path

from project import MARK, processes
from slurm.cluster import Cluster
from tutorials.literally import copy_repository, environment, follow, share_environments


def test_a_cluster(without_accounting: Cluster, tmp_path: Path):
    copy = share_environments(copy_repository(tmp_path / "olmo"))
    surroundings = environment() | without_accounting.environment | {MARK: "tutorial"}
    try:
        follow("cluster", copy, surroundings)
        jobs = without_accounting.jobs(copy)
        assert [job.state for job in jobs] == ["COMPLETED", "CANCELLED", "COMPLETED"]
    finally:  # a snakemake in the background, if a command before its end has failed
        for process in processes("tutorial"):
            os.kill(process, signal.SIGKILL)
