"""The collectives of a forward on plain tensors, and what they send.

P ranks, B batch, C tokens of one rank, N heads, h = N / P heads of one rank, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.parts import join


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


def all_to_all(send: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[Work]]:
    """Begin to hand each rank its entry of ``send``'s second axis, of one sample of the first at a time; what comes
    in, in rank order, and what to wait for."""
    received = torch.empty_like(send)
    works = [
        dist.all_to_all_single(theirs, mine, group=group, async_op=True)
        for theirs, mine in zip(received, send, strict=True)
    ]
    return received, works


_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name from torch 2.13 on, and before."""


def all_gather(send: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's ``send``, along a new first axis."""
    received = send.new_empty(group.size() * send.shape[0], *send.shape[1:])
    _gather_single(received, send, group=group)
    return received.unflatten(0, (group.size(), -1))


class HeadExchange:
    """All-to-alls on their way, tokens for heads: one for each tensor and sample, so that what arrives lies as
    attention reads it, whatever the batch."""

    def __init__(self, group: dist.ProcessGroup, traffic: Traffic) -> None:
        self.ranks, self._group, self._traffic = group.size(), group, traffic
        self._under_way: list[tuple[list[Work], Tensor]] = []
        """With what is being sent, which must live until then."""

    def send(self, x_BPCnE: Tensor) -> Tensor:
        """[B, P, C, h, E] of this rank's tokens -> [B, P * C, h, E] of its heads, there after ``wait``."""
        received, works = all_to_all(x_BPCnE, self._group)
        self._under_way.append((works, x_BPCnE))
        self._traffic.heads += sent(x_BPCnE[:, 0], self.ranks)
        return received.flatten(1, 2)

    def wait(self) -> None:
        """What was sent may be used by what the caller queues next."""
        for works, _ in self._under_way:
            for work in works:
                work.wait()
        self._under_way.clear()

    @staticmethod
    def heads_of(core: nn.Module) -> Tensor | None:
        """[N] int64: the heads of a block's attention in the order in which they go to the ranks; None: as they
        are."""
        return core.heads  # type: ignore[return-value]

    def back(self, x_BSHE: Tensor, heads: Tensor | None = None, *, fused: bool = False) -> Tensor:
        """The way back, at once: [B, P * C, h, E] -> [B, C, N, E].

        Args:
            heads: [N] int64, the order in which heads went to the ranks, if it was one of their own.
            fused: put them side by side with the Triton kernel.
        """
        send = x_BSHE.contiguous().unflatten(1, (self.ranks, -1))
        received, works = all_to_all(send, self._group)
        self._under_way.append((works, send))
        self._traffic.heads += sent(send[:, 0], self.ranks)
        self.wait()
        head_dim = received.shape[-1]
        return join(received.flatten(3), heads, head_dim=head_dim, fused=fused).unflatten(-1, (-1, head_dim))


def gather_rows(row: Tensor, group: dist.ProcessGroup, device: torch.device) -> list[Tensor]:
    """Every rank's ``row``, of lengths that may differ."""
    length = torch.tensor([row.shape[0]], device=device)
    lengths = all_gather(length, group).flatten().tolist()
    padded = torch.nn.functional.pad(row.to(device), (0, max(lengths) - row.shape[0]))
    return [theirs[:count] for theirs, count in zip(all_gather(padded, group), lengths, strict=True)]


def gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> tuple[Tensor, int]:
    """Every rank's ``x``, in rank order along ``dim``, and the bytes sent."""
    return all_gather(x.contiguous(), group).movedim(0, dim).flatten(dim, dim + 1), sent(x, group.size())


def pass_on(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to hand ``x`` to the next rank of ``group``; the answer waits for what the one before hands over, of the
    same shape. ``x`` must not change until then."""
    received, works = ring_step(x, group)

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return received

    return wait


def ring_step(send: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[Work]]:
    """Begin to send to the next rank and to receive from the one before; what comes in, and what to wait for."""
    ranks, rank = group.size(), group.rank()
    after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
    received = torch.empty_like(send)
    works: list[Work] = [
        *dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, send, after, group), dist.P2POp(dist.irecv, received, before, group)]
        )
    ]
    return received, works
