"""A small project in a folder of its own, run by the real Snakefile: what pipeline tests stand on.

Its recipe takes seconds: three files of text from the standard library, a small tokenizer, a
model of a few thousand parameters. Everything else is the repository's own.
"""

import atexit
import base64
import contextlib
import gzip
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from olmo.inspect.run import TrainedRun

REPOSITORY = Path(__file__).parent.parent
STARTED: list["subprocess.Popen[str]"] = []  # by the test that runs now
MARK = "OLMO_TEST_RUN"  # in the environment of every process of a run, so that it can be found

TRAIN = {
    "seed": 6198,
    "model": {
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 2,
        "mlp_ratio": 4,
        "weight_tying": True,
        "rope": True,
        "flash_attention": False,
        "include_bias": False,
        "layer_norm_type": "default",
        "layer_norm_with_affine": False,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "max_sequence_length": 64,
        "vocab_size": 512,
        "embedding_size": 512,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "init_fn": "normal",
        "init_std": 0.02,
    },
    "optimizer": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1},
    "scheduler": {"name": "cosine_with_warmup", "t_warmup": 4, "alpha_f": 0.1},
    "tokenizer": {"identifier": "tokenizer.json"},
    "max_duration": 24,
    "global_train_batch_size": 8,
    "device_train_microbatch_size": 2,
    "device_eval_batch_size": 8,
    "precision": "fp32",
    "distributed_strategy": "ddp",
    "max_grad_norm": 1.0,
    "eval_interval": 12,
    "save_interval_unsharded": 3,
    "save_num_unsharded_checkpoints_to_keep": 2,
    "console_log_interval": 1,
    "intra_op_threads": 1,
}


@dataclass
class Outcome:
    """What a run of snakemake said, and which stages' work ran or was found in the store.

    Jobs tell that in their logs, since the terminal shows it in sums; a command tells it itself.
    """

    status: int
    output: str
    logs: str = ""
    ran: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for stage, verb in re.findall(
            r"^(\w+): (runs|found in the store)", self.logs or self.output, re.M
        ):
            (self.ran if verb == "runs" else self.found)[stage] += 1


class Project:
    """A folder with the repository's rules and a small recipe."""

    warm: Path | None = None  # the folder with commands that are forks (warm_commands.py)

    def __init__(self, root: Path, store: Path | None = None):
        self.root, self.store = root, store or root / "store"
        self.machine: list[str] = []  # words that run a command on another machine
        self.began = 0.0  # when snakemake was last started
        if root.exists():  # a copy of another project
            return
        for name in ("rules", "profiles", "envs"):
            shutil.copytree(REPOSITORY / name, root / name)
        shutil.copy(REPOSITORY / "Snakefile", root)
        # The toolkit's environment is built once, beside the repository's own.
        (REPOSITORY / "environments").mkdir(exist_ok=True)
        (root / "environments").symlink_to(REPOSITORY / "environments")
        self.write(
            "config/config.yaml",
            {
                "shards_per_job": 2,
                "runs": {"small": {"train": "config/train/small.yaml", "dataset": "small"}},
            },
        )
        self.write("config/train/small.yaml", TRAIN)
        self.write(
            "config/data/small.yaml",
            {
                "sources": {"files": ["sources/*.json.gz"]},
                "documents": {"keep_one_in": 2, "heldout_share": 0.1},
                "tokenizer": {"train_vocab_size": 512, "eos_token_id": 0, "pad_token_id": 1},
            },
        )
        for number in range(3):
            write_source(root / f"sources/part-{number}.json.gz", documents(number))

    def write(self, name: str, content: dict) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    def read(self, name: str) -> dict:
        content: dict = yaml.safe_load((self.root / name).read_text())
        return content

    def change(self, name: str, **values: object) -> None:
        """Set `a__b=value` in a YAML file."""
        content = self.read(name)
        for place, value in values.items():
            *path, last = place.split("__")
            inner = content
            for word in path:
                inner = inner[word]
            inner[last] = value
        self.write(name, content)

    def copy(self, root: Path) -> "Project":
        """The same project in another folder, its store and all."""
        shutil.copytree(self.root, root, symlinks=True)
        return Project(root)

    def use_given_tokenizer(self, path: Path) -> None:
        shutil.copy(path, self.root / "tokenizer.json")
        self.change(
            "config/data/small.yaml",
            tokenizer={"file": "tokenizer.json", "eos_token_id": 0, "pad_token_id": 1},
        )

    # --- running ----------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """What each of the project's processes finds."""
        found = {**os.environ, "OLMO_STORE": str(self.store), "PYTHONPATH": str(REPOSITORY)}
        found.pop("OLMO_SUPERVISOR", None)
        if self.warm:  # snakemake has its jobs find the commands of its own Python first
            found["BASH_ENV"] = str(self.warm / "path")
        return found

    def command(self, name: str) -> list[str]:
        """The words that run snakemake or olmo."""
        if self.warm:
            return [str(self.warm / name)]
        return [sys.executable, "-m", {"olmo": "olmo.cli"}.get(name, name)]

    def start(self, *words: str, cores: int = 2, mark: str = "") -> "subprocess.Popen[str]":
        """Start snakemake; its output goes to `output.txt`."""
        if mark or self.machine:  # forks have neither the mark nor the machine
            self.warm = None
        environment = {**self.environment(), MARK: mark}
        self.began = time.time()
        with (self.root / "output.txt").open("w") as output:
            process = subprocess.Popen(
                [*self.machine, *self.command("snakemake"), *words, "--cores", str(cores)],
                cwd=self.root,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        STARTED.append(process)
        return process

    def run(self, *words: str, cores: int = 2, ok: bool = True, timeout: float = 300) -> Outcome:
        """Run snakemake to its end; with `ok`, it must succeed."""
        process = self.start(*(words or ("checkpoints/small/final",)), cores=cores)
        status = process.wait(timeout)
        outcome = self.outcome(status)
        if ok and status:
            raise AssertionError(outcome.output[-6000:])
        return outcome

    def outcome(self, status: int = 0) -> Outcome:
        """What snakemake, and its jobs in their logs, said since it was started."""
        logs = [path for path in self.root.glob("logs/**/*.log") if is_since(path, self.began)]
        said = (self.root / "output.txt").read_text()
        return Outcome(status, said, "\n".join(path.read_text() for path in sorted(logs)))

    def full_log(self) -> str:
        """What snakemake wrote to its own log when it ran last: shell commands, reasons."""
        return max(self.root.glob(".snakemake/log/*"), key=os.path.getmtime).read_text()

    def olmo(self, *words: str) -> Outcome:
        done = subprocess.run(
            [*self.command("olmo"), *words],
            cwd=self.root,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Outcome(done.returncode, done.stdout)

    # --- what is there ----------------------------------------------------------------------

    @property
    def final(self) -> Path:
        return self.root / "checkpoints/small/final"

    def content(self) -> str:
        """The digest of the final checkpoint: config, model, optimizer, train state."""
        record = json.loads((self.final / "record.json").read_text())
        digest: str = record["content"]
        return digest

    def segments(self) -> list[dict]:
        """Each time that the run was begun or taken up, and on what."""
        record = json.loads((self.final / "record.json").read_text())
        found: list[dict] = record["facts"]["segments"]
        return found

    @property
    def attempt(self) -> Path:
        """What a training run has written so far."""
        return self.root / "checkpoints/small/run"

    def steps(self) -> int:
        """How many steps have been trained so far."""
        metrics = self.attempt / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.final / "metrics.jsonl").open()]

    def half_written(self) -> list[Path]:
        """Files at final names that are no links into the store, and drafts left beside them."""
        found = []
        for folder in ("data", "checkpoints"):
            for path in (self.root / folder).rglob("*"):
                listing = path.suffix in (".tsv", ".log") and not path.is_symlink()
                link = path.is_symlink() and path.exists()
                if not (path.is_dir() or listing or link or path.name == ".snakemake_timestamp"):
                    found.append(path)
        return found


