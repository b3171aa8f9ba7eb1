"""The time that the store adds to an action: `uv run python bench/store.py`.

A stage that writes a few bytes runs for many actions in a fresh store, then every action is found
in it. Hashing is timed on a large file.
"""

import logging
import os
import statistics
import tempfile
from pathlib import Path

import torch

from olmo.bench.timing import time_steps
from olmo.store.stage import Facts, Input, Output, stage
from olmo.store.store import hash_file

ACTIONS, LARGE = 200, 2**28


@stage(version=1)
def write_number(source: Input, output: Output, number: int = 0) -> Facts:
    """Write a number."""
    output.write_text(str(number))
    return {}


def main() -> None:
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        logging.disable(logging.INFO)  # the lines of the actions
        source, large = Path("source"), Path("large")
        source.write_text("x")
        for what in ("run", "found"):
            seconds = time_steps(
                lambda i: write_number(source=source, output=Path(f"names/{i}"), number=i),
                ACTIONS,
                cpu,
            )
            print(
                f"{what}: median {statistics.median(seconds) * 1000:.1f} ms, "
                f"slowest of {ACTIONS} {max(seconds) * 1000:.1f} ms"
            )
        large.write_bytes(os.urandom(LARGE))
        (seconds,) = time_steps(lambda _: hash_file(large), 1, cpu)
        print(f"hashing: {LARGE / seconds / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()
