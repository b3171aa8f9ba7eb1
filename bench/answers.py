"""How long commands take to answer, in a finished project: `uv run python bench/answers.py`.

    cd <project> && python <repository>/bench/answers.py --olmo <before>/bin/olmo <after>/bin/olmo

Each command runs in turn with each `olmo`, round after round. The table has the medians: seconds of
CPU, which say more than wall time on a machine that does other work, and seconds of wall time.
"""

import argparse
import os
import statistics
import subprocess
import time
from pathlib import Path

RUN, TUNED = "olmo-tiny", "olmo-tiny-tulu"
COMMANDS = (
    "--help",
    "runs",
    "check",
    f"diff {RUN} {TUNED}",
    f"store trace checkpoints/{RUN}/final",
    f"store why checkpoints/{RUN}/final",
    f"inspect --run {RUN} --step 5",
    f"seen --run {RUN} --text dedent",
    f"generate {RUN} --prompt hello --tokens 1",
    f"generate {RUN}-misspelt --prompt hello",
)


def measure(olmo: str, command: str) -> tuple[float, float]:
    """Seconds of CPU and of wall time of one call."""
    start = time.monotonic()
    process = subprocess.Popen(
        [olmo, *command.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, _, usage = os.wait4(process.pid, 0)
    return usage.ru_utime + usage.ru_stime, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--olmo", nargs="*", default=["olmo"], help="commands to compare")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not Path("checkpoints", TUNED, "final").exists():
        raise SystemExit(f"expected a finished {TUNED} in {Path.cwd()}; run it: README.md")
    print(f"{'command':45}" + "  ".join(f"{'CPU s':>6} {'wall s':>6}" for _ in options.olmo))
    for command in COMMANDS:
        rounds = [[measure(olmo, command) for olmo in options.olmo] for _ in range(options.rounds)]
        medians = [
            [statistics.median(kind) for kind in zip(*times, strict=True)]
            for times in zip(*rounds, strict=True)
        ]
        print(f"{command:45}" + "  ".join(f"{cpu:6.2f} {wall:6.2f}" for cpu, wall in medians))


if __name__ == "__main__":
    main()
