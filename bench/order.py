"""The cost of ordering many instances: CPU time, and memory beyond that of the imports.

python bench/order.py [--instances 100000000]
"""

import resource
import tempfile
import time
from pathlib import Path

from olmo.bench.script import cpu_time, describe_run, parse_options
from olmo.data.order import global_indices, write_order


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    count = parse_options(__doc__, instances=100_000_000).instances
    imports_mb, cpu_s, began = peak_mb(), cpu_time(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        write_order(global_indices(count, seed=6198), Path(folder) / "global_indices.npy")
    cpu_s, wall_s, peak = cpu_time() - cpu_s, time.monotonic() - began, peak_mb()
    print(describe_run(f"{count:,} instances"))
    print(
        f"{cpu_s:.1f} CPU-s, {wall_s:.1f} s, peak {peak:,.0f} MB, of which imports "
        f"{imports_mb:,.0f}; {(peak - imports_mb) * 2**20 / count:.2f} bytes an instance"
    )


if __name__ == "__main__":
    main()
