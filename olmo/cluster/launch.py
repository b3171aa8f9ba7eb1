"""From one command to the processes that train: torchrun here, or srun and torchrun on many nodes.

How many nodes and processes there are is no part of what is trained. It stands in the record
(`olmo.train.segments`) as what happened, each time the run was taken up again.
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
    CAUSE,
    FINISHED,
    LAUNCHED,
    MARKER,
    SEGMENTS,
    STOP,
    Paused,
    describe_exit,
    supervised,
)
from olmo.store.lease import see_anew


@dataclass(frozen=True)
class Geometry:
    """How many processes train, and where."""

    processes: int = 1  # on each node: one a GPU
    nodes: int = 1
    min_nodes: int | None = None  # go on with as few as this when nodes are lost; None: with all
    max_restarts: int = 0  # times torchrun starts the processes again before it gives up
    batch: int | None = None  # instances of a step, where known: all processes share them evenly

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
        fit = self.counts(1, self.nodes)
        for name, value in (("nodes", self.nodes), ("min_nodes", fewest)):
            if self.nodes > 1 and value not in fit:
                raise ValueError(
                    f"{name}: expected a number of nodes whose processes, {self.processes} on "
                    f"each, share global_train_batch_size={self.batch} evenly; found {value}. "
                    f"Those that do, up to {self.nodes}: {', '.join(map(str, fit)) or 'none'}"
                )

    def counts(self, least: int, most: int) -> list[int]:
        """The numbers of nodes in a range whose processes share a batch evenly."""
        batch = 0 if self.batch is None else self.batch
        return [n for n in range(least, most + 1) if batch % (n * self.processes) == 0]

    @property
    def fewest(self) -> int:
        """The number of nodes without which nothing is trained."""
        return self.nodes if self.min_nodes is None else self.min_nodes


def launch(config: Path, geometry: Geometry, threads: int | None) -> None:
    """Run the trainer on `config` to its end, each process with `threads` CPU threads (None: 1).

    SIGTERM and SIGUSR1 (what a scheduler sends before a time limit) ask it to save and leave; a
    second one ends it at once.

    Raises:
        Paused: it was asked to stop, by a signal or its time limit, and has saved. Before a SLURM
            job's time is up the job is in the queue again by then.
        ChildProcessError: it ended before its end: why, where the trainer could say it, and
            whether the same command carries on.
        ValueError: more nodes were asked for than there are.
    """
    folder = config.parent
    for name in (STOP, MARKER, CAUSE, FINISHED):
        (folder / name).unlink(missing_ok=True)
    command = [*launcher(geometry, config), "-m", "olmo.train", str(config)]
    # One where none is asked for, as torchrun has it for several processes: bits depend on it, and
    # are not to depend on this machine's cores.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or 1), LAUNCHED: "1"}
    with (
        supervised(command, env=environment, stdin=subprocess.DEVNULL) as process,
        asking_it_to_stop(folder / STOP),
    ):
        status = process.wait()
    see_anew(folder)  # the first process may be on another machine
    if (folder / MARKER).exists():
        # Read first: once it is back in the queue, the job may begin elsewhere and remove it.
        left = sealed.read(folder / MARKER)
        wait_in_the_queue_again(folder, left)
        raise Paused(
            f"training paused: at step {left['step']} by {left['by']}, saved to "
            f"{left['checkpoint']}. Its checkpoints are in {folder}: the same command carries on"
        )
    # Of nodes that were lost meanwhile srun tells at the end, when the others have finished.
    if status and not (geometry.fewest < geometry.nodes and (folder / FINISHED).exists()):
        saved = any(folder.glob("step*"))
        carries_on = f". Its checkpoints are in {folder}: the same command carries on from the last"
        if (folder / CAUSE).exists():
            cause = sealed.read(folder / CAUSE)
            if cause["repeats"]:  # mending it may take other settings
                carries_on = (
                    f". Its checkpoints are in {folder}; a run of other settings is another"
                )
            raise ChildProcessError(f"training ended early: {cause['said']}{carries_on * saved}")
        raise ChildProcessError(
            f"training ended early ({describe_exit(status)}) without an error message: a process "
            f"crashed or was killed; see `dmesg` if memory may have run out{carries_on * saved}"
        )


@contextlib.contextmanager
def asking_it_to_stop(request: Path) -> Iterator[None]:
    """In the block, SIGTERM and SIGUSR1 make the file `request`, at which the trainer looks.

    A file and no signal: torchrun gives processes to which it passes a signal on 30 seconds to
    live, srun ends a step that it is told to terminate, and neither can be told otherwise in all
    versions. The trainer takes the time that its checkpoint takes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(number: int, frame: FrameType | None) -> None:
        if request.exists():
            sys.exit(128 + number)
        request.write_text(f"{signal.Signals(number).name}\n")

    before = {s: signal.signal(s, heard) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    except KeyboardInterrupt:  # the trainer, not in our terminal's group, has a moment to save
        request.write_text(f"{signal.SIGINT.name}\n")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_in_the_queue_again(folder: Path, left: Mapping[str, Any]) -> None:
    """Have SLURM put this job back, of which a time limit is near: a pause, and no failed attempt.

    A job that made no step would do so for ever; it fails, and is submitted again with more time.
    SIGTERM is left alone: who cancels a job does not want it back, who preempts it puts it back.

    Args:
        left: what the trainer wrote when it paused, of which "by" and "step" count.
    """
    job = os.environ.get("SLURM_JOB_ID")
    segments = folder / SEGMENTS
    begun = sealed.load_lines(segments.read_bytes(), segments)[-1]
    if job is None or left["by"] != signal.SIGUSR1.name or left["step"] <= begun["after"]:
        return
    try:
        scontrol("requeue", job)
    except ValueError as refused:  # the cluster does not; the job fails, and is submitted again
        print(f"olmo train: {refused}", file=sys.stderr)


def launcher(geometry: Geometry, config: Path) -> list[str]:
    """The command line up to the module that the processes run."""
    torchrun = [sys.executable, "-m", "olmo.cluster.torchrun"]
    torchrun += ["--nproc-per-node", str(geometry.processes)]
    torchrun += ["--max-restarts", str(geometry.max_restarts)]
    torchrun += ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]  # see olmo.cluster.node
    node = [sys.executable, "-m", "olmo.cluster.node"]
    addresses = allocation(geometry) if geometry.nodes > 1 else []
    count = len(addresses)
    if count < 2:
        # An address, since a machine may not know its own name; torchrun would wait for that.
        return [*node, "", *torchrun, "--standalone", "--local-addr=127.0.0.1"]
    job = os.environ["SLURM_JOB_ID"]
    # One number for all nodes, another for each job and run: two jobs may share a node.
    port = 20_000 + zlib.crc32(f"{job} {config}".encode()) % 10_000
    # torchrun may go on with any number of nodes in a range: only so far down as each would do.
    least = count
    while least - 1 in geometry.counts(geometry.fewest, count):
        least -= 1
    elastic = least < count
    srun = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--overlap"]
    # A launcher that fails ends the others, which would wait for it; unless they may go on.
    srun += ["--no-kill", "--kill-on-bad-exit=0"] if elastic else ["--kill-on-bad-exit=1"]
    if cpus := told("SLURM_CPUS_PER_TASK", "CPUs/Task"):
        srun.append(f"--cpus-per-task={cpus}")  # sbatch's is not inherited since SLURM 22.05
    nodes = f"{least}:{count}" if elastic else str(count)
    torchrun += [f"--nnodes={nodes}", "--rdzv-backend=c10d"]
    torchrun += [f"--rdzv-endpoint={addresses[0]}:{port}", f"--rdzv-id={job}-{port}"]
    return [*srun, *node, ",".join(addresses[:2]), *torchrun]


