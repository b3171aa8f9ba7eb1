"""A disk that fails under each command of the chain: at any write, rename and fsync, in three ways.

    python tests/faults.py --writes          # every call of each command, which takes hours
    python tests/faults.py --writes kinds    # of calls that differ only in a number or digest, one
    python tests/faults.py --writes 5        # five drawn ones of each command and way

disk.c, preloaded, counts the calls that change files of a project and its store. At a drawn call it
kills its process, or the call fails with EIO, or the disk is full from then on. Then:

- a command that was not killed has failed in one sentence, its last line, without a traceback;
- the same command, on a disk that works, ends well, and with the same contents as undisturbed;
- the store verifies, `gc` takes nothing that has a name, and nothing half-written is left.
"""

import functools
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import warm
from project import REPOSITORY, Project, documents, write_source
from servers import slow_web_server

HOW = ("kill", "ENOSPC", "EIO")
ITS_OWN = r"(?<=look-)\w+|(?<=/tmp)\w+|(?<=dolma-)[\w-]+|[0-9a-f]*\d[0-9a-f]*|(?<=/)[a-f]{2}(?=/|$)"
FINAL = "checkpoints/small/final"


def preload() -> None:
    """Start this program again, with disk.c in it and in what it starts."""
    if "DISK_LIBRARY" in os.environ:
        return
    library = Path(tempfile.mkdtemp(prefix="disk-")) / "disk.so"
    source = str(Path(__file__).parent / "disk.c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    # Read when OpenMP is loaded: in forks as in the ranks that a command starts.
    environment = {"LD_PRELOAD": str(library), "DISK_LIBRARY": str(library), "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)


@dataclass(frozen=True)
class Command:
    """One command of the chain, and the project as it is before that runs."""

    name: str
    words: tuple[str, ...]
    before: Project

    def run(
        self, project: Project, how: str = "kill", at: int = 0, fork: bool = True
    ) -> tuple[int, str, list[str]]:
        """Run it, failing at call number `at` (0: at none): (status, what it said, calls)."""
        count, log = (project.root.with_suffix(end) for end in (".count", ".calls"))
        count.write_bytes(bytes(8))
        log.write_text("")
        disk = {"DISK_ROOT": str(project.root), "DISK_COUNT": str(count), "DISK_LOG": str(log)}
        disk |= {"DISK_HOW": how, "DISK_AT": str(at)}
        status, said = olmo(project, self.words, fork, **disk)
        calls = sorted(log.read_text().splitlines(), key=lambda line: int(line.split()[0]))
        return status, said, [call.partition(" ")[2] for call in calls]


def olmo(
    project: Project, words: tuple[str, ...], fork: bool = True, **environment: str
) -> tuple[int, str]:
    """Run `olmo <words>`, in a fork or in a Python of its own: (status, what it said)."""
    module = ["olmo.cli", *words]
    environment = project.environment() | environment
    output = project.root.with_suffix(".out")
    if fork:
        return warm.run(module, project.root, environment, output)
    python = [sys.executable, "-m", *module]
    with output.open("w") as file:
        done = subprocess.run(python, cwd=project.root, env=environment, stdout=file, stderr=file)
    return done.returncode, output.read_text()


def commands(folder: Path) -> Iterator[Command]:
    """Each command of the chain, of a push and a pull, and `gc`, in order."""
    begun = Project(folder / "begun")
    for number in range(3):
        write_source(begun.root / f"web/{number}.json.gz", documents(number))
    with slow_web_server(begun.root / "web", 0.0) as server:
        table = "url\tbytes\tsha256\tlicence\n"
        table += "".join(f"{server}/{n}.json.gz\t\t\tPSF-2.0\n" for n in range(3))
        (begun.root / "sources.tsv").write_text(table)
        begun.change("config/data/small.yaml", sources={"table": "sources.tsv"})
        begun.change("config/train/small.yaml", max_duration=6, eval_interval=6)
        planned = begun.copy(folder / "planned")
        planned.run(FINAL, cores=1)
        found = re.findall(r"Shell command: (?:exec )?olmo (.*)", planned.full_log())
        shell = [shlex.split(line) for line in found]
        assert {"sources", "documents", "tokens", "train"} <= {words[0] for words in shell}
        known = set()
        for number, words in enumerate(shell):
            name = words[0]
            command = Command(name, tuple(words), begun)
            if name not in known and name != "environment":
                yield command
            known.add(name)
            begun = begun.copy(folder / f"after-{number}")
            assert Command(name, tuple(words), begun).run(begun)[0] == 0
    yield Command("push", ("store", "push", "second"), begun)
    begun = begun.copy(folder / "pushed")
    assert begun.olmo("store", "push", "second").status == 0
    for name in ("store", "data", "checkpoints"):
        shutil.rmtree(begun.root / name)
    yield Command("pull", ("store", "pull", "second"), begun)
    begun = begun.copy(folder / "pulled")
    assert begun.olmo("store", "pull", "second").status == 0
    shutil.rmtree(begun.root / "data/small/tokens")
    yield Command("gc", ("store", "gc"), begun)


def contents(project: Project) -> dict[str, str]:
    """What each name of a project and of its second store leads to; files by their text."""
    found = {}
    for place in ("data", "checkpoints", "second"):
        for path in sorted((project.root / place).rglob("*")):
            name = str(path.relative_to(project.root))
            if path.name in ("run", "record.json", "metrics.jsonl", "loss.svg") or path.is_dir():
                continue
            if place == "second" and path.name.startswith("."):  # nobody knows whose draft it is
                continue
            if "/actions/" in name:
                found[name] = "a record"
            elif path.is_symlink():
                found[name] = path.resolve(strict=True).name
            else:
                found[name] = path.read_text(errors="replace")
    return found


@dataclass
class Failure:
    """A call of a command that failed, and what was wrong with what followed."""

    command: str
    how: str
    at: int
    complaints: list[str]


def one(command: Command, wanted: dict[str, str], folder: Path, case: tuple[str, int]) -> Failure:
    """Let a command fail at a call, and see what follows."""
    how, at = case
    project = command.before.copy(folder / f"{command.name}-{how}-{at}")
    complaints = []
    status, said, _ = command.run(project, how, at)
    last = (said.strip().splitlines() or [""])[-1]
    if how != "kill" and status not in (0, 1, 75):
        complaints.append(f"status {status}: {said[-1500:]}")
    # torchrun and the toolkit show their own.
    trace = "Traceback (most" in said and command.name not in ("train", "tokens")
    unforeseen = trace or "a bug in olmo" in said
    if how != "kill" and status and (unforeseen or not last.startswith("olmo ")):
        complaints.append(f"no sentence at the end: {said[-1500:]}")
    if status and how == "kill" and status not in (-9, 137, 1):
        complaints.append(f"status {status}, expected -9: {said[-500:]}")
    status, said, _ = command.run(project)
    if status:
        complaints.append(f"the same command failed: {said[-1500:]}")
    elif (found := contents(project)) != wanted:
        differing = sorted(n for n in found | wanted if found.get(n) != wanted.get(n))
        complaints.append(f"other contents: {differing}")
    for verb in ("verify", "gc", "verify"):
        status, said = olmo(project, ("store", verb))
        if status:
            complaints.append(f"{verb}: {said[-500:]}")
    if drafts := left_over(project):
        complaints.append(f"left after gc: {drafts}")
    if not complaints:
        shutil.rmtree(project.root)
    return Failure(command.name, how, at, complaints)


def left_over(project: Project) -> list[str]:
    """Drafts that nobody will ever finish."""
    places = ("store/actions", "store/links", "store/objects", "store/drafts", "store/unnamed")
    found = [p for place in places for p in (project.root / place).rglob("*") if p.is_file()]
    drafts = [p for p in found if p.name.startswith(".") or "/drafts/" in str(p)]
    drafts += [p for p in found if p.parent.name == "unnamed"]
    for place in ("data", "checkpoints"):
        drafts += [
            p for p in (project.root / place).rglob(".*") if p.name != ".snakemake_timestamp"
        ]
    return [str(path.relative_to(project.root)) for path in drafts]


def chosen(calls: list[str], which: str) -> list[int]:
    """The numbers, from 1, of the calls to fail: "every", "kinds", or how many drawn ones."""
    numbers = range(1, len(calls) + 1)
    if which == "every":
        return list(numbers)
    if which == "kinds":
        kinds = {re.sub(ITS_OWN, "N", call): number for number, call in enumerate(calls, 1)}
        return sorted(kinds.values())
    return sorted(random.sample(numbers, min(int(which), len(calls))))


def sweep(
    folder: Path,
    which: str,
    names: Sequence[str] = (),
    hows: Sequence[str] = HOW,
    processes: int = 1,
) -> Iterator[Failure]:
    """Let each command fail in each way, at calls of the undisturbed one that are `chosen`."""
    warm.import_all(names)
    for command in commands(folder):
        if names and command.name not in names:
            continue
        undisturbed = command.before.copy(folder / f"{command.name}-undisturbed")
        status, said, _ = command.run(undisturbed, fork=False)
        assert status == 0, said
        wanted = contents(undisturbed)
        toolkits = (REPOSITORY / "environments").glob("dolma-*/bin/python")
        with warm.toolkit(max(toolkits, key=os.path.getmtime)):
            forked = command.before.copy(folder / f"{command.name}-forked")
            status, said, calls = command.run(forked)
            assert status == 0 and calls and contents(forked) == wanted, said
            cases = [(how, at) for how in hows for at in chosen(calls, which)]
            fail = functools.partial(one, command, wanted, folder)
            with multiprocessing.get_context("fork").Pool(processes) as pool:
                yield from pool.imap_unordered(fail, cases)
