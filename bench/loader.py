"""Training instances per CPU-second, ours beside OLMo's own loader.

    python bench/loader.py --peer /some/where/bin/python [--length 2048] [--rounds 7]

The peer is a Python with ai2-olmo (tests/parity/README.md). Each side runs `build_train_dataloader`
of its own package without workers, in its own process, on the same random token file; sides take
turns. `ours items` reads our data set item by item and collates, as code written for OLMo may do.
The cost is CPU time of the process, all threads. The sums of ids and indices must agree.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any


def iterate_batches(side: str, folder: Path, length: int, size: int) -> Iterator[dict[str, Any]]:
    """Batches of the first epoch, over and over. Here `olmo` may be AI2's."""
    from olmo.config import TrainConfig
    from olmo.data import DataCollator, build_train_dataloader

    cfg = TrainConfig.new(
        model={"max_sequence_length": length, "vocab_size": 50304, "pad_token_id": 1},
        data={"paths": [str(folder / "tokens.npy")], "drop_last": True, "num_workers": 0},
        save_folder=str(folder / f"{side}.run"),
        save_overwrite=True,
        global_train_batch_size=size,
    )
    cfg.device_train_batch_size = size
    loader = build_train_dataloader(cfg, world_size=1, rank=0, fs_local_rank=0)
    while True:
        if side == "ours items":
            from olmo.data import IterableDataset

            items = IterableDataset.__iter__(loader.dataset)  # as OLMo's DataLoader would
            collate = DataCollator.from_train_config(cfg)
            while len(batch := list(islice(items, size))) == size:
                yield collate(batch)
        else:
            yield from loader


def serve(side: str, folder: Path, length: int, size: int) -> None:
    """Read as many batches as each line on stdin says; reply with the rate and a checksum."""
    sys.path.append(str(Path(__file__).parents[1] / "olmo/bench"))
    import torch
    from timing import open_reply_stream  # needs nothing of ours

    torch.set_num_threads(1)
    reply = open_reply_stream()
    batches = iterate_batches(side, folder, length, size)
    for line in sys.stdin:
        cpu, checksum = time.process_time(), 0
        for batch in islice(batches, int(line)):
            checksum += int(batch["input_ids"].sum()) + int(batch["index"].sum())
        rate = int(line) * size / (time.process_time() - cpu)
        reply({"rate": rate, "sum": checksum})


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        side, folder, length, size = sys.argv[2:]
        serve(side, Path(folder), int(length), int(size))
        return

    import numpy as np

    from olmo.bench.pairs import PYTHON, peer_environment, start_worker
    from olmo.bench.script import describe_run, measure_interleaved, medians, parse_options, ratios
    from olmo.bench.table import markdown_table

    options = parse_options(
        __doc__,
        peer={"default": os.environ.get(PYTHON)},
        length=2048,
        size={"default": 32, "help": "instances a batch"},
        batches={"default": 64, "help": "a round"},
        rounds=7,
    )
    pythons = {"ours": sys.executable, "ours items": sys.executable}
    if options.peer:
        pythons["peer"] = options.peer
    else:
        print("the peer is left out: --peer names no Python; see tests/parity/README.md")
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder, checksums = Path(place), []
        tokens = np.random.default_rng(0).integers(2, 50304, 16 * 2**20, dtype=np.uint16)
        tokens.tofile(folder / "tokens.npy")
        shape = [str(options.length), str(options.size)]
        workers = {}
        for side, python in pythons.items():
            command = [python, os.path.abspath(__file__), "--serve", side, str(folder), *shape]
            env = peer_environment() if side == "peer" else None
            workers[side] = stack.enter_context(start_worker(side, command, folder, env))

        def read(side: str) -> float:
            reply = workers[side].request(str(options.batches))
            checksums.append(reply["sum"])
            return reply["rate"]

        programs = {side: lambda side=side: read(side) for side in workers}
        rates = measure_interleaved(options.rounds + 1, programs)
        rates = {side: values[1:] for side, values in rates.items()}  # the first is a warm-up
    for first in range(0, len(checksums), len(pythons)):
        sums = checksums[first : first + len(pythons)]
        assert len(set(sums)) == 1, f"expected all sides to read the same tokens, found sums {sums}"
    batches = f"batches of {options.size} x {options.length}"
    print(f"\n{describe_run(batches, f'{options.rounds} rounds')}\n")
    rows = []
    for side, rate in medians(rates).items():
        peer = rates.get("peer")
        ratio = f"{statistics.median(ratios(rates[side], peer)):.2f}" if peer else "-"
        rows.append({"side": side, "instances per CPU-s": f"{rate:,.0f}", "times the peer": ratio})
    print(*markdown_table(rows), sep="\n")


if __name__ == "__main__":
    main()
