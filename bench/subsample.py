"""One line in ten: ours beside bare decompression and beside the seed's `zcat | awk | gzip`.

    python bench/subsample.py [--source FILE.gz | --copies 20] [--rounds 5]

Text is the Python's own standard library, with other ids, so many times over. Every round runs
each program once, in a process of its own; CPU seconds are medians over the rounds. Between bare
decompression and ours stand its parts: finding the lines, writing the kept ones, and looking into
them. Together they are the least that a compressed and checked output can cost.
"""

import argparse
import gzip
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from olmo.io import gz

OURS = """
import isal.igzip, msgspec, polars  # as every process of a batch has them already
from pathlib import Path
from olmo.corpus.documents import DocumentsSection, documents
import resource
before = resource.getrusage(resource.RUSAGE_SELF)
documents.build(source=Path(r"{source}"), documents=Path(r"{out}"), heldout=Path(r"{out}.h"),
                table=Path(r"{out}.t"), name="x", config=DocumentsSection(keep_one_in=10))
"""
BARE = """
from isal import igzip
import resource
before = resource.getrusage(resource.RUSAGE_SELF)
with igzip.open(r"{source}") as file:
    while file.read(1 << 20):
        pass
"""
PARTS = """
import isal.igzip, msgspec
from itertools import islice
from pathlib import Path
from olmo.data import gz
from olmo.corpus.documents import parse_document
import resource
before = resource.getrusage(resource.RUSAGE_SELF)
with gz.reading(Path(r"{source}")) as lines, gz.writing(Path(r"{out}")) as kept:
    for line in islice(lines, 0, None, 10):
        {body}
"""
SEED = """
import subprocess, resource
before = resource.getrusage(resource.RUSAGE_CHILDREN)
subprocess.run("zcat '{source}' | awk 'NR%10==1' | gzip > '{out}'", shell=True, check=True)
"""
AFTER = """
after = resource.getrusage(resource.RUSAGE_{who})
print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="JSON lines of your own, gz")
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = args.source or write_source(Path(folder) / "source.json.gz", args.copies)
        megabytes = gz.verify_checksum(source) / 1e6
        programs = {
            "bare": (BARE, "SELF"),
            "+ lines": (PARTS.replace("{body}", "pass"), "SELF"),
            "+ writing": (PARTS.replace("{body}", "kept.write(line)"), "SELF"),
            "+ checks": (PARTS.replace("{body}", "parse(line); kept.write(line)"), "SELF"),
            "ours": (OURS, "SELF"),
            "seed": (SEED, "CHILDREN"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(args.rounds):
            for name, (program, who) in programs.items():
                text = (program + AFTER).format(source=source, out=Path(folder) / name, who=who)
                done = subprocess.run([sys.executable, "-c", text], check=True, stdout=-1)
                seconds[name].append(float(done.stdout))
        ours, seed = (
            gzip.decompress((Path(folder) / name).read_bytes()) for name in ("ours", "seed")
        )
        assert ours == seed, "expected the seed's lines"
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print(f"{megabytes:,.0f} MB of lines, one in ten kept; output equal to the seed's")
    cpu = {name: statistics.median(times) for name, times in seconds.items()}
    for name, time in cpu.items():
        print(f"{name:9} {time:7.3f} CPU-s {megabytes / time:8,.0f} MB/CPU-s")
    print(
        f"ours / bare {cpu['bare'] / cpu['ours']:.2f}, ours / seed {cpu['seed'] / cpu['ours']:.2f}"
    )


def write_source(path: Path, copies: int) -> Path:
    """The standard library's documents in random order, so many times."""
    from olmo.corpus.stdlib import stdlib

    folder = path.parent / "stdlib"
    stdlib.build(folder=folder, shards=1)
    lines = gzip.decompress((folder / "stdlib-00.json.gz").read_bytes()).splitlines()
    documents = [json.loads(line) for line in lines]
    with gzip.open(path, "wb", 6) as file:
        for copy in range(copies):
            random.Random(copy).shuffle(documents)
            for document in documents:
                line = json.dumps(document | {"id": f"{copy}/{document['id']}"}).encode() + b"\n"
                file.write(line)
    return path


if __name__ == "__main__":
    main()