def allocation(geometry: Geometry) -> list[str]:
    """The addresses of the nodes of this SLURM allocation that are to be used.

    Raises:
        ValueError: there is no allocation, or it is too small.
    """
    asked = f"nodes: {geometry.nodes}"
    nodelist = told("SLURM_JOB_NODELIST", "NodeList")
    if not nodelist:
        raise ValueError(
            f"{asked} needs a SLURM allocation, and this process is in none (SLURM_JOB_ID is "
            "not set). Submit it: snakemake --workflow-profile profiles/slurm <target>; or "
            f"begin with salloc --nodes={geometry.nodes} --ntasks-per-node=1; or set nodes: 1 for "
            "the run in config/config.yaml"
        )
    names = scontrol("show", "hostnames", nodelist).split()
    if len(names) < geometry.fewest:
        raise ValueError(
            f"{asked} needs at least {geometry.fewest} nodes, and the allocation "
            f"{os.environ['SLURM_JOB_ID']} has {len(names)}: {nodelist}. Ask for more with "
            f"--nodes={geometry.nodes}, or set nodes: {len(names)} for the run"
        )
    usable = geometry.counts(geometry.fewest, min(len(names), geometry.nodes))
    # The name of a node need not be one that the network knows; its address is.
    shown = scontrol("--oneliner", "show", "node", ",".join(names))
    known = dict(re.findall(r"^NodeName=(\S+).*?\sNodeAddr=(\S+)", shown, re.MULTILINE))
    return [known.get(name, name) for name in names[: usable[-1]]]


def told(variable: str, field: str) -> str | None:
    """What SLURM tells a job of itself, by its environment or by a field of `scontrol show job`.

    snakemake's executor plugin leaves a job's number in the environment and takes out the rest.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or variable in os.environ:
        return os.environ.get(variable)
    found = re.search(rf"\s{field}=(\S+)", scontrol("--oneliner", "show", "job", job))
    return found[1] if found else None


def scontrol(*words: str) -> str:
    """What SLURM's own tool says; its words where it fails."""
    done = subprocess.run(["scontrol", *words], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"scontrol {' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout
