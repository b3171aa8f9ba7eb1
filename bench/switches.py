"""A step with each of the trainer's switches beside the same step without: CPU time or GPU time.

    python bench/switches.py --shape olmo-6m --microbatch 1 --rounds 7
    python bench/switches.py --shape olmo-250m --microbatch 8 --rounds 20   # on a GPU

Shapes, switches and steps are those of config/bench/tps.yaml, but all cells are in one process and
take turns. The result is the median, lowest and highest of the rounds' ratios to `base`: amp_bf16,
eager, without a switch.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from olmo.bench.cell import build_workload
from olmo.bench.matrix import COMPILE_MODES, EAGER, NONE, Cell, load_section
from olmo.bench.script import describe_run, measure_interleaved, parse_options, ratios
from olmo.bench.timing import Unavailable, Workload, time_steps

MATRIX = Path(__file__).parents[1] / "config/bench/tps.yaml"


def step_cost(workload: Workload, numbers: list[int]) -> float:
    """Seconds of the next step: of CPU time, or of the GPU's clock."""
    number, ids = len(numbers), workload.ids(len(numbers))
    numbers.append(number)
    cpu = time.process_time()
    (seconds,) = time_steps(lambda _: workload.step(number, ids), 1, workload.device)
    return seconds if workload.device.type == "cuda" else time.process_time() - cpu


def main() -> None:
    options = parse_options(
        __doc__,
        shape="olmo-6m",
        microbatch=1,
        rounds=7,
        compile={"nargs": "*", "choices": COMPILE_MODES, "default": [EAGER, "default"]},
        switch={"nargs": "*", "help": "default: all of the matrix"},
    )
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(1)
    section = load_section(MATRIX, "cuda" if cuda else "cpu")
    base = Cell(options.shape, microbatch=options.microbatch, precision="amp_bf16")
    switches = [NONE, *(section.switches if options.switch is None else options.switch)]
    cells = [replace(base, compile=mode, switch=s) for mode in options.compile for s in switches]
    steps = {}
    for cell in dict.fromkeys([base, *cells]):
        section.validate(cell)
        try:
            step = functools.partial(step_cost, build_workload(section, cell), [])
        except Unavailable as error:
            print(f"{cell.name} is not available: {error}", flush=True)
            continue
        for _ in range(section.warmup):  # compiles, allocates
            step()
        steps[cell.name] = step
    costs = measure_interleaved(options.rounds, steps)
    device = torch.cuda.get_device_name() if cuda else "one thread, CPU time"
    shape = f"{options.shape}, microbatch {options.microbatch}"
    print(describe_run(f"torch {torch.__version__}", device, shape))
    for name, seconds in costs.items():
        of_base = ratios(seconds, costs[base.name])
        print(
            f"{name}: {statistics.median(seconds):.3f} s, {statistics.median(of_base):.2f} of base "
            f"({of_base[0]:.2f} to {of_base[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
