"""Master weights: matrices in bfloat16, each with a float32 copy (the master) that the optimizer
updates (Micikevicius et al. 2018, arXiv:1710.03740).

Autocast alone keeps weights in float32 and casts them in each microbatch; the residual stream is
float32, as embeddings are. With master weights an embedding's output is cast to bfloat16, and so
the residual stream is bfloat16. Gradients of microbatches are still summed in float32.

An embedding's own weight stays float32: its gradient is a sum over all positions of a token, and in
bfloat16 the sum of a frequent token stops growing after a few hundred terms (docs/lab.md).

The master replaces its weight in the optimizer and in the model's state_dict. So checkpoints are
the same as without this option, and a run may resume with the other setting.

Create it after the optimizer, whose state is loaded, and before GradientReducer, whose hooks read
the masters' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from olmo.config import TrainConfig


def find_master_weights_problem(cfg: TrainConfig, sharded: bool) -> str | None:
    """None where master weights work, else one sentence with the remedy."""
    if cfg.precision != "amp_bf16":
        return f"it keeps weights in bfloat16, and precision is {cfg.precision}; set amp_bf16"
    if sharded:
        return (
            "sharded weights have it already: FSDP gathers them in bfloat16 from float32 shards "
            "(fsdp.precision); leave master_weights out"
        )
    if cfg.use_msamp:
        return "MS-AMP has its own master weights; remove one of the two"
    return None


class MasterWeights:
    """The masters of a model's matrices. Call `copy_to_model` after each optimizer step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Replace the weights in `optimizer` and in its state by masters, and cast the model's."""
        self._master_of: dict[nn.Parameter, Tensor] = {}
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        for embedding in embeddings:
            embedding.register_forward_hook(lambda module, inputs, x: x.to(torch.bfloat16))
        embedding_weights = {embedding.weight for embedding in embeddings}
        for p in model.parameters():
            if p.ndim < 2 or not p.requires_grad or p in embedding_weights:
                continue  # norms and biases are small: they stay in float32
            master = p.detach()
            master.requires_grad_()
            self._master_of[p] = master
            p.data = master.detach().to(torch.bfloat16)
            p.register_post_accumulate_grad_hook(_accumulate_into(master))
            if p in optimizer.state:
                optimizer.state[master] = optimizer.state.pop(p)
        for group in optimizer.param_groups:
            group["params"] = self.get_masters(group["params"])
        # A lambda: torch sets an attribute on the hook, which a bound method does not allow.
        model.register_state_dict_post_hook(lambda *args: self._put_masters(*args))
        self._weights = [p.data for p in self._master_of]
        self._masters = [master.detach() for master in self._master_of.values()]

    def get_masters(self, parameters: Iterable[Any]) -> list[Tensor]:
        """Each parameter's master, or itself where it has none."""
        return [self._master_of.get(p, p) for p in parameters]

    def copy_to_model(self) -> None:
        """Copy the updated masters into the model's bfloat16 weights."""
        torch._foreach_copy_(self._weights, self._masters)

    def _put_masters(self, model: nn.Module, state: dict[str, Any], *_: Any) -> None:
        """Replace weights in a state_dict by their masters: checkpoints contain the masters."""
        for name, p in model.named_parameters():
            if p in self._master_of:
                state[name] = self._master_of[p].detach()


def _accumulate_into(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a weight's gradient to its master's, after each microbatch.

    It must not refer to the weight: Python's garbage collector does not see reference cycles
    through autograd's hooks, so weight and hook would never be freed.
    """

    def hook(p: Tensor) -> None:
        assert p.grad is not None
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad += p.grad
        p.grad = None

    return hook
