"""How gradients meet: each becomes the mean over processes, while backward still computes.

Gradients travel in buckets. Backward makes them from the last layer to the first, so that the
last bucket is on its way while the layers below it are computed. Where the sums happen decides
their last bits: the buckets, and their order, follow from the parameters alone.
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

# Gradients travel together in pieces of about this many bytes.
BUCKET_BYTES = 32 * 2**20


class GradientMean:
    """Sums gradients over processes as they become ready.

    mean.expect()    # before the step's last backward
    loss.backward()
    mean.finish()    # from here on each .grad is the mean
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        world: World,
        holders: Iterable[Tensor] | None = None,
    ) -> None:
        """`holders`: what has each parameter's gradient, where that is not itself (masters)."""
        self._size = world.size
        own = list(parameters)
        pairs = zip(own, own if holders is None else holders, strict=True)
        made_by = {holder: p for p, holder in pairs if p.requires_grad}
        self._buckets = buckets(made_by)
        # Buckets on their way: what was sent, the gradients in it, the request.
        self._sent: deque[tuple[Tensor, list[Tensor], Any]] = deque()
        self._missing: list[int] = []  # of each bucket, gradients that are not ready yet
        self._next = -1  # the bucket to go next; the last one goes first
        for i, bucket in enumerate(self._buckets):
            for holder in bucket:
                # After the hook that hands a gradient to its master, which is older.
                made_by[holder].register_post_accumulate_grad_hook(self._counting(i))

    def expect(self) -> None:
        """The next backward is the last one of this step: what it is done with may go."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._next = len(self._buckets) - 1

    def _counting(self, bucket: int) -> Any:
        # A hook that knew us would keep us, and the weights, alive for ever.
        own = weakref.ref(self)

        def ready(_: Tensor) -> None:
            if (mean := own()) is not None:
                mean._ready(bucket)

        return ready

    def _ready(self, bucket: int) -> None:
        if not self._missing:
            return  # more will be added to it
        self._missing[bucket] -= 1
        while self._next >= 0 and not self._missing[self._next]:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[self._next]
        self._next -= 1
        while self._sent and self._sent[0][2].is_completed():  # their memory is free again
            self._settle()
        gradients = [p.grad for p in bucket if p.grad is not None]
        if gradients:
            flat = torch.cat([g.reshape(-1) for g in gradients])
            self._sent.append((flat, gradients, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Wait until every gradient is the mean; sends first what nobody was told to expect."""
        if not self._missing:
            self._next = len(self._buckets) - 1
        while self._next >= 0:  # also buckets with a parameter that got no gradient
            self._send()
        while self._sent:
            self._settle()
        self._missing = []

    def _settle(self) -> None:
        flat, gradients, request = self._sent.popleft()
        request.wait()
        flat /= self._size
        parts = flat.split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def buckets(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters in their order, cut where BUCKET_BYTES are reached."""
    found: list[list[Tensor]] = []
    size = BUCKET_BYTES
    for parameter in parameters:
        if size >= BUCKET_BYTES:
            found.append([])
            size = 0
        found[-1].append(parameter)
        size += parameter.nbytes
    return found
