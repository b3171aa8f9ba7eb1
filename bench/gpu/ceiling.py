"""The most that this device can do: matrix products at the shapes of our layers, and copies.

Prints a line of JSON each: TFLOP/s of a product in bfloat16 and in 8 bits, TB/s of a copy (bytes
read plus bytes written). The data are random, since zeros take less power and so run faster.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from olmo.bench.timing import time_steps

TOKENS = {"cuda": 32_768, "cpu": 256}
# d_model. The head is computed with as many rows as the chunked loss takes at once.
WIDTHS = {"cuda": (1024, 1536), "cpu": (64,)}
VOCAB_SIZE, CHUNK = 50_304, 8192


def list_products(kind: str) -> list[tuple[str, int, int, int]]:
    """Name, M, N and K of (M, K) @ (K, N)."""
    products = []
    m, head, rows = TOKENS[kind], VOCAB_SIZE, CHUNK
    if kind == "cpu":
        head, rows = 512, 64
    for d in WIDTHS[kind]:
        products += [
            (f"d{d} att_proj", m, 3 * d, d),
            (f"d{d} attn_out", m, d, d),
            (f"d{d} ff_proj", m, 8 * d, d),
            (f"d{d} ff_out", m, d, 4 * d),
            (f"d{d} ff_proj, weight's gradient", 8 * d, d, m),
            (f"d{d} head, {rows} rows", rows, head, d),
            (f"d{d} head, weight's gradient", head, d, rows),
        ]
    side = 8192 if kind == "cuda" else 128
    return [*products, (f"square {side}", side, side, side)]


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    call(), call()
    # On a CPU, where products in bfloat16 and 8 bits may take a second, this is only a rehearsal.
    calls = 20 if device.type == "cuda" else 1
    return statistics.median(time_steps(lambda _: call(), calls, device))


def fp8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor] | None:
    """The 8-bit product of a layer's forward pass; None where this device has none."""
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
    for name, m, n, k in list_products(kind):
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=device, dtype=torch.bfloat16)
        record = {"what": "product", "name": name, "m": m, "n": n, "k": k}
        work = 2 * m * n * k / 1e12
        record["bf16_tflops"] = work / median_seconds(lambda a=a, b=b: a @ b, device)
        fp8 = fp8_product(a, b)
        record["fp8_tflops"] = work / median_seconds(fp8, device) if fp8 else None
        print(json.dumps(record), flush=True)
        del a, b, fp8
    size = 2**32 if kind == "cuda" else 2**24
    x = torch.empty(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    rate = 2 * size / median_seconds(lambda: y.copy_(x), device) / 1e12
    print(json.dumps({"what": "copy", "bytes": 2 * size, "tb_per_s": rate}), flush=True)


if __name__ == "__main__":
    main()
