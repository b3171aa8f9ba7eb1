"""One line in ten: ours beside bare decompression and beside `zcat | awk | gzip`.

    python bench/subsample.py [--source FILE.gz | --copies 20] [--rounds 5]

The text is the Python's standard library, --copies times with other ids. Each program runs in a
process of its own; CPU seconds are medians of interleaved rounds. Between bare decompression and
ours are ours' parts: finding the lines, writing the kept ones, and checking them. Together they are
the least that a compressed and checked output can cost.
"""

import gzip
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from olmo.bench.script import describe_run, measure_interleaved, medians, parse_options
from olmo.io import gz

OURS = """
import isal.igzip, msgspec, polars  # not timed: a process imports them once for many files
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
from olmo.io import gz
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
    options = parse_options(
        __doc__, source={"type": Path, "help": "JSON lines of your own, gz"}, copies=20, rounds=5
    )
    programs = {
        "bare": BARE,
        "+ lines": PARTS.replace("{body}", "pass"),
        "+ writing": PARTS.replace("{body}", "kept.write(line)"),
        "+ checks": PARTS.replace("{body}", "parse_document(line); kept.write(line)"),
        "ours": OURS,
        "seed": SEED,
    }
    with tempfile.TemporaryDirectory() as folder:
        source = options.source or write_source(Path(folder) / "source.json.gz", options.copies)
        megabytes = gz.verify_checksum(source) / 1e6

        def run(name: str) -> float:
            """CPU seconds."""
            who = "CHILDREN" if name == "seed" else "SELF"
            text = (programs[name] + AFTER).format(source=source, out=Path(folder, name), who=who)
            return float(subprocess.check_output([sys.executable, "-c", text]))

        runs = {name: lambda name=name: run(name) for name in programs}
        cpu = medians(measure_interleaved(options.rounds, runs))
        ours, seed = (gzip.decompress(Path(folder, name).read_bytes()) for name in ("ours", "seed"))
        assert ours == seed, "expected the same lines from ours and from zcat | awk | gzip"
    print(describe_run())
    print(f"{megabytes:,.0f} MB of lines, one in ten kept; output equal to the seed's")
    for name, seconds in cpu.items():
        print(f"{name:9} {seconds:7.3f} CPU-s {megabytes / seconds:8,.0f} MB/CPU-s")
    bare, seed_ratio = (cpu[name] / cpu["ours"] for name in ("bare", "seed"))
    print(f"ours / bare {bare:.2f}, ours / seed {seed_ratio:.2f}")


def write_source(path: Path, copies: int) -> Path:
    """The standard library's documents in random order, `copies` times."""
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
