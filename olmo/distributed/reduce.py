"""Data-parallel gradients: each becomes its mean over processes while backward still runs.

Gradients are sent in buckets, as in DistributedDataParallel (Li et al. 2020, arXiv:2006.15704).
Backward produces gradients from the last layer to the first, so the last bucket is on the network
while earlier layers are still computed. A floating-point sum depends on its order, so the buckets
and their order follow from the parameters alone: the same run gives the same bits.

torch's DistributedDataParallel is not used: it would wrap the model, and it averages the gradients
of the parameters themselves, while with master weights the gradients are those of the masters.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olmo.distributed.world import World

# A bucket is full at this size. Larger buckets mean fewer all-reduces, and fewer of them overlap
# with backward.
BUCKET_BYTES = 32 * 2**20


class GradientReducer:
    """Averages gradients over processes as they become ready.

    reducer.prepare_for_backward()  # before the step's last backward
    loss.backward()
    reducer.finish()                # from here on each .grad is the mean
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        world: World,
        holders: Iterable[Tensor] | None = None,
    ) -> None:
        """`holders`: the tensor whose .grad is averaged, for each parameter; by default the
        parameter itself, with master weights its master."""
        self._size = world.size
        parameters = list(parameters)
        pairs = zip(parameters, parameters if holders is None else holders, strict=True)
        parameter_of = {holder: p for p, holder in pairs if p.requires_grad}
        self._buckets = assign_buckets(parameter_of)
        # Buckets on the network: the flat tensor, the gradients that it was made of, the request.
        self._in_flight: deque[tuple[Tensor, list[Tensor], Any]] = deque()
        self._n_missing: list[int] = []  # for each bucket: gradients that are not ready yet
        self._next = -1  # the bucket to send next; from the last to the first
        for i, bucket in enumerate(self._buckets):
            for holder in bucket:
                # Hooks run in the order of their registration: MasterWeights registered its own
                # before, so the master's gradient is complete when this hook runs.
                parameter_of[holder].register_post_accumulate_grad_hook(self._make_hook(i))

    def prepare_for_backward(self) -> None:
        """Announce the step's last backward: gradients that it completes may be sent at once."""
        self._n_missing = [len(bucket) for bucket in self._buckets]
        self._next = len(self._buckets) - 1

    def _make_hook(self, bucket: int) -> Any:
        # A strong reference to self would keep the reducer and the weights in memory forever: the
        # garbage collector does not see cycles through autograd's hooks.
        weak_self = weakref.ref(self)

        def hook(_: Tensor) -> None:
            if (reducer := weak_self()) is not None:
                reducer._mark_ready(bucket)

        return hook

    def _mark_ready(self, bucket: int) -> None:
        if not self._n_missing:
            return  # not the last backward: a later microbatch adds to this gradient
        self._n_missing[bucket] -= 1
        while self._next >= 0 and not self._n_missing[self._next]:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[self._next]
        self._next -= 1
        while self._in_flight and self._in_flight[0][2].is_completed():  # frees their memory
            self._receive()
        gradients = [p.grad for p in bucket if p.grad is not None]
        if gradients:
            flat = torch.cat([g.reshape(-1) for g in gradients])
            self._in_flight.append((flat, gradients, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Wait until every gradient is the mean. Sends all, if no backward was announced."""
        if not self._n_missing:
            self._next = len(self._buckets) - 1
        while self._next >= 0:  # also buckets with a parameter that got no gradient
            self._send()
        while self._in_flight:
            self._receive()
        self._n_missing = []

    def _receive(self) -> None:
        """Wait for the oldest bucket, and copy its means into the gradients."""
        flat, gradients, request = self._in_flight.popleft()
        request.wait()
        flat /= self._size
        parts = flat.split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def assign_buckets(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Split parameters, in their order, into buckets of at least BUCKET_BYTES, save the last."""
    buckets: list[list[Tensor]] = []
    size = BUCKET_BYTES
    for parameter in parameters:
        if size >= BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets
