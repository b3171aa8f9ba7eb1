"""Joules that the processor packages use, by the kernel's counters (RAPL, in powercap)."""

import time
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
# More than a package draws, in watts. In a time in which that would fill a counter's range (about
# 262 kJ: 4 minutes) the counter may come round more than once, and nobody sees how often.
MAX_WATTS = 1000


class EnergyMeter:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._began, self._before = time.monotonic(), read_counters()

    def joules(self) -> float | None:
        """So far; None where the kernel does not tell, or its counters came round too often."""
        longest = (time.monotonic() - self._began) * MAX_WATTS * 1e6
        now, total = read_counters(), 0
        if not now or now.keys() != self._before.keys():
            return None
        for meter, (count, size) in now.items():
            if longest >= size:
                return None
            # A counter goes from 0 to `size`, and begins again.
            total += (count - self._before[meter][0]) % (size + 1)
        return total / 1e6


def read_counters() -> dict[str, tuple[int, int]]:
    """Each package's counter and the highest number that it shows, in microjoules."""

    def number(folder: Path, name: str) -> int:
        return int((folder / name).read_text())

    try:
        return {
            folder.name: (number(folder, "energy_uj"), number(folder, "max_energy_range_uj"))
            for folder in POWERCAP.glob("intel-rapl:?")
        }
    except OSError:  # only root may read them, on most systems
        return {}
