"""Several ranks without torchrun: forked from a server that has imported everything once.

Most of a rank's cost is its imports, so what several ranks do one after the other is one call.
"""

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

import olmo.checkpoint.sharded  # noqa: F401
from olmo.config import TrainConfig
from olmo.distributed.world import TIMEOUT
from olmo.train.loop import train

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ranks"])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def forked(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A process that has begun to call `function`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the server finds this file
        forkserver.ensure_running()
    process = CONTEXT.Process(target=function, args=arguments, kwargs=options)
    process.start()
    return process


def on_ranks(size: int, work: list[tuple[Callable[..., Any], tuple[Any, ...]]], log: Path) -> Any:
    """Call each function of `work` on `size` ranks, in a group of its own; rank → results.

    What the ranks say goes to `log`.
    """
    ports = [free_port() for _ in work]
    results = CONTEXT.SimpleQueue()
    processes = [forked(_rank, rank, size, ports, work, log, results) for rank in range(size)]
    for process in processes:
        process.join(TIMEOUT.total_seconds())
    assert [p.exitcode for p in processes] == [0] * size, log.read_text()[-5000:]
    return dict(results.get() for _ in processes)


def _rank(rank: int, size: int, ports: list[int], work: list[Any], log: Path, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    found = []
    with (
        open(log, "a", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        for port, (function, arguments) in zip(ports, work, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            found.append(function(*arguments))
    results.put((rank, found))


def train_on(size: int, cases: list[dict[str, Any]], log: Path) -> list[int]:
    """Train by each of some settings, one after the other; the exit codes."""
    work = [(_train, (case,)) for case in cases]
    found = on_ranks(size, work, log)
    codes: list[int] = found[0]
    assert all(other == codes for other in found.values())
    return codes


def _train(case: dict[str, Any]) -> int:
    return train(TrainConfig.new(**case))
