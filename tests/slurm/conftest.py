"""A real SLURM on this machine, brought up for the tests here and taken down after them."""

import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from project import Project
from shared import shared_folder, why_not
from slurm.cluster import Cluster, ClusterProject

ORDER = "checkpoints/small/global_indices.npy"
LONG = {"max_duration": 200, "save_interval_unsharded": 20}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def without_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes; squeue says what became of a job."""
    yield from brought_up(tmp_path_factory.mktemp("slurm"), accounting=False)


@pytest.fixture(scope="session")
def with_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes and slurmdbd; sacct says what became of a job."""
    yield from brought_up(tmp_path_factory.mktemp("slurmdbd"), accounting=True)


def require_plugin() -> None:
    """Skip the test if nothing here could submit a job."""
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("no executor plugin for SLURM; uv run --extra slurm pytest -n 0 tests/slurm")


def brought_up(folder: Path, accounting: bool, machine: str = "") -> Iterator[Cluster]:
    require_plugin()
    here = Path(__file__).parent
    done = subprocess.run(
        [here / "up.sh", folder],
        env={
            **os.environ,
            "ACCOUNTING": str(int(accounting)),
            "MACHINE": machine,
            "CPUS": "1",  # two jobs at once, as many as a small machine has cores
            "PORT": str(free_ports(6)),
        },
        capture_output=True,
        text=True,
    )
    try:
        if done.returncode == 69:  # sysexits' EX_UNAVAILABLE
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        yield Cluster(folder, accounting)
    finally:
        subprocess.run([here / "down.sh", folder], check=True)


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on."""
    for first in range(21_000 + os.getpid() % 1000 * 8, 32_000, count):
        with socket.socket() as probe:
            if all(probe.connect_ex(("127.0.0.1", first + i)) for i in range(count)):
                return first
    raise RuntimeError("no free ports between 21000 and 32000")


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The small project, trained on this machine: what runs on the cluster are compared with.

    It trains for long enough that something can happen to it meanwhile.
    """
    require_plugin()
    project = Project(tmp_path_factory.mktemp("local") / "project")
    project.change("config/train/small.yaml", **LONG)
    project.run(ORDER, timeout=900)
    trained = project.copy(project.root.parent / "trained")
    trained.run(timeout=900)
    return trained


@pytest.fixture(scope="session")
def by_two(local: Project) -> Project:
    """The same by two processes of this machine."""
    folder = local.root.parent
    project = Project(folder / "project").copy(folder / "by-two")
    project.change("config/config.yaml", runs__small__processes=2)
    project.run(timeout=900)
    return project


@pytest.fixture
def with_own_clients(tmp_path: Path) -> Iterator[ClusterProject]:
    """The small project on a network file system, where this machine and both nodes are clients."""
    if reason := why_not():
        pytest.skip(reason)
    with (
        shared_folder(tmp_path) as shared,
        contextmanager(brought_up)(
            tmp_path / "slurm", accounting=False, machine=str(shared.machine)
        ) as cluster,
    ):
        yield ClusterProject(shared.path / "project", cluster)


@pytest.fixture
def project(tmp_path: Path, without_accounting: Cluster) -> ClusterProject:
    """The small project before its first run, for a cluster without accounting."""
    return ClusterProject(tmp_path / "project", without_accounting)


@pytest.fixture
def prepared(tmp_path: Path, local: Project, without_accounting: Cluster) -> ClusterProject:
    """The project of `local`, with its data made and nothing trained yet."""
    shutil.copytree(local.root.parent / "project", tmp_path / "project", symlinks=True)
    return ClusterProject(tmp_path / "project", without_accounting)


@pytest.fixture
def accounted(tmp_path: Path, local: Project, with_accounting: Cluster) -> ClusterProject:
    """`prepared`, where sacct says what became of a job."""
    shutil.copytree(local.root.parent / "project", tmp_path / "project", symlinks=True)
    return ClusterProject(tmp_path / "project", with_accounting)
