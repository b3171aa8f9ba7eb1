"""Throughput, MFU (model FLOPs utilization) and memory, under OLMo's names."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping

import torch

from olmo.runtime.process import own_peak_memory_bytes


class SpeedMeter:
    """Speed over the last `window` steps, without evaluation and saving.

    Args:
        flops: per token, forward and backward, by convention of counting; each gives an MFU.
        olmo_flops: per token, by OLMo's convention, which leaves a tied head out.
        device_flops: peak of one device per second; None where unknown.
    """

    def __init__(
        self,
        window: int,
        devices: int,
        flops: Mapping[str, int],
        olmo_flops: int,
        device_flops: float | None,
    ) -> None:
        self._steps: deque[tuple[float, int, int]] = deque(maxlen=window)  # seconds, steps, tokens
        self._devices, self._flops, self._olmo_flops = devices, flops, olmo_flops
        self._device_flops = device_flops
        self._mark: float | None = None
        self._waited = 0.0  # s, since the last step that was counted
        self._waits: deque[float] = deque(maxlen=window)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def skip(self) -> None:
        """Do not count the time since the last step: it was evaluation or saving."""
        self._mark, self._waited = time.monotonic(), 0.0

    def step(self, steps: int, tokens: int) -> None:
        """Count `steps` steps that ended now, of `tokens` each over all devices.

        The first call only starts the clock: the first step compiles and allocates.
        """
        now = time.monotonic()
        if self._mark is not None:
            self._steps.append((now - self._mark, steps, steps * tokens))
            self._waits.append(min(self._waited, now - self._mark))
        self._mark, self._waited = now, 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together; 0 before the first step."""
        seconds = sum(seconds for seconds, _, _ in self._steps)
        return sum(tokens for _, _, tokens in self._steps) / seconds if seconds else 0.0

    @property
    def steps_per_second(self) -> float:
        seconds = sum(seconds for seconds, _, _ in self._steps)
        return sum(steps for _, steps, _ in self._steps) / seconds if seconds else 0.0

    def work(self, total_tokens: int) -> dict[str, float]:
        """Tokens and FLOPs of the whole run so far."""
        gflops = self._olmo_flops * total_tokens / 1e9
        return {
            "throughput/total_tokens": total_tokens,
            "throughput/total_training_Gflops": gflops,
            "throughput/total_training_log_Gflops": math.log(gflops),
        }

    def metrics(self) -> dict[str, float]:
        """Tokens and batches per second, and MFU where the device's peak is known."""
        out: dict[str, float] = {}
        if self._steps:
            per_device = self.tokens_per_second / self._devices
            out["throughput/device/tokens_per_second"] = per_device
            out["throughput/device/batches_per_second"] = self.steps_per_second
            seconds = sum(seconds for seconds, _, _ in self._steps)
            out["throughput/data_wait_share"] = sum(self._waits) / seconds if seconds else 0.0
            if self._device_flops:
                for convention, flops in self._flops.items():
                    mfu = per_device * flops / self._device_flops
                    out[f"throughput/device/mfu_{convention}"] = mfu
        return out


# Dense bf16 without sparsity, per second, from the vendors' data sheets.
_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def device_flops(device: torch.device) -> float | None:
    """Peak of a known GPU in bf16, in FLOP/s; else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in _BF16_FLOPS.items() if part in name), None)


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak memory so far, in MB of 10^6 bytes: of tensors on a GPU, or of a process on a CPU."""
    if device.type != "cuda":
        return {"System/Peak CPU Memory (MB)": own_peak_memory_bytes() / 1e6}
    return {"System/Peak GPU Memory (MB)": torch.cuda.max_memory_allocated(device) / 1e6}
