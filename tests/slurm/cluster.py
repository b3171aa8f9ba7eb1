"""A SLURM that up.sh brought up, and a small project whose targets are made on it."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from project import Project, until

# What of profiles/slurm is different here: nodes of one CPU, and little time to wait.
SITE: dict[str, Any] = {
    "gpu": None,
    "jobs": 4,
    "shards_per_job": 2,
    "poll_seconds": 4,
    "latency_seconds": 5,
    "most_memory_mb": 4000,
    "stages": {
        stage: {"cpus": 1, "memory_mb": 1500, "minutes": 15}
        for stage in ("sources", "documents", "tokenizer", "tokens", "order", "train", "link")
    },
}


@dataclass(frozen=True)
class Job:
    """A job of SLURM's, or a task of an array."""

    id: str
    state: str
    rule: str  # rule_train_wildcards_small
    nodes: str
    restarts: int


class Cluster:
    """Two nodes that answer to the environment's SLURM_CONF."""

    def __init__(self, folder: Path, accounting: bool) -> None:
        self.folder, self.accounting = folder, accounting

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need."""
        return {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}:/usr/sbin",
        }

    def call(self, *command: str) -> str:
        """Run one of SLURM's commands; what it says."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def jobs(self, folder: Path) -> list[Job]:
        """The jobs that were submitted from a folder, the first one first."""
        form = "JobArrayID:|,State:|,Comment:|,NodeList:|,RestartCnt:|,WorkDir:"
        rows = self.call("squeue", "--array", "--states=all", "--noheader", f"--Format={form}")
        found = []
        for row in rows.splitlines():
            number, state, rule, nodes, restarts, place = (word.strip() for word in row.split("|"))
            if place == str(folder):
                found.append(Job(number, state, rule, nodes, int(restarts)))
        return sorted(found, key=lambda job: [int(part) for part in job.id.split("_")])


class ClusterProject(Project):
    """A project whose targets are made through profiles/slurm."""

    def __init__(self, root: Path, cluster: Cluster) -> None:
        super().__init__(root)
        self.cluster = cluster
        self.settings()

    def settings(self, stages: dict[str, dict[str, Any]] | None = None, **changes: Any) -> None:
        """Write the site's file: SITE, and what is different for a test."""
        own = {"accounting": self.cluster.accounting, "stages": SITE["stages"] | (stages or {})}
        site = SITE | own | changes
        self.write("site.yaml", site)

    def environment(self) -> dict[str, str]:
        site = {"OLMO_SITE": str(self.root / "site.yaml")}
        return super().environment() | self.cluster.environment | site

    def start(self, *words: str, cores: int = 4096, mark: str = "") -> "subprocess.Popen[str]":
        profile = ["--workflow-profile", "profiles/slurm"]
        return super().start(*profile, *words, cores=cores, mark=mark)

    def said(self) -> str:
        """What snakemake has said so far."""
        return (self.root / "output.txt").read_text()

    def jobs(self, rule: str = "") -> list[Job]:
        return [job for job in self.cluster.jobs(self.root) if f"rule_{rule}" in job.rule]

    def running(self, rule: str) -> Job:
        """The job of a rule, once it runs."""
        until(lambda: any(job.state == "RUNNING" for job in self.jobs(rule)), 120)
        return next(job for job in self.jobs(rule) if job.state == "RUNNING")
