"""Predicts the time of a compiled step from what it computes and moves.

    python bench/gpu/account.py [--shape olmo-250m --shape d1536] [--microbatch 16] [--layers N]

Needs a GPU, or the null GPU of the tests (tests/nullgpu/harness.py): the compiler lists its kernels
with what each reads and writes. Nothing is timed: --products, --attention and --bandwidth are the
rates, so that a measured step can be compared with its parts.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from olmo.bench.cell import build_workload
from olmo.bench.matrix import Cell, Section, load_section
from olmo.bench.script import parse_options
from olmo.bench.table import markdown_table

EIGHT_BITS = "products in 8 bits"
GAP_US = 1.5  # between two kernels, where the host has queued the next


@dataclass
class Account:
    """What one step, over all its tokens, consists of."""

    tokens: int
    terms: dict[str, list[float]] = field(default_factory=dict)  # TFLOP, GB, kernels

    def add(self, term: str, tflop: float = 0.0, gb: float = 0.0, kernels: int = 0) -> None:
        total = self.terms.setdefault(term, [0.0, 0.0, 0])
        total[:] = [total[0] + tflop, total[1] + gb, total[2] + kernels]


def count_step(section: Section, cell: Cell) -> Account:
    """Compile a cell's step, and count its operations, bytes and kernels."""
    from torch._inductor import config, metrics
    from torch._inductor.compile_fx import inductor_metrics_log

    inductor_metrics_log.setLevel(logging.INFO)  # the compiler counts only then
    inductor_metrics_log.propagate = False
    metrics.reset()
    torch.compiler.reset()
    with config.patch(force_disable_caches=True):
        workload = build_workload(section, cell)
        workload.step(0, workload.ids(0))
    cfg = section.train_config(cell).model
    account = Account(workload.facts["tokens_per_step"])
    length = cfg.max_sequence_length
    # Causal attention: forward two products, backward five, over half of the pairs.
    pairs = cfg.n_layers * (length + 1) / 2 * account.tokens
    account.add("attention", tflop=7 * 2 * pairs * cfg.d_model / 1e12)
    for node, quarter in metrics.nodes_num_elem:
        gb = 4 * quarter / 1e9
        kernel = str(getattr(getattr(node, "node", None), "python_kernel_name", None) or "")
        if "mm" in kernel:
            term = EIGHT_BITS if "scaled" in kernel else "products"
            account.add(term, tflop=product_flop(node) / 1e12, kernels=1)
        elif "attention" in kernel:
            account.add("attention", gb=gb, kernels=1)
        elif gb:
            term = kernel_term(node, cfg)
            # Logits are read twice: for the sum of their exponentials, and for the gradient.
            account.add(term, gb=gb * (1.5 if term == "loss" and gb > 0.1 else 1.0), kernels=1)
    weights = workload.facts["parameters"]
    masters = section.train_config(cell).master_weights
    # Norms read a gradient; clipping reads and writes it; AdamW reads weight, gradient and two
    # moments, and writes weight and moments.
    account.add("optimizer", gb=(4 + 8 + 28) * weights / 1e9, kernels=8 * cfg.n_layers)
    if masters:  # a gradient in bfloat16 becomes the master's; the weight, the master's
        account.add("casts", gb=(6 + 6) * weights / 1e9, kernels=8 * cfg.n_layers)
    return account


def product_flop(node: Any) -> float:
    """Of (m, k) @ (k, n), the first two matrices among the inputs."""
    sizes = [[int(side) for side in x.get_size()] for x in node.node.inputs]
    (m, k), (_, n) = [size for size in sizes if len(size) == 2][:2]
    return 2.0 * m * k * n


def kernel_term(node: Any, cfg: Any) -> str:
    """The term that a compiled elementwise kernel belongs to."""
    head = cfg.embedding_size or cfg.vocab_size
    groups = [group if isinstance(group, tuple | list) else [group] for group in node.group[1]]
    sides = [int(side) for side in itertools.chain.from_iterable(groups)]
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


def format_account(account: Account, rates: argparse.Namespace) -> list[str]:
    """A Markdown table of the terms of a step, the longest first."""
    seconds = {}
    for term, (tflop, gb, _) in account.terms.items():
        rate = {"attention": rates.attention, EIGHT_BITS: rates.eight_bits}.get(
            term, rates.products
        )
        moved = 0.0 if term == "attention" else gb / (rates.bandwidth * 1000)
        seconds[term] = tflop / rate + moved
    kernels = sum(n for _, _, n in account.terms.values())
    seconds["launches"] = kernels * GAP_US / 1e6
    total = sum(seconds.values())
    rows = []
    for term, time in sorted(seconds.items(), key=lambda item: -item[1]):
        tflop, gb, n = account.terms.get(term, (0.0, 0.0, kernels))
        rows.append(
            {
                "term": term,
                "TFLOP": f"{tflop:.2f}",
                "GB": f"{gb:.1f}",
                "kernels": f"{n:.0f}",
                "µs a token": f"{time * 1e6 / account.tokens:.3f}",
                "share": f"{time / total:.1%}",
            }
        )
    speed = f"{account.tokens / total / 1000:,.0f}k tokens/s"
    time_a_token = f"**{total * 1e6 / account.tokens:.3f}**"
    last = {"term": "**all**", "kernels": f"{kernels:.0f}", "µs a token": time_a_token}
    return markdown_table([*rows, last | {"share": speed}])


def main() -> None:
    options = parse_options(
        __doc__,
        matrix=Path("config/bench/tps.yaml"),
        shape={"action": "append"},
        switch={"action": "append"},
        microbatch=16,
        layers={"type": int, "help": "fewer, to compile faster"},
        products={"default": 660.0, "help": "TFLOP/s"},
        eight_bits={"default": 1150.0, "help": "TFLOP/s"},
        fp8={"default": "none", "help": "native, for products in 8 bits"},
        attention={"default": 400.0, "help": "TFLOP/s"},
        bandwidth={"default": 3.9, "help": "TB/s"},
    )
    section = load_section(options.matrix, "cuda")
    for shape in section.shapes.values():
        shape["n_layers"] = options.layers or shape["n_layers"]
    for shape in options.shape or ["olmo-250m", "d1536"]:
        for switch in options.switch or ["none", "master_weights"]:
            how = {"precision": "amp_bf16", "switch": switch, "fp8": options.fp8}
            cell = Cell(shape, "auto", "default", options.microbatch, **how)
            lines = format_account(count_step(section, cell), options)
            print(f"\n{cell.name}\n", *lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
