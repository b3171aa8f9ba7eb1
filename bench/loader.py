"""Training instances per CPU-second, ours beside OLMo's own loader.

    python bench/loader.py --peer /some/where/bin/python [--length 2048] [--rounds 7]

The peer is as in bench/step.py: each side runs `build_train_dataloader` of its own package in a
process of its own, on the same random token file, and waits for its turn. Ours has a second row,
`items`, for its data set read item by item and collated, as code written for OLMo may do. CPU
seconds of the process are compared, with all of its threads; no workers. What an instance is
worth is the same on all sides: the sums of ids and indices are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

SIDES = ("ours", "ours items", "peer")


def batches(side: str, folder: Path, length: int, size: int) -> Iterator[dict[str, Any]]:
    """Batches for ever, the first epoch again and again."""
    from olmo.config import TrainConfig
    from olmo.data import DataCollator, build_train_dataloader

    cfg = TrainConfig.new(
        model={"max_sequence_length": length, "vocab_size": 50304, "pad_token_id": 1},
        data={"paths": [str(folder / "tokens.npy")], "drop_last": True, "num_workers": 0},
        save_folder=str(folder / side),
        save_overwrite=True,
        global_train_batch_size=size,
    )
    cfg.device_train_batch_size = size
    loader = build_train_dataloader(cfg, world_size=1, rank=0, fs_local_rank=0)
    while True:
        if side == "ours items":
            items = iter(loader.dataset)
            collate = DataCollator.from_train_config(cfg)
            while len(batch := list(islice(items, size))) == size:
                yield collate(batch)
        else:
            yield from loader


def serve(side: str, folder: Path, length: int, size: int) -> None:
    """Read as many batches as each line on stdin says, and answer with what they took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    source = batches(side, folder, length, size)
    for line in sys.stdin:
        cpu, seen = time.process_time(), 0
        for batch in islice(source, int(line)):
            seen += int(batch["input_ids"].sum()) + int(batch["index"].sum())
        answer = {"rate": int(line) * size / (time.process_time() - cpu), "sum": seen}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=os.environ.get("OLMO_PEER_PYTHON"))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--size", type=int, default=32, help="instances a batch")
    parser.add_argument("--batches", type=int, default=64, help="a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        import torch

        torch.set_num_threads(1)
        serve(args.serve[0], Path(args.serve[1]), args.length, args.size)
        return

    import numpy as np

    sides = [side for side in SIDES if args.peer or side != "peer"]
    if not args.peer:
        print("the peer is left out: --peer names no Python; see tests/parity/README.md")
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(2, 50304, 16 * 2**20, dtype=np.uint16)
        (Path(folder) / "tokens.npy").write_bytes(tokens.tobytes())
        shape = ["--length", str(args.length), "--size", str(args.size)]
        processes = {
            side: subprocess.Popen(
                [
                    args.peer if side == "peer" else sys.executable,
                    *[os.path.abspath(__file__), "--serve", side, folder, *shape],
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            )
            for side in sides
        }

        def ask(side: str) -> dict[str, float]:
            process = processes[side]
            assert process.stdin is not None and process.stdout is not None
            print(args.batches, file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{side} ended with exit code {process.wait()}")
            return json.loads(line)

        try:
            rounds = []
            for _ in range(args.rounds + 1):  # the first one warms up
                rounds.append({side: ask(side) for side in sides})
                sums = {answer["sum"] for answer in rounds[-1].values()}
                assert len(sums) == 1, f"the sides read different tokens: {rounds[-1]}"
        finally:
            for process in processes.values():
                process.kill()
                process.wait()

    rounds = rounds[1:]
    print(f"\n{date.today()}: batches of {args.size} x {args.length}, {args.rounds} rounds\n")
    print("| side | instances per CPU-s | times the peer |\n|---|---|---|")
    for side in sides:
        rate = statistics.median(r[side]["rate"] for r in rounds)
        ratio = "-"
        if args.peer:
            ratio = f"{statistics.median(r[side]['rate'] / r['peer']['rate'] for r in rounds):.2f}"
        print(f"| {side} | {rate:,.0f} | {ratio} |")


if __name__ == "__main__":
    main()
