"""Kill each part of a run at random moments; every next run must end with the same bytes.

    python tests/faults.py --rounds 10                   # all victims, ten moments each
    python tests/faults.py --rounds 1 --victim dolma

A round starts the small chain, or the part of it in which the victim lives, kills one process with
SIGKILL at a random moment of its life, and then looks:

- within 10 s nothing of that run is left, grandchildren included;
- no file at a final name is half-written;
- the next run needs no --unlock, succeeds, and ends with the undisturbed run's final digest.

Victims: snakemake itself; the stage that snakemake started; dolma's process; the launcher; the
only rank; one rank of two.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from project import Project, all_gone, processes

GONE_WITHIN_S = 10.0


@dataclass(frozen=True)
class Victim:
    """Which process of a run dies: by a part of its command line, and how long it lives."""

    name: str
    command: str
    lives_s: float  # about; a moment is drawn from this much of its life
    done_before: str | None  # what is there already when the round begins
    ranks: int = 1


ORDER = "checkpoints/small/global_indices.npy"
VICTIMS = {
    victim.name: victim
    for victim in (
        Victim("snakemake", "-m snakemake", 16.0, None),
        Victim("stage", "olmo tokens", 2.5, "data/small/tokenizer.json"),
        Victim("dolma", "dolma_worker.py", 2.0, "data/small/tokenizer.json"),
        Victim("launcher", "torch.distributed.run", 6.0, ORDER),
        Victim("trainer", "-m olmo.train", 4.0, ORDER),
        Victim("rank", "-m olmo.train", 5.0, ORDER, ranks=2),
    )
}


@dataclass
class Round:
    """How a round went; `complaints` is empty when all was as it must be."""

    victim: str
    after_s: float
    killed: str | None  # the command line; None: the run was over before the moment came
    complaints: list[str]


def new_project(root: Path, victim: Victim) -> Project:
    project = Project(root)
    if victim.ranks > 1:
        project.change("config/config.yaml", runs__small__processes=victim.ranks)
    # Steps slow enough that a moment can fall between them.
    project.change("config/train/small.yaml", max_duration=60, eval_interval=30)
    return project


def find(mark: str, victim: Victim) -> Iterator[int]:
    """The pids of a run that are the victim's; under torchrun, the ranks and not the launcher."""
    for pid, command in processes(mark).items():
        if victim.command in command and (
            victim.name in ("snakemake", "stage", "dolma", "launcher")
            or "torch.distributed.run" not in command
        ):
            yield pid


def disturb(project: Project, victim: Victim, after_s: float) -> Round:
    """Start the chain, kill the victim `after_s` into its life, and see what follows."""
    mark = uuid.uuid4().hex
    snakemake = project.start("checkpoints/small/final", mark=mark)
    killed = None
    while snakemake.poll() is None:
        pids = sorted(find(mark, victim))
        if len(pids) >= (victim.ranks if victim.name == "rank" else 1):
            time.sleep(after_s)
            pid = random.choice(pids)
            command = processes(mark).get(pid)
            if command is not None:
                os.kill(pid, signal.SIGKILL)
                killed = command
                break
            if snakemake.poll() is not None:
                break
        time.sleep(0.02)
    complaints = []
    if killed is not None:
        if victim.name != "snakemake":
            # The run itself ends: its stage has failed. What it leaves is looked at after that.
            try:
                snakemake.wait(60)
            except Exception:
                complaints.append("snakemake hangs after its stage was killed")
        if left := all_gone(mark, GONE_WITHIN_S):
            complaints.append(f"left after {GONE_WITHIN_S:.0f} s: {left}")
            for pid in left:
                os.kill(pid, signal.SIGKILL)
    snakemake.wait(60)
    if broken := project.half_written():
        complaints.append(f"half-written: {broken}")
    return Round(victim.name, after_s, killed, complaints)


def rounds(victim: Victim, count: int, folder: Path) -> Iterator[Round]:
    begun = new_project(folder / "begun", victim)
    if victim.done_before:
        begun.run(victim.done_before)
    undisturbed = begun.copy(folder / "undisturbed")
    undisturbed.run()
    wanted = undisturbed.content()
    for number in range(count):
        project = begun.copy(folder / f"round-{number}")
        # One moment in each of `count` equal parts of the victim's life.
        after_s = victim.lives_s * (number + random.random()) / count
        result = disturb(project, victim, after_s)
        again = project.run(ok=False)
        if again.status:
            result.complaints.append(f"the next run failed:\n{again.output[-3000:]}")
        elif (found := project.content()) != wanted:
            result.complaints.append(f"the next run's digest is {found}, expected {wanted}")
        elif verify := project.olmo("store", "verify").status:
            result.complaints.append(f"the store does not verify: {verify}")
        yield result
        if not result.complaints:
            shutil.rmtree(project.root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="moments for each victim")
    parser.add_argument("--victim", choices=VICTIMS, action="append")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    random.seed(options.seed)
    print(f"seed {options.seed}")
    failed = False
    for name in options.victim or VICTIMS:
        folder = Path(tempfile.mkdtemp(prefix=f"faults-{name}-"))
        for number, result in enumerate(rounds(VICTIMS[name], options.rounds, folder), 1):
            what = "killed" if result.killed else "was over before the moment"
            verdict = "same digest, nothing left" if not result.complaints else "FAILED"
            print(
                f"{name:10} {number:2}: {what} after {result.after_s:5.2f} s: {verdict}", flush=True
            )
            for complaint in result.complaints:
                print(f"    {complaint}")
            failed |= bool(result.complaints)
        if not failed:
            shutil.rmtree(folder)
    sys.exit(failed)


if __name__ == "__main__":
    main()
