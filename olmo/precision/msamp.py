"""MS-AMP (Peng et al. 2023, arXiv:2310.18313): 8-bit products, gradients and optimizer state.

The adapter behind `use_msamp: true`. MS-AMP is on no package index (github.com/Azure/MS-AMP, v0.4),
needs torch 2.1 and does not work with later ones.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from olmo.config import OptimizerType, TrainConfig

# O1: products and gradients in 8 bits; O2: the optimizer's first moment too, its second in 16.
OPT_LEVEL = "O2"


def why_not(cfg: TrainConfig) -> str | None:
    """None where MS-AMP can be used, else one sentence with the remedy."""
    remedy = "--use_msamp=false --precision=amp_bf16 trains without it"
    if cfg.optimizer.name != OptimizerType.adamw:
        return f"MS-AMP has AdamW only, not {cfg.optimizer.name}; {remedy}"
    if importlib.util.find_spec("msamp") is None:
        return (
            "the package msamp (MS-AMP v0.4, from github.com/Azure/MS-AMP) is not installed; it "
            f"needs torch 2.1 and a CUDA GPU, and this is torch {torch.__version__}; {remedy}"
        )
    return None


def initialize(model: Any, optimizer: Any) -> tuple[Any, Any]:
    """The model and its optimizer with MS-AMP's linear layers and state in their place."""
    import msamp

    return msamp.initialize(model, optimizer, opt_level=OPT_LEVEL)
