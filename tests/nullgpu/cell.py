"""The step of a bench cell, several cells one after the other.

python cell.py '{"cells": [{"shape": "olmo-250m", "compile": "default"}], "layers": 1, "steps": 5}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nullgpu
import torch

from olmo.bench import timing
from olmo.bench.cell import build_workload
from olmo.bench.matrix import Cell, Section, load_section


def steps_of(section: Section, cell: Cell, steps: int) -> dict[str, Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.utils.clear_compilation_metrics()
    workload = build_workload(section, cell)
    found = []
    for number in range(steps):
        ids = workload.ids(number)
        counts = nullgpu.Counts()
        workload.step(number, ids)
        found.append(counts.now())
    return {"steps": found, **workload.facts, **nullgpu.compilations()}


def main() -> None:
    request = json.loads(sys.argv[1])
    timing.fill_weights = lambda model: None
    section = load_section(Path("config/bench/tps.yaml"), "cuda")
    for shape in section.shapes.values():
        shape["n_layers"] = request["layers"]
    asked = [{"precision": "amp_bf16", "microbatch": 2} | cell for cell in request["cells"]]
    cells = [Cell(**cell) for cell in asked]
    print(json.dumps([steps_of(section, cell, request["steps"]) for cell in cells]))


if __name__ == "__main__":
    main()
