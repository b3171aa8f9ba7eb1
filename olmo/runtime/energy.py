"""The energy that the processor packages use, by the kernel's RAPL counters (powercap)."""

import time
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
# Above the power of any package. In a time in which this power would fill a counter's range (about
# 262 kJ: 4 minutes), the counter may overflow more than once, which cannot be detected.
MAX_WATTS = 1000


class EnergyMeter:
    """Measures from its construction on."""

    def __init__(self) -> None:
        self._began, self._before = time.monotonic(), read_counters()

    def joules(self) -> float | None:
        """Energy so far, in joules; None without counters, or if they may have overflowed twice."""
        longest = (time.monotonic() - self._began) * MAX_WATTS * 1e6
        now, total = read_counters(), 0
        if not now or now.keys() != self._before.keys():
            return None
        for meter, (count, size) in now.items():
            if longest >= size:
                return None
            # A counter goes from 0 to `size`, then from 0 again.
            total += (count - self._before[meter][0]) % (size + 1)
        return total / 1e6


def read_counters() -> dict[str, tuple[int, int]]:
    """Each package's counter and its maximum, in microjoules; {} if they are not readable."""

    def number(folder: Path, name: str) -> int:
        return int((folder / name).read_text())

    try:
        return {
            folder.name: (number(folder, "energy_uj"), number(folder, "max_energy_range_uj"))
            for folder in POWERCAP.glob("intel-rapl:?")
        }
    except OSError:  # on most systems only root may read them
        return {}
