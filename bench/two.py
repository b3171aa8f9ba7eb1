"""Two processes of `fast` on one data set and one store, beside two copies that share nothing.

    python bench/two.py --environment environments/dolma.json [--files 20] [--rounds 3]

Each process is `olmo tokens --engine fast` on so many files of the Python's own standard library
(in each file, ids of its own). `together`: two of them at once, as snakemake starts them for two
batches. `apart`: the same two, each with a store and a folder of its own. The start-up, the same
command on one short document, is taken off. Rounds are interleaved; what is printed are medians,
and the median of the rounds' ratios. On a loaded machine trust the CPU time.
"""

import argparse
import gzip
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from olmo.corpus import documents, ingest
from olmo.corpus.stdlib import stdlib
from olmo.corpus.tokenizer import trained_tokenizer

REQUIREMENTS = Path(__file__).parent.parent / "envs" / "dolma.txt"
Cost = tuple[float, float]  # seconds of the clock, of the processors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--files", type=int, default=20, help="of each process")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        words = prepare(root, args.files, args.environment)
        costs: dict[str, list[Cost]] = {"together": [], "apart": []}
        for _ in range(args.rounds):
            start = run(root, words, ["tiny"])
            for name, stores in (("together", [["0", "1"]]), ("apart", [["0"], ["1"]])):
                wall, cpu = run(root, words, *stores)
                costs[name].append((wall - start[0], cpu - 2 * start[1]))
    print(f"{platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} processors")
    for name, found in costs.items():
        wall, cpu = (statistics.median(cost[i] for cost in found) for i in (0, 1))
        print(f"{name:9} {wall:6.2f} s, {cpu:6.2f} CPU-s")
    pairs = list(zip(costs["together"], costs["apart"], strict=True))
    speed = [statistics.median(apart[i] / ours[i] for ours, apart in pairs) for i in (0, 1)]
    print(f"together is {speed[0]:.2f} times as fast as apart, {speed[1]:.2f} per CPU-second")


def prepare(root: Path, files: int, environment: Path) -> list[str]:
    """A store with documents in the batches 0, 1 and tiny; the words that all commands share."""
    (root / "sources").mkdir()
    stdlib.build(folder=root / "stdlib", shards=4)
    with mock.patch.dict(os.environ, OLMO_STORE=str(root / "store")):
        for batch in ("0", "1", "tiny"):
            sources = []
            for number in range(files if batch != "tiny" else 1):
                path = root / "sources" / f"{batch}-{number}.json.gz"
                rename(root / "stdlib" / f"stdlib-{number % 4:02d}.json.gz", path, batch, number)
                sources.append(f"{batch}-{number}={path}")
            listing = root / "data" / "sources" / f"{batch}.tsv"
            ingest.sources(listing=listing, sources=sources)
            documents.batch(
                sources=[listing],
                listing=root / "data" / "documents" / f"{batch}.tsv",
                config=documents.EVERY_LINE,
            )
    trained_tokenizer.build(
        documents=[root / "stdlib" / "stdlib-00.json.gz"],
        tokenizer=root / "tokenizer.json",
        vocab_size=16_384,
    )
    words = ["--tokenizer", str(root / "tokenizer.json"), "--requirements", str(REQUIREMENTS)]
    words += ["--environment", os.path.abspath(environment), "--config"]
    words.append('{"engine": "fast", "audit_share": 0}')
    return [*words, "--eos-token-id", "0", "--pad-token-id", "1"]


def rename(given: Path, path: Path, batch: str, number: int) -> None:
    """The documents of a file under other ids, so that none is in the store already."""
    with gzip.open(given, "rt") as lines, gzip.open(path, "wt", compresslevel=1) as renamed:
        for at, line in enumerate(lines):
            document = json.loads(line) | {"id": f"{batch}-{number}-{at}"}
            if batch == "tiny":
                document["text"] = "short"
            renamed.write(json.dumps(document) + "\n")
            if batch == "tiny":
                break


def run(root: Path, words: list[str], *stores: list[str]) -> Cost:
    """All batches at once, those of one list in one fresh store."""
    started = []
    begin = time.monotonic()
    for number, batches in enumerate(stores):
        place = root / f"run-{number}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(root / "store", place / "store", copy_function=os.link)
        for batch in batches:
            command = [sys.executable, "-m", "olmo.cli", "tokens", *words]
            command += ["--documents", str(root / "data" / "documents" / f"{batch}.tsv")]
            command += ["--listing", str(place / "data" / "tokens" / f"{batch}.tsv")]
            environment = {**os.environ, "OLMO_STORE": str(place / "store")}
            started.append(
                subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, cwd=place)
            )
    cpu = 0.0
    for process in started:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{process.args} failed")
        cpu += used.ru_utime + used.ru_stime
    return time.monotonic() - begin, cpu


if __name__ == "__main__":
    main()
