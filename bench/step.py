"""A training step of ours beside OLMo's own trainer, on the CPU.

    python bench/step.py --peer /some/where/bin/python [--size 6m|6m-8k|85m] [--rounds 7]

The peer is an environment with PyPI's `ai2-olmo` (tests/parity/README.md makes one), or its wheel.
How the two are timed, A B A B in a process each, and what a step is: olmo/bench/{pairs,peer}.py.
The same for other shapes, precisions and peers: `snakemake bench_tps`.
"""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime

import torch

from olmo.bench import pairs, table
from olmo.bench.cell import surroundings
from olmo.bench.matrix import Section

MODEL = {
    "mlp_ratio": 8,
    "rope": True,
    "include_bias": False,
    "layer_norm_with_affine": False,
    "attention_layer_norm_with_affine": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "weight_tying": True,
    "init_fn": "mitchell",
    "eos_token_id": 0,
}
OLMO, SMALL = ({"vocab_size": n, "embedding_size": n} for n in (50304, 8192))
# OLMo's vocabulary makes the head most of a small model; with a small one the blocks are.
SIZES = {
    "6m": OLMO | {"d_model": 96, "n_heads": 4, "n_layers": 8, "max_sequence_length": 256},
    "6m-8k": SMALL | {"d_model": 256, "n_heads": 4, "n_layers": 4, "max_sequence_length": 256},
    "85m": OLMO | {"d_model": 512, "n_heads": 8, "n_layers": 14, "max_sequence_length": 512},
}
MICROBATCH = {"6m": 2, "6m-8k": 4, "85m": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", default=os.environ.get(pairs.PYTHON))
    parser.add_argument("--size", choices=SIZES, default="6m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="a round")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if not args.peer:
        parser.error("--peer names no Python; see tests/parity/README.md")
    peer = pairs.peer_at("ai2-olmo", args.peer)
    torch.set_num_threads(args.threads)
    both = {
        "shape": [args.size],
        "peer": ["ai2-olmo"],
        "compile": ["eager", "default"],
        "microbatch": [MICROBATCH[args.size]],
    }
    section = Section.new(
        model=MODEL,
        shapes={args.size: SIZES[args.size]},
        groups=[],
        peers=[both | {"ours": {"compile": mode}} for mode in ("default", "eager")],
        rounds=args.rounds,
        steps=args.rounds * args.steps,
        warmup=3,
        limit_s=3600,
    )
    records = []
    for pair in section.pairs():
        started = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        record = pairs.time_pair(section, pair, peer, "cpu")
        records.append({"started": started} | surroundings() | record)
        print(f"{pair.name}: {table.result(record)}", flush=True)
    print(table.markdown(records, section, f"python bench/step.py --size {args.size}"))


if __name__ == "__main__":
    main()
