"""The account of a compiled step: what it computes and moves, and how long that should take.

    python bench/gpu/account.py [--shape olmo-250m --shape d1536] [--microbatch 16] [--layers N]

Needs a GPU, or the null GPU of the tests (tests/nullgpu/harness.py): the compiler says which
kernels there are and what each reads and writes. Nothing is timed: rates are what --products,
--attention and --bandwidth say, so that a measured step can be held against its parts.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from olmo.bench.cell import prepare
from olmo.bench.matrix import Cell, Section, load

EIGHT_BITS = "products in 8 bits"
GAP_US = 1.5  # from the end of one kernel to the start of the next, where the host is ahead


@dataclass
class Account:
    """Of one step, in all its tokens."""

    tokens: int
    terms: dict[str, list[float]] = field(default_factory=dict)  # TFLOP, GB, kernels

    def add(self, term: str, tflop: float = 0.0, gb: float = 0.0, kernels: int = 0) -> None:
        so_far = self.terms.setdefault(term, [0.0, 0.0, 0])
        so_far[:] = [so_far[0] + tflop, so_far[1] + gb, so_far[2] + kernels]


def account(section: Section, cell: Cell) -> Account:
    """Compile a cell's step, and add up what it consists of."""
    from torch._inductor import config, metrics
    from torch._inductor.compile_fx import inductor_metrics_log

    inductor_metrics_log.setLevel(logging.INFO)  # else the compiler does not count
    inductor_metrics_log.propagate = False
    metrics.reset()
    torch.compiler.reset()
    with config.patch(force_disable_caches=True):
        training = prepare(section, cell)
        training.step(0, training.ids(0))
    cfg = section.train_config(cell).model
    found = Account(training.facts["tokens_per_step"])
    length = cfg.max_sequence_length
    # Causal attention: forward two products, backward five, over half of the pairs.
    pairs = cfg.n_layers * (length + 1) / 2 * found.tokens
    found.add("attention", tflop=7 * 2 * pairs * cfg.d_model / 1e12)
    for node, quarter in metrics.nodes_num_elem:
        gb = 4 * quarter / 1e9
        kernel = str(getattr(getattr(node, "node", None), "python_kernel_name", None) or "")
        if "mm" in kernel:
            term = EIGHT_BITS if "scaled" in kernel else "products"
            found.add(term, tflop=flop_of(node) / 1e12, kernels=1)
        elif "attention" in kernel:
            found.add("attention", gb=gb, kernels=1)
        elif gb:
            term = term_of(node, cfg)
            # Logits are read twice: for the sum of their exponentials, and for their gradient.
            found.add(term, gb=gb * (1.5 if term == "loss" and gb > 0.1 else 1.0), kernels=1)
    weights = training.facts["parameters"]
    masters = section.train_config(cell).master_weights
    # Norms read a gradient; clipping reads and writes it; AdamW reads weight, gradient and two
    # moments, and writes weight and moments.
    found.add("optimizer", gb=(4 + 8 + 28) * weights / 1e9, kernels=8 * cfg.n_layers)
    if masters:  # a gradient in bfloat16 becomes the master's; the weight, the master's
        found.add("casts", gb=(6 + 6) * weights / 1e9, kernels=8 * cfg.n_layers)
    return found


def flop_of(node: Any) -> float:
    """Of a product (m, k) @ (k, n), the first two matrices that go in."""
    sizes = [[int(side) for side in x.get_size()] for x in node.node.inputs]
    (m, k), (_, n) = [size for size in sizes if len(size) == 2][:2]
    return 2.0 * m * k * n


def term_of(node: Any, cfg: Any) -> str:
    """What a kernel of the compiler's belongs to."""
    head = cfg.embedding_size or cfg.vocab_size
    sides = [int(side) for group in node.group[1] for side in _flat(group)]
    operations = {
        str(origin.target)
        for part in node.get_nodes()
        for origin in (part.node.origins if part.node is not None else ())
    }
    if head in sides or any(side % head == 0 and side >= head for side in sides if side):
        return "loss" if "aten.exp.default" in operations else "head's and embedding's gradients"
    if operations and all("convert_element_type" in name for name in operations):
        return "casts"
    return "elementwise"


def _flat(group: Any) -> list[Any]:
    return list(group) if isinstance(group, (tuple, list)) else [group]


def table(found: Account, rates: argparse.Namespace) -> list[str]:
    """Markdown: the terms of a step, the longest first."""
    lines = ["| term | TFLOP | GB | kernels | µs a token | share |", "|---|---|---|---|---|---|"]
    seconds = {}
    for term, (tflop, gb, _) in found.terms.items():
        rate = {"attention": rates.attention, EIGHT_BITS: rates.eight_bits}.get(
            term, rates.products
        )
        moved = 0.0 if term == "attention" else gb / (rates.bandwidth * 1000)
        seconds[term] = tflop / rate + moved
    kernels = sum(n for _, _, n in found.terms.values())
    seconds["launches"] = kernels * GAP_US / 1e6
    whole = sum(seconds.values())
    for term, time in sorted(seconds.items(), key=lambda item: -item[1]):
        tflop, gb, n = found.terms.get(term, (0.0, 0.0, kernels))
        micro = time * 1e6 / found.tokens
        lines.append(
            f"| {term} | {tflop:.2f} | {gb:.1f} | {n:.0f} | {micro:.3f} | {time / whole:.1%} |"
        )
    micro = whole * 1e6 / found.tokens
    lines.append(
        f"| **all** | | | {kernels:.0f} | **{micro:.3f}** | {1e3 / micro:,.0f}k tokens/s |"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--matrix", type=Path, default=Path("config/bench/tps.yaml"))
    parser.add_argument("--shape", action="append")
    parser.add_argument("--switch", action="append")
    parser.add_argument("--microbatch", type=int, default=16)
    parser.add_argument("--layers", type=int, help="fewer, to see it sooner")
    parser.add_argument("--products", type=float, default=660.0, help="TFLOP/s")
    parser.add_argument("--eight-bits", type=float, default=1150.0, help="TFLOP/s")
    parser.add_argument("--fp8", default="none", help="native, for products in 8 bits")
    parser.add_argument("--attention", type=float, default=400.0, help="TFLOP/s")
    parser.add_argument("--bandwidth", type=float, default=3.9, help="TB/s")
    options = parser.parse_args()
    section = load(options.matrix, "cuda")
    for shape in section.shapes.values():
        shape["n_layers"] = options.layers or shape["n_layers"]
    for shape in options.shape or ["olmo-250m", "d1536"]:
        for switch in options.switch or ["none", "master_weights"]:
            how = {"precision": "amp_bf16", "switch": switch, "fp8": options.fp8}
            cell = Cell(shape, "auto", "default", options.microbatch, **how)
            lines = table(account(section, cell), options)
            print(f"\n{cell.name}\n", *lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
