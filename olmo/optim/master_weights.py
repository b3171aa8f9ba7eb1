"""Matrices in bfloat16, each with a float32 master that the optimizer works on (Micikevicius et al.
2018, arXiv:1710.03740).

Autocast keeps weights in float32 and casts them for each microbatch; its embeddings, and so what
is added up from block to block, are float32. With `master_weights` what an embedding gives is
bfloat16, and everything from there on. Gradients of microbatches still add up in float32.

An embedding's own weight stays float32: its gradient is a sum over all positions of a token, and in
bfloat16 a frequent token's loses all but the first few hundred of them (docs/lab.md).

A master takes its weight's place in the optimizer and in the model's state_dict: what is saved is
what is saved without it, and a run may go on with the other setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from olmo.config import TrainConfig


def find_master_weights_problem(cfg: TrainConfig, sharded: bool) -> str | None:
    """None where the run can have master weights, else one sentence with the remedy."""
    if cfg.precision != "amp_bf16":
        return f"it keeps weights in bfloat16, and precision is {cfg.precision}; set amp_bf16"
    if sharded:
        return (
            "sharded weights have it already: they are gathered in bfloat16, the shards are "
            "float32 (fsdp.precision); leave master_weights out"
        )
    if cfg.use_msamp:
        return "MS-AMP keeps masters of its own; leave one of them out"
    return None


class MasterWeights:
    """The masters of a model's matrices; call `copy_to_model` after each step of the optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Takes weights, optimizer and its state as they are, in float32."""
        self._of: dict[nn.Parameter, Tensor] = {}
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        for embedding in embeddings:
            embedding.register_forward_hook(lambda module, inputs, x: x.to(torch.bfloat16))
        rows = {embedding.weight for embedding in embeddings}
        for p in model.parameters():
            if p.ndim < 2 or not p.requires_grad or p in rows:
                continue  # norms and biases are small, and computed with in float32
            master = p.detach()
            master.requires_grad_()
            self._of[p] = master
            p.data = master.detach().to(torch.bfloat16)
            p.register_post_accumulate_grad_hook(_collecting(master))
            if p in optimizer.state:
                optimizer.state[master] = optimizer.state.pop(p)
        for group in optimizer.param_groups:
            group["params"] = self.get_masters(group["params"])
        # torch marks the hook, which a bound method does not let it do.
        model.register_state_dict_post_hook(lambda *given: self._name(*given))
        self._weights = [p.data for p in self._of]
        self._masters = [master.detach() for master in self._of.values()]

    def get_masters(self, parameters: Iterable[Any]) -> list[Tensor]:
        """Each parameter's master, or itself where it has none."""
        return [self._of.get(p, p) for p in parameters]

    def copy_to_model(self) -> None:
        """The weights become what their masters are now."""
        torch._foreach_copy_(self._weights, self._masters)

    def _name(self, model: nn.Module, state: dict[str, Any], *_: Any) -> None:
        """The masters under their weights' names: what is saved."""
        for name, p in model.named_parameters():
            if p in self._of:
                state[name] = self._of[p].detach()


def _collecting(master: Tensor) -> Callable[[Tensor], None]:
    """What happens to a weight's gradient after each microbatch: it is added to the master's.

    A hook that knew its weight would keep both alive for ever: Python does not see such a circle.
    """

    def collect(p: Tensor) -> None:
        assert p.grad is not None
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad += p.grad
        p.grad = None

    return collect
