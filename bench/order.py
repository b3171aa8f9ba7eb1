"""What the order of many instances costs: CPU time, and memory beyond that of the imports.

python bench/order.py [--instances 100000000]
"""

import argparse
import platform
import resource
import tempfile
import time
from pathlib import Path

from olmo.data import order


def used() -> tuple[float, float]:
    """CPU seconds and peak MB of this process."""
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_utime + found.ru_stime, found.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=100_000_000)
    count = parser.parse_args().instances
    before, imports = used()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        order.write_order(
            order.global_indices(count, seed=6198), Path(folder) / "global_indices.npy"
        )
    wall = time.monotonic() - began
    after, peak = used()
    print(f"{platform.machine()}, Python {platform.python_version()}, {count:,} instances")
    print(
        f"{after - before:.1f} CPU-s, {wall:.1f} s, peak {peak:,.0f} MB, of which imports "
        f"{imports:,.0f}; {(peak - imports) * 2**20 / count:.2f} bytes an instance"
    )


if __name__ == "__main__":
    main()
