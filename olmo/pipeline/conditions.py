"""What the bits of a measurement depend on besides its inputs."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from olmo.config import TrainConfig


def measurement_conditions(checkpoint: Path) -> dict[str, Any]:
    """The device, threads and torch version, on which the bits of a measurement depend."""
    import torch

    cfg = TrainConfig.load(checkpoint / "config.yaml", untrusted=True)
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": cfg.intra_op_threads or torch.get_num_threads(),
        "torch": version("torch"),
    }
