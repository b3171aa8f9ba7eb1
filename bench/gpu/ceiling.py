"""What this device can do at most: products at the shapes of our layers, and copies.

A line of JSON each: TFLOP/s of a product in bfloat16 and in 8 bits, TB/s of a copy, counting what
is read and what is written. On random data: zeros are faster than any data will be.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

TOKENS = {"cuda": 32_768, "cpu": 256}
# d_model, and by how much an MLP of SwiGLU is wider; the head, with as many rows as the loss takes.
WIDTHS = {"cuda": (1024, 1536), "cpu": (64,)}
VOCABULARY, CHUNK = 50_304, 8192


def shapes(kind: str) -> list[tuple[str, int, int, int]]:
    """Name, M, N and K of (M, K) @ (K, N)."""
    found = []
    m, head, rows = TOKENS[kind], VOCABULARY, CHUNK
    if kind == "cpu":
        head, rows = 512, 64
    for d in WIDTHS[kind]:
        found += [
            (f"d{d} att_proj", m, 3 * d, d),
            (f"d{d} attn_out", m, d, d),
            (f"d{d} ff_proj", m, 8 * d, d),
            (f"d{d} ff_out", m, d, 4 * d),
            (f"d{d} ff_proj, weight's gradient", 8 * d, d, m),
            (f"d{d} head, {rows} rows", rows, head, d),
            (f"d{d} head, weight's gradient", head, d, rows),
        ]
    side = 8192 if kind == "cuda" else 128
    return [*found, (f"square {side}", side, side, side)]


def seconds(call: Callable[[], object], device: torch.device, at_least: float) -> float:
    """The median of many calls."""
    call(), call()
    if device.type != "cuda":
        found = []
        end = time.perf_counter() + at_least
        while not found or time.perf_counter() < end:
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
        return statistics.median(found)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks))


def eight_bits(a: Tensor, b: Tensor) -> Callable[[], Tensor] | None:
    """The product in 8 bits as a layer's forward has it; None where torch has none here."""
    one = torch.ones((), device=a.device)
    a8 = a.to(torch.float8_e4m3fn)
    b8 = b.t().contiguous().to(torch.float8_e4m3fn).t()

    def product() -> Tensor:
        return torch._scaled_mm(
            a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=a.is_cuda
        )

    try:
        product()
    except RuntimeError:
        return None
    return product


def main() -> None:
    kind = json.loads(sys.argv[1])["kind"]
    device = torch.device(kind)
    at_least = 0.02
    for name, m, n, k in shapes(kind):
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=device, dtype=torch.bfloat16)
        record = {"what": "product", "name": name, "m": m, "n": n, "k": k}
        work = 2 * m * n * k / 1e12
        record["bf16_tflops"] = work / seconds(lambda a=a, b=b: a @ b, device, at_least)
        narrow = eight_bits(a, b)
        record["fp8_tflops"] = work / seconds(narrow, device, at_least) if narrow else None
        print(json.dumps(record), flush=True)
        del a, b, narrow
    size = 2**32 if kind == "cuda" else 2**24
    x = torch.empty(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    rate = 2 * size / seconds(lambda: y.copy_(x), device, at_least) / 1e12
    print(json.dumps({"what": "copy", "bytes": 2 * size, "tb_per_s": rate}), flush=True)


if __name__ == "__main__":
    main()
