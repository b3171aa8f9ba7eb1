"""Memory and time of converting a large file to documents: parquet, csv or compressed JSON lines.

    python bench/convert.py [--format parquet|csv|jsonl.zst] [--megabytes 1000] [--group-rows 0]

The rows are 4 kB of words at random. --group-rows 0 makes one row group of all rows of a parquet
file. The conversion runs in a process of its own; its peak memory includes the imports.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from olmo.bench.script import describe_run, parse_options

TEXT_BYTES = 4000
CONVERT = """
import sys, time
from pathlib import Path
from olmo.bench.script import cpu_time
from olmo.corpus.formats import converted
from olmo.store.stage import peak_memory_bytes
file = Path(sys.argv[1])
facts = converted.build(files=[file], source=file.with_name("out.gz"), names=[file.name])
print(facts["rows"], cpu_time(), peak_memory_bytes() / 1e6)
"""


def make_texts(count: int) -> Iterator[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(50_000)]
    for _ in range(count):
        yield " ".join(rng.choices(words, k=TEXT_BYTES // 8))


def write(path: Path, count: int, group_rows: int) -> None:
    if path.suffix == ".parquet":
        table = pyarrow.table({"text": list(make_texts(count)), "n": range(count)})
        pyarrow.parquet.write_table(
            table, path, row_group_size=group_rows or count, compression="none"
        )
    elif path.suffix == ".csv":
        with path.open("w") as file:
            file.write("text,n\n")
            file.writelines(f'"{text}",{n}\n' for n, text in enumerate(make_texts(count)))
    else:
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            for text in make_texts(count):
                file.write(json.dumps({"text": text}).encode() + b"\n")


def main() -> None:
    options = parse_options(__doc__, format="parquet", megabytes=1000, group_rows=0)
    count = options.megabytes * 1_000_000 // TEXT_BYTES
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"large.{options.format}"
        write(path, count, options.group_rows)
        print(describe_run(f"pyarrow {pyarrow.__version__}", f"{path.stat().st_size:,} bytes"))
        command = [sys.executable, "-c", CONVERT, str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows, cpu_s, peak = map(float, done.stdout.split())
    print(f"{rows:,.0f} rows of {options.format}: peak {peak:,.0f} MB, {cpu_s:.1f} CPU-s")


if __name__ == "__main__":
    main()
