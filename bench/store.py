"""What the store costs an action beyond its work: `uv run python bench/store.py`.

A stage that writes a few bytes is run for many actions in a fresh store: run, then found. The
time of an empty call is what the store adds; hashing is apart, on a large file.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

from olmo.store.stage import Facts, Input, Output, stage
from olmo.store.store import hash_file

ACTIONS = 200


@stage(version=1)
def copy(source: Input, copied: Output, number: int = 0) -> Facts:
    """Write a number."""
    copied.write_text(str(number))
    return {}


def timed(paths: list[Path], source: Path) -> list[float]:
    times = []
    for number, path in enumerate(paths, 1):
        begin = time.perf_counter()
        copy(source=source, copied=path, number=number)
        times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["OLMO_LOG"] = os.devnull
        source = Path("source")
        source.write_text("x")
        paths = [Path(f"names/{number}") for number in range(ACTIONS)]
        for what, times in (("run", timed(paths, source)), ("found", timed(paths, source))):
            print(
                f"{what}: median {statistics.median(times) * 1000:.1f} ms, "
                f"slowest of {ACTIONS} {max(times) * 1000:.1f} ms"
            )
        large = Path("large")
        large.write_bytes(os.urandom(2**28))
        begin = time.perf_counter()
        hash_file(large)
        print(f"hashing: {2**28 / (time.perf_counter() - begin) / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()
