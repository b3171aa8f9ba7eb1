"""Start the processes that train: one alone, torchrun here, or srun and torchrun on many nodes.

The number of nodes and processes is not in a run's identity. Each start or resume records it as a
segment (`olmo.train.segments`).
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from olmo.io import sealed
from olmo.runtime.process import (
    CAUSE_FILE,
    FINISHED_FILE,
    LAUNCHED_ENV,
    PAUSED_FILE,
    SEGMENTS_FILE,
    STOP_FILE,
    Paused,
    describe_exit,
    supervised,
)
from olmo.store.lease import refresh_listing


@dataclass(frozen=True)
class Geometry:
    """How many processes train, and where."""

    processes: int = 1  # on each node: one a GPU
    nodes: int = 1
    min_nodes: int | None = None  # continue with this many if nodes are lost; None: with all
    max_restarts: int = 0  # times torchrun starts the processes again before it gives up
    batch: int | None = None  # instances of a step, if known: divided evenly among all processes

    def __post_init__(self) -> None:
        fewest = self.nodes if self.min_nodes is None else self.min_nodes
        for name, value, least in (
            ("processes", self.processes, 1),
            ("nodes", self.nodes, 1),
            ("min_nodes", fewest, 1),
            ("max_restarts", self.max_restarts, 0),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")
        if fewest > self.nodes:
            raise ValueError(f"min_nodes: expected at most nodes ({self.nodes}), found {fewest}")
        fit = self.valid_node_counts(1, self.nodes)
        for name, value in (("nodes", self.nodes), ("min_nodes", fewest)):
            if self.nodes > 1 and value not in fit:
                raise ValueError(
                    f"{name}: expected a number of nodes whose processes, {self.processes} on "
                    f"each, share global_train_batch_size={self.batch} evenly; found {value}. "
                    f"Valid, up to {self.nodes}: {', '.join(map(str, fit)) or 'none'}"
                )

    def valid_node_counts(self, least: int, most: int) -> list[int]:
        """The numbers of nodes from `least` to `most` whose processes share a batch evenly."""
        batch = 0 if self.batch is None else self.batch
        return [n for n in range(least, most + 1) if batch % (n * self.processes) == 0]

    @property
    def effective_min_nodes(self) -> int:
        """The smallest number of nodes to train with."""
        return self.nodes if self.min_nodes is None else self.min_nodes


def launch(config: Path, geometry: Geometry, threads: int | None) -> None:
    """Run the trainer on `config` to its end, each process with `threads` CPU threads (None: 1).

    SIGTERM and SIGUSR1 (sent by a scheduler before a time limit) make it save and exit; a second
    one ends it at once.

    Raises:
        Paused: it stopped on a signal or its time limit, and has saved. If a SLURM job's time
            limit was near, the job has been requeued.
        ChildProcessError: it failed, with the cause if the trainer reported one, and whether the
            same command continues.
        ValueError: the allocation has fewer nodes than the run needs.
    """
    folder = config.parent
    for name in (STOP_FILE, PAUSED_FILE, CAUSE_FILE, FINISHED_FILE):
        (folder / name).unlink(missing_ok=True)
    command = [*build_command(geometry, config), "-m", "olmo.train", str(config)]
    # One thread by default, as torchrun sets for several processes: the bits of results depend on
    # the number of threads, and must not depend on this machine's cores.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or 1), LAUNCHED_ENV: "1"}
    with (
        supervised(command, env=environment, stdin=subprocess.DEVNULL) as process,
        request_stop_on_signal(folder / STOP_FILE),
    ):
        status = process.wait()
    refresh_listing(folder)  # rank 0 may have written from another machine
    if (folder / PAUSED_FILE).exists():
        # Read before the requeue: the requeued job may start elsewhere and delete the file.
        paused = sealed.load_file(folder / PAUSED_FILE)
        requeue_slurm_job(folder, paused)
        raise Paused(
            f"training paused at step {paused['step']} by {paused['by']}, saved to "
            f"{paused['checkpoint']}. Its checkpoints are in {folder}: the same command continues"
        )
    # srun also exits with an error if nodes were lost and the others finished the run.
    if status and not (
        geometry.effective_min_nodes < geometry.nodes and (folder / FINISHED_FILE).exists()
    ):
        saved = any(folder.glob("step*"))
        resume_hint = f". Its checkpoints are in {folder}: the same command continues from the last"
        if (folder / CAUSE_FILE).exists():
            cause = sealed.load_file(folder / CAUSE_FILE)
            if cause["repeats"]:  # the same command fails again
                resume_hint = f". Its checkpoints, for the same settings only, are in {folder}"
            raise ChildProcessError(f"training ended early: {cause['said']}{resume_hint * saved}")
        raise ChildProcessError(
            f"training ended early ({describe_exit(status)}) without an error message: a process "
            f"crashed or was killed (`dmesg` shows whether memory ran out){resume_hint * saved}"
        )


@contextlib.contextmanager
def request_stop_on_signal(request: Path) -> Iterator[None]:
    """In the block, SIGTERM and SIGUSR1 create the file `request`, which the trainer polls.

    A signal is not enough: torchrun kills processes 30 seconds after it forwards one, srun ends a
    step on SIGTERM, and neither is configurable in all versions. A checkpoint may take longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def write_request(number: int, frame: FrameType | None) -> None:
        if request.exists():
            sys.exit(128 + number)
        request.write_text(f"{signal.Signals(number).name}\n")

    before = {s: signal.signal(s, write_request) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    except KeyboardInterrupt:
        # Ctrl-C does not reach the trainer, which is in another process group.
        request.write_text(f"{signal.SIGINT.name}\n")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def requeue_slurm_job(folder: Path, paused: Mapping[str, Any]) -> None:
    """Requeue this SLURM job if its time limit is near, so that the stop is no failed attempt.

    A job that has completed no step is not requeued, since it would repeat that forever: it
    fails, and is submitted again with more time. Nor is one that got SIGTERM: it was cancelled, or
    SLURM requeues it after a preemption.

    Args:
        paused: what the trainer wrote when it paused; "by" and "step" are read.
    """
    job = os.environ.get("SLURM_JOB_ID")
    segments = folder / SEGMENTS_FILE
    segment = sealed.load_lines(segments.read_bytes(), segments)[-1]
    if job is None or paused["by"] != signal.SIGUSR1.name or paused["step"] <= segment["after"]:
        return
    try:
        scontrol("requeue", job)
    except ValueError as error:  # the cluster allows none: the job fails and is submitted again
        print(f"olmo train: {error}", file=sys.stderr)


def build_command(geometry: Geometry, config: Path) -> list[str]:
    """The command line of srun and torchrun, up to `-m` and the module that the processes run.

    A single process that is not restarted needs no torchrun, which would import torch first.
    """
    torchrun = [sys.executable, "-m", "olmo.cluster.torchrun"]
    torchrun += ["--nproc-per-node", str(geometry.processes)]
    torchrun += ["--max-restarts", str(geometry.max_restarts)]
    torchrun += ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]  # see olmo.cluster.node
    node = [sys.executable, "-m", "olmo.cluster.node"]
    addresses = allocated_addresses(geometry) if geometry.nodes > 1 else []
    count = len(addresses)
    if count < 2 and geometry.processes == 1 and not geometry.max_restarts:
        return [*node, "", sys.executable]
    if count < 2:
        # An address: torchrun would try to resolve the machine's name, which may fail slowly.
        return [*node, "", *torchrun, "--standalone", "--local-addr=127.0.0.1"]
    job = os.environ["SLURM_JOB_ID"]
    # The same port on all nodes, but another for each job and run: two jobs may share a node.
    port = 20_000 + zlib.crc32(f"{job} {config}".encode()) % 10_000
    # torchrun accepts a range of nodes, in which every number must share the batch evenly.
    least = count
    while least - 1 in geometry.valid_node_counts(geometry.effective_min_nodes, count):
        least -= 1
    elastic = least < count
    srun = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--overlap"]
    # A failed torchrun ends the others, which would wait for it; unless the run is elastic.
    srun += ["--no-kill", "--kill-on-bad-exit=0"] if elastic else ["--kill-on-bad-exit=1"]
    if cpus := slurm_value("SLURM_CPUS_PER_TASK", "CPUs/Task"):
        srun.append(f"--cpus-per-task={cpus}")  # sbatch's is not inherited since SLURM 22.05
    nodes = f"{least}:{count}" if elastic else str(count)
    torchrun += [f"--nnodes={nodes}", "--rdzv-backend=c10d"]
    torchrun += [f"--rdzv-endpoint={addresses[0]}:{port}", f"--rdzv-id={job}-{port}"]
    return [*srun, *node, ",".join(addresses[:2]), *torchrun]


