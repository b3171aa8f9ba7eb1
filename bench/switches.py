"""The trainer's switches, each beside the same step without it: CPU time or GPU time of a step.

    python bench/switches.py --shape olmo-6m --microbatch 1 --rounds 7
    python bench/switches.py --shape olmo-250m --microbatch 8 --rounds 20   # on a GPU

Shapes and switches are those of config/bench/tps.yaml, and a step is what `bench_tps` times there;
but here all live in one process and take turns, so that what else the machine does falls on all
alike. Each round's ratio to `base` is taken; shown is their median, the lowest and the highest.
`base` is amp_bf16, eager; compiled switches stand beside it too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from olmo.bench.side import Training, Unavailable

from olmo.bench.cell import prepare
from olmo.bench.matrix import COMPILE_MODES, EAGER, NONE, Cell, load

MATRIX = Path(__file__).parents[1] / "config/bench/tps.yaml"


def turns(training: Training) -> Callable[[int], float]:
    """A step, by its number, which returns its seconds: of the processor, or of the GPU's clock."""
    device = training.device

    def now() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def step(number: int) -> float:
        ids = training.ids(number)
        began = now()
        training.step(number, ids)
        return now() - began

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="olmo-6m")
    parser.add_argument("--microbatch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", nargs="*", choices=COMPILE_MODES, default=[EAGER, "default"])
    parser.add_argument("--switch", nargs="*", help="all of the matrix, by default")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(1)
    section = load(MATRIX, "cuda" if cuda else "cpu")
    base = Cell(options.shape, microbatch=options.microbatch, precision="amp_bf16")
    switches = [NONE, *(section.switches if options.switch is None else options.switch)]
    cells = [replace(base, compile=mode, switch=s) for mode in options.compile for s in switches]
    steps: dict[Cell, Callable[[int], float]] = {}
    for cell in dict.fromkeys([base, *cells]):
        section.check(cell)
        try:
            step = turns(prepare(section, cell))
        except Unavailable as error:
            print(f"{cell.name}: cannot be had: {error}", flush=True)
            continue
        for number in range(section.warmup):  # compiles, allocates
            step(number)
        steps[cell] = step
    numbers = range(section.warmup, section.warmup + options.rounds)
    rounds = [{cell: step(number) for cell, step in steps.items()} for number in numbers]
    where = torch.cuda.get_device_name() if cuda else "one thread, CPU time"
    print(f"{options.shape}, microbatch {options.microbatch}, {where}, torch {torch.__version__}")
    for cell in steps:
        seconds = statistics.median(times[cell] for times in rounds)
        ratios = sorted(times[cell] / times[base] for times in rounds)
        middle = statistics.median(ratios)
        print(
            f"{cell.compile}, {cell.switch}: {seconds:.3f} s, {middle:.2f} of base "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
