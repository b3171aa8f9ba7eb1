"""Where the time of a few steps goes: torch's and Python's profilers, by the config's switches."""

from __future__ import annotations

import cProfile
import io
import pstats
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from olmo.config import TrainConfig
from olmo.runtime.log import log

# Steps of this start: past compilation and the allocator's first requests.
FIRST, LAST = 6, 8


class Profilers:
    """<save_folder>/profiler: steps 6 to 8 of a start, as a Chrome trace and as tables."""

    def __init__(self, cfg: TrainConfig, first_process: bool) -> None:
        self._folder = Path(cfg.save_folder) / "profiler"
        self._steps = 0
        self._torch: Any = None
        self._python = cProfile.Profile() if cfg.python_profiling and first_process else None
        if cfg.torch_profiling and first_process:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            active = LAST - FIRST + 1
            plan = schedule(wait=FIRST - 2, warmup=1, active=active, repeat=1)
            self._torch = profile(
                activities=activities,
                schedule=plan,
                on_trace_ready=self._write,
                profile_memory=True,
            )
            self._torch.start()

    def _write(self, found: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self._folder / "trace.json.gz"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        table = found.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=32)
        (self._folder / "torch.txt").write_text(table)
        log.info(f"torch profile of steps {FIRST} to {LAST}: {self._folder}")

    def step(self) -> None:
        """A step ended."""
        self._steps += 1
        if self._torch is not None:
            self._torch.step()
        if self._python is not None and self._steps == FIRST - 1:
            self._python.enable()
        if self._python is not None and self._steps == LAST:
            self._python.disable()
            text = io.StringIO()
            pstats.Stats(self._python, stream=text).sort_stats("cumulative").print_stats()
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "python.txt").write_text(text.getvalue())
            log.info(f"Python profile of steps {FIRST} to {LAST}: {self._folder}")

    def close(self) -> None:
        if self._torch is not None:
            self._torch.stop()
        if self._python is not None:
            self._python.disable()