def documents(number: int, count: int = 160) -> list[dict]:
    """Documents of real text: module after module of the standard library, in paragraphs."""
    import sysconfig

    modules = ["argparse", "ast", "asyncio/base_events", "datetime", "decimal", "inspect"]
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for module in modules[2 * number : 2 * number + 2]:
        path = root / f"{module}.py"
        path = path if path.stat().st_size > 10_000 else root / f"_py{module}.py"
        texts += [t for t in path.read_text().split("\n\n") if len(t) > 40]
    return [
        {"id": f"{number}-{index}", "text": text, "source": "stdlib"}
        for index, text in enumerate(texts[:count])
    ]


def write_source(path: Path, lines: list[dict] | list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        for line in lines:
            file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")


def read_source(path: Path) -> list[dict]:
    with gzip.open(path, "rb") as file:
        return [json.loads(line) for line in file]


@atexit.register
def end_what_was_started() -> None:
    """End every snakemake that a test has left, since it failed or was broken off."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_since(path: Path, began: float) -> bool:
    return path.stat().st_mtime >= began - 0.05  # the clock of file times is a coarse one


def page_text(page: Path) -> str:
    """The text of one of `olmo report`'s pages, and that of its data, without its programs."""
    text = page.read_text()
    data = re.search(r'id="data">([^<]*)<', text)
    assert data
    return text[: data.start()] + gzip.decompress(base64.b64decode(data[1])).decode()


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition; a limit that is passed is an error."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.05)


def run_in_terminal(words: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What a command writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=environment | {"TERM": "xterm", "COLUMNS": "80"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # all processes have closed it
        while part := os.read(ours, 4096):
            said += part
    os.close(ours)
    assert process.wait(60) == 0, said.decode()
    return said.decode()


# --- processes of a run ---------------------------------------------------------------------


def when_seen(run: "TrainedRun") -> dict[tuple[str, int], set[tuple[int, int, int]]]:
    """For each document that a run saw, by source and line: (step, position, index) each time.

    Found by going through all steps, which `olmo seen` does the other way round.
    """
    from olmo.inspect.documents import find_token_shards
    from olmo.store.stage import current_store

    known = find_token_shards(current_store())
    saw: dict[tuple[str, int], set[tuple[int, int, int]]] = {}
    for step in range(1, (run.steps or 0) + 1):
        for instance in run.instances(step):
            shard = known[Path(instance.path).name]
            for document in shard.documents(instance.start, instance.start + run.sequence_length):
                times = saw.setdefault((document.source, document.line), set())
                times.add((step, instance.position, instance.index))
    return saw


def processes(mark: str) -> dict[int, str]:
    """pid → command line of every living process that carries the mark."""
    found = {}
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            if (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            found[int(folder.name)] = command.strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def all_gone(mark: str, within: float) -> dict[int, str]:
    """What is left of a run after so many seconds; {} as soon as nothing is."""
    end = time.monotonic() + within
    while (left := processes(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    return left
