"""The collectives of a forward on plain tensors, and what they send.

P ranks, B batch, C tokens of one rank, N heads, h = N / P heads of one rank, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class Traffic:
    """Bytes that this rank has sent to others."""

    heads: int = 0
    """All-to-alls around self-attention."""
    keys: int = 0
    """Keys and values gathered along the ring."""
    stream: int = 0
    """The residual stream gathered after the last block."""
    velocity: int = 0
    """The other half of guidance."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.heads + self.keys + self.stream + self.velocity


def sent(tensor: Tensor, ranks: int) -> int:
    """Bytes of ``tensor`` that leave a rank which sends it to each of the others."""
    return tensor.numel() * tensor.element_size() * (ranks - 1)


class Work(Protocol):
    """A collective on its way."""

    def wait(self) -> object:
        """Come back when the result may be used by what the caller queues next."""


class Nothing:
    """One that is through."""

    def wait(self) -> None:
        """Nothing to wait for."""


def all_to_all(received: Tensor, send: Tensor, group: dist.ProcessGroup) -> Work:
    """Begin to hand each rank its entry of ``send``'s first axis."""
    work = dist.all_to_all_single(received, send, group=group, async_op=True)
    return Nothing() if work is None else work


_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name from torch 2.13 on, and before."""


def all_gather(received: Tensor, send: Tensor, group: dist.ProcessGroup) -> None:
    """Every rank's ``send``, one after the other along the first axis."""
    _gather_single(received, send, group=group)


class HeadExchange:
    """All-to-alls on their way, tokens for heads: one for each tensor and sample, so that what arrives lies as
    attention reads it, whatever the batch."""

    def __init__(self, group: dist.ProcessGroup, traffic: Traffic) -> None:
        self.ranks, self._group, self._traffic = group.size(), group, traffic
        self._under_way: list[tuple[Work, Tensor]] = []
        """With what is being sent, which must live until then."""

    def send(self, x_BPCnE: Tensor) -> Tensor:
        """[B, P, C, h, E] of this rank's tokens -> [B, P * C, h, E] of its heads, there after ``wait``."""
        received = torch.empty_like(x_BPCnE)
        for theirs, mine in zip(received, x_BPCnE, strict=True):
            self._under_way.append((all_to_all(theirs, mine, self._group), mine))
        self._traffic.heads += sent(x_BPCnE[:, 0], self.ranks)
        return received.flatten(1, 2)

    def wait(self) -> None:
        """What was sent may be used by what the caller queues next."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()

    def back(self, x_BSHE: Tensor) -> Tensor:
        """The way back, at once: [B, P * C, h, E] -> [B, C, N, E]."""
        send = x_BSHE.contiguous().unflatten(1, (self.ranks, -1))
        received = torch.empty_like(send)
        for theirs, mine in zip(received, send, strict=True):
            self._under_way.append((all_to_all(theirs, mine, self._group), mine))
        self._traffic.heads += sent(send[:, 0], self.ranks)
        self.wait()
        return received.transpose(1, 2).flatten(2, 3)


def gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> tuple[Tensor, int]:
    """Every rank's ``x``, in rank order along ``dim``, and the bytes sent."""
    ranks = group.size()
    x = x.contiguous()
    received = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    all_gather(received, x, group)
    return received.unflatten(0, (ranks, -1)).movedim(0, dim).flatten(dim, dim + 1), sent(x, ranks)


def pass_on(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to hand ``x`` to the next rank of ``group``; the answer waits for what the one before hands over, of the
    same shape. ``x`` must not change until then."""
    ranks, rank = group.size(), group.rank()
    after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
    received = torch.empty_like(x)
    works = ring_step(received, x, before, after, group)

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return received

    return wait


def ring_step(received: Tensor, send: Tensor, before: int, after: int, group: dist.ProcessGroup) -> Sequence[Work]:
    """Begin to receive from one rank and to send to another (global numbers)."""
    return dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, send, after, group), dist.P2POp(dist.irecv, received, before, group)]
    )
