"""OLMo's name for seeding everything; the trainer itself seeds what it draws, where it draws it."""

import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, on all devices."""
    if not 0 <= seed <= 2**32 - 1:
        raise ValueError(f"a seed is a number from 0 to 2**32 - 1, found {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
