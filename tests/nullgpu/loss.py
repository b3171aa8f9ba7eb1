"""The compiled cross-entropy of the model's head, forward and backward: what a call launches.

python loss.py '{"rows": 32768}'
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import nullgpu
import torch

from olmo.model.loss import linear_cross_entropy


def main() -> None:
    rows = json.loads(sys.argv[1])["rows"]
    x = torch.empty(rows, 1024, device="cuda", requires_grad=True)
    weight = torch.empty(50304, 1024, device="cuda", requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.long, device="cuda")

    @torch.compile(fullgraph=True)
    def total(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return linear_cross_entropy(x, weight, labels).total

    total(x, weight, labels).backward()
    x.grad = weight.grad = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "events.txt")
        nullgpu.log(str(path))
        torch.cuda.reset_peak_memory_stats()
        before, counts = torch.cuda.memory_allocated(), nullgpu.Counts()
        total(x, weight, labels).backward()
        found = counts.now() | {"peak_bytes": torch.cuda.max_memory_allocated() - before}
        nullgpu.log(None)
        events = path.read_text().splitlines()
    print(json.dumps({"counts": found, "events": events}))


if __name__ == "__main__":
    main()