def allocated_addresses(geometry: Geometry) -> list[str]:
    """The addresses of the nodes of this SLURM allocation that the run uses.

    Raises:
        ValueError: this process is not in an allocation, or it is too small.
    """
    setting = f"nodes: {geometry.nodes}"
    nodelist = slurm_value("SLURM_JOB_NODELIST", "NodeList")
    if not nodelist:
        raise ValueError(
            f"{setting} needs a SLURM allocation, and this process is in none (SLURM_JOB_ID is "
            "not set). Submit it: snakemake --workflow-profile profiles/slurm <target>; or "
            f"begin with salloc --nodes={geometry.nodes} --ntasks-per-node=1; or set nodes: 1 for "
            "the run in config/config.yaml"
        )
    names = scontrol("show", "hostnames", nodelist).split()
    if len(names) < geometry.effective_min_nodes:
        raise ValueError(
            f"{setting} needs at least {geometry.effective_min_nodes} nodes, and the allocation "
            f"{os.environ['SLURM_JOB_ID']} has {len(names)}: {nodelist}. Ask for more with "
            f"--nodes={geometry.nodes}, or set nodes: {len(names)} for the run"
        )
    usable = geometry.valid_node_counts(
        geometry.effective_min_nodes, min(len(names), geometry.nodes)
    )
    # Addresses, since a node's name may not resolve in the network.
    shown = scontrol("--oneliner", "show", "node", ",".join(names))
    known = dict(re.findall(r"^NodeName=(\S+).*?\sNodeAddr=(\S+)", shown, re.MULTILINE))
    return [known.get(name, name) for name in names[: usable[-1]]]


def slurm_value(variable: str, field: str) -> str | None:
    """A property of this SLURM job, from the environment or from `scontrol show job`.

    snakemake's executor plugin removes all variables of a job but its id from the environment.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or variable in os.environ:
        return os.environ.get(variable)
    found = re.search(rf"\s{field}=(\S+)", scontrol("--oneliner", "show", "job", job))
    return found[1] if found else None


def scontrol(*words: str) -> str:
    """The output of scontrol; ValueError with its error message if it fails."""
    done = subprocess.run(["scontrol", *words], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"scontrol {' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout
