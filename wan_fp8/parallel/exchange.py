"""The collectives of a forward on plain tensors, and what they send.

P ranks, B batch, C tokens of one rank, N heads, h = N / P heads of one rank, E head width.
"""

from __future__ import annotations

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


class HeadsForTokens:
    """One all-to-all on its way: [B, C, N, E] of this rank's tokens -> [B, P * C, h, E] of its heads."""

    def __init__(self, x_BCNE: Tensor, group: dist.ProcessGroup) -> None:
        ranks = group.size()
        self._send = x_BCNE.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()  # [P, B, C, h, E]
        self._received = torch.empty_like(self._send)
        self._work = all_to_all(self._received, self._send, group)
        self.sent = sent(self._send[0], ranks)

    def wait(self) -> Tensor:
        """The result; with one sample it is what was received, not a copy."""
        self._work.wait()
        return self._received.transpose(0, 1).flatten(1, 2)


def tokens_for_heads(x_BSHE: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """The way back: [B, P * C, h, E] -> [B, C, N, E], and the bytes sent. With one sample nothing is copied before."""
    ranks = group.size()
    send = x_BSHE.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()  # [P, B, C, h, E]
    received = torch.empty_like(send)
    all_to_all(received, send, group).wait()
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3), sent(send[0], ranks)


def gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> tuple[Tensor, int]:
    """Every rank's ``x``, in rank order along ``dim``, and the bytes sent."""
    ranks = group.size()
    x = x.contiguous()
    received = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    all_gather(received, x, group)
    return received.unflatten(0, (ranks, -1)).movedim(0, dim).flatten(dim, dim + 1), sent(x, ranks)
