"""The weights that all golden numbers are computed with."""

import zlib

import numpy as np
import torch


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Give each parameter values that depend on its name alone."""
    for name, p in model.named_parameters():
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        values = generator.standard_normal(p.shape).astype(np.float32) * np.float32(0.05)
        if name.endswith(("norm.weight", "ln_f.weight")):
            values += np.float32(1)
        p.copy_(torch.from_numpy(values))
