"""Two processes of `fast` on one data set and one store, beside two copies that share nothing.

    python bench/two.py --environment environments/dolma.json [--files 20] [--rounds 3]

Each process is `olmo tokens --engine fast` on --files files of the Python's standard library, each
with its own ids. `together`: two at once, as snakemake starts them for two batches. `apart`: the
same two, each with its own store and folder. The start-up, the same command on one short document,
is subtracted. Results are medians of interleaved rounds, and the median of the rounds' ratios. On a
loaded machine use the CPU time.
"""

import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from olmo.bench.script import describe_run, parse_options, ratios, wait_for
from olmo.corpus import documents, ingest
from olmo.corpus.stdlib import stdlib
from olmo.corpus.tokenizer import trained_tokenizer

REQUIREMENTS = Path(__file__).parent.parent / "envs" / "dolma.txt"
Cost = tuple[float, float]  # wall seconds, CPU seconds


def main() -> None:
    options = parse_options(
        __doc__, environment=Path, files={"default": 20, "help": "of each process"}, rounds=3
    )
    costs: dict[str, list[Cost]] = {"together": [], "apart": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        words = prepare_store(root, options.files, options.environment)
        for _ in range(options.rounds):
            start = time_batches(root, words, ["short"])
            for name, stores in (("together", [["0", "1"]]), ("apart", [["0"], ["1"]])):
                wall, cpu = time_batches(root, words, *stores)
                costs[name].append((wall - start[0], cpu - 2 * start[1]))
    print(describe_run())
    walls, cpus = ({n: [cost[i] for cost in c] for n, c in costs.items()} for i in (0, 1))
    for name in costs:
        wall, cpu = statistics.median(walls[name]), statistics.median(cpus[name])
        print(f"{name:9} {wall:6.2f} s, {cpu:6.2f} CPU-s")
    speed = [statistics.median(ratios(c["apart"], c["together"])) for c in (walls, cpus)]
    print(f"together is {speed[0]:.2f} times as fast as apart, {speed[1]:.2f} per CPU-second")


def prepare_store(root: Path, files: int, environment: Path) -> list[str]:
    """Make a store with documents in the batches 0, 1 and short; the options of all commands."""
    (root / "sources").mkdir()
    stdlib.build(folder=root / "stdlib", shards=4)
    with mock.patch.dict(os.environ, OLMO_STORE=str(root / "store")):
        for batch in ("0", "1", "short"):
            sources = []
            for number in range(files if batch != "short" else 1):
                path = root / "sources" / f"{batch}-{number}.json.gz"
                source = root / "stdlib" / f"stdlib-{number % 4:02d}.json.gz"
                write_renamed(source, path, f"{batch}-{number}", short=batch == "short")
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


def write_renamed(source: Path, path: Path, name: str, short: bool) -> None:
    """The documents of a file under other ids, so that no shard has the content of another; with
    `short` one document of one word."""
    with gzip.open(source, "rt") as lines, gzip.open(path, "wt", compresslevel=1) as renamed:
        for number, line in enumerate(lines):
            document = json.loads(line) | {"id": f"{name}-{number}"}
            if short:
                document["text"] = "short"
            renamed.write(json.dumps(document) + "\n")
            if short:
                break


def time_batches(root: Path, words: list[str], *stores: list[str]) -> Cost:
    """Tokenize all batches at once, those of one list in one fresh store."""
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
    usages = [wait_for(process) for process in started]
    return time.monotonic() - begin, sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
