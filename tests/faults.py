"""Kill each part of a run at random moments; every next run must end with the same bytes.

    python tests/faults.py --rounds 10                   # all victims, ten moments each
    python tests/faults.py --rounds 1 --victim dolma
    python tests/faults.py --flip                        # change bytes of small files: flips.py
    python tests/faults.py --writes 5                    # fail at writes: failing_disk.py

A round starts the small chain, or the part of it in which the victim lives, kills one process with
SIGKILL at a random moment of its life, and then looks:

- within 10 s nothing of that run is left, grandchildren included;
- no file at a final name is half-written;
- the next run needs no --unlock, succeeds, and ends with the undisturbed run's final digest.

Victims: snakemake itself; a download, a subsample, the stage that snakemake started; dolma's
process; the launcher of two ranks; the only rank; one rank of two.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import failing_disk
from project import Project, all_gone, documents, processes, write_source
from servers import slow_web_server

GONE_WITHIN_S = 10.0
ATTEMPTS = 6  # to kill a victim in a round


@dataclass(frozen=True)
class Victim:
    """Which process of a run dies: by a part of its command line, and how long it lives."""

    name: str
    command: str
    lives_s: float  # about; a moment is drawn from this much of its life
    done_before: str | None  # what is there already when the round begins
    ranks: int = 1
    target: str = "checkpoints/small/final"
    copies: int = 1  # of the text, so that a moment can fall into work with it
    by_http: bool = False  # sources come from a slow server on loopback


ORDER = "checkpoints/small/global_indices.npy"
SOURCES = "data/small/sources/000.tsv"
VICTIMS = {
    victim.name: victim
    for victim in (
        Victim("snakemake", "-m snakemake", 16.0, None),
        Victim("download", "olmo sources", 2.2, None, target=ORDER, copies=20, by_http=True),
        Victim("documents", "olmo documents", 0.8, SOURCES, target=ORDER, copies=20),
        Victim("stage", "olmo tokens", 2.5, "data/small/tokenizer.json"),
        Victim("dolma", "dolma_worker.py", 2.0, "data/small/tokenizer.json"),
        Victim("launcher", "olmo.cluster.torchrun", 6.0, ORDER, ranks=2),
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


def new_project(root: Path, victim: Victim, server: str) -> Project:
    project = Project(root)
    for number in range(3 if victim.copies > 1 else 0):
        texts = documents(number)
        lines = [
            {**text, "id": f"{text['id']}/{n}"} for n in range(victim.copies) for text in texts
        ]
        write_source(root / f"sources/part-{number}.json.gz", lines)
    if victim.by_http:
        table = "url\tbytes\tsha256\tlicence\n"
        table += "".join(f"{server}/part-{n}.json.gz\t\t\tPSF-2.0\n" for n in range(3))
        (root / "sources.tsv").write_text(table)
        project.change("config/data/small.yaml", sources={"table": "sources.tsv"})
    if victim.ranks > 1:
        project.change("config/config.yaml", runs__small__processes=victim.ranks)
    # Steps slow enough that a moment can fall between them.
    project.change("config/train/small.yaml", max_duration=60, eval_interval=30)
    return project


def find(mark: str, victim: Victim) -> Iterator[int]:
    """The pids of a run that are the victim's; under torchrun, the ranks and not the launcher."""
    for pid, command in processes(mark).items():
        if victim.command in command and (
            victim.name not in ("trainer", "rank") or "olmo.cluster.torchrun" not in command
        ):
            yield pid


def disturb(project: Project, victim: Victim, after_s: float) -> Round:
    """Start the chain, kill the victim `after_s` into its life, and see what follows."""
    mark = uuid.uuid4().hex
    snakemake = project.start(victim.target, mark=mark)
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


def content(project: Project, victim: Victim) -> str:
    """Digests of what a victim's run ends with: the checkpoint, or every shard and the order."""
    if victim.target != ORDER:
        return project.content()
    listings = sorted((project.root / "data/small").glob("*/[0-9]*.tsv"))
    order = (project.root / ORDER).resolve().name  # its digest
    return "".join(path.read_text() for path in listings) + order


def rounds(victim: Victim, count: int, folder: Path) -> Iterator[Round]:
    with slow_web_server(folder / "begun/sources") as server:
        yield from rounds_beside(server, victim, count, folder)


def rounds_beside(server: str, victim: Victim, count: int, folder: Path) -> Iterator[Round]:
    begun = new_project(folder / "begun", victim, server)
    if victim.done_before:
        begun.run(victim.done_before)
    undisturbed = begun.copy(folder / "undisturbed")
    undisturbed.run(victim.target)
    wanted = content(undisturbed, victim)
    for number in range(count):
        # One moment in each of `count` equal parts of the victim's life; an earlier one where it
        # lives shorter than that on this machine, since a round that kills nothing shows nothing.
        after_s = victim.lives_s * (number + random.random()) / count
        for attempt in range(ATTEMPTS):
            project = begun.copy(folder / f"round-{number}-{attempt}")
            result = disturb(project, victim, after_s / 2**attempt)
            if result.killed or result.complaints:
                break
            shutil.rmtree(project.root)
        again = project.run(victim.target, ok=False)
        if again.status:
            result.complaints.append(f"the next run failed:\n{again.output[-3000:]}")
        elif (found := content(project, victim)) != wanted:
            result.complaints.append(f"the next run's digest is {found}, expected {wanted}")
        elif verify := project.olmo("store", "verify").status:
            result.complaints.append(f"the store does not verify: {verify}")
        yield result
        if not result.complaints:
            shutil.rmtree(project.root)


def flip() -> bool:
    """Change bytes of each kind of small file; whether any change was not noticed."""
    import flips

    folder = Path(tempfile.mkdtemp(prefix="faults-flip-"))
    project = Project(folder / "project")
    project.run()
    failed = False
    for kind, found in flips.sweep(project):
        print(f"{kind.name:15} {dict(found)}", flush=True)
        failed |= any(found[outcome] for outcome in found if outcome not in flips.FINE)
    shutil.rmtree(folder)
    return failed


def fail_at_writes(which: str, names: Sequence[str], hows: Sequence[str], jobs: int) -> bool:
    """Let each command's writes fail; whether any failure was not made good."""
    folder = Path(tempfile.mkdtemp(prefix="faults-writes-"))
    failed = False
    for failure in failing_disk.sweep(folder, which, names, hows, jobs):
        what = f"{failure.command:10} {failure.how:6} at call {failure.at:4}"
        print(f"{what}: {'FAILED' if failure.complaints else 'made good'}", flush=True)
        for complaint in failure.complaints:
            print(f"    {complaint}")
        failed |= bool(failure.complaints)
    if not failed:
        shutil.rmtree(folder)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="moments for each victim")
    parser.add_argument("--victim", choices=VICTIMS, action="append")
    parser.add_argument("--flip", action="store_true", help="flips.py, and no more")
    parser.add_argument(
        "--writes", nargs="?", const="every", help="failing_disk.py: every, kinds or a number"
    )
    parser.add_argument("--command", action="append", help="of --writes; default: all")
    parser.add_argument("--how", action="append", help="kill, ENOSPC or EIO; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="of --writes: cases at a time")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    if options.writes is not None:
        failing_disk.preload()
    random.seed(options.seed)
    print(f"seed {options.seed}")
    if options.flip:
        sys.exit(flip())
    if options.writes is not None:
        hows = options.how or failing_disk.HOW
        sys.exit(fail_at_writes(options.writes, options.command or (), hows, options.jobs))
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
