"""Which of a transformer block's heads are here. A rank of a parallel layout holds some, in any order; what is decided
for a head goes by its number among all of them, so that it is decided as it would be in one process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadShare:
    """Heads by their numbers in the block, in the order in which they lie here."""

    heads: tuple[int, ...]
    total: int
    """Heads of the block."""

    @classmethod
    def whole(cls, total: int) -> HeadShare:
        """All of them, on one rank."""
        return cls(tuple(range(total)), total)

    @classmethod
    def part(cls, order: Sequence[int], rank: int, ranks: int) -> HeadShare:
        """Of ``rank``, where equal parts of ``order`` lie on ``ranks`` ranks."""
        each = len(order) // ranks
        return cls(tuple(order[rank * each : (rank + 1) * each]), len(order))

    def among(self, wanted: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Of the wanted heads those that are here: their places, and their numbers in the block; each [n] int64."""
        return _among(self, tuple(wanted), device)


@functools.lru_cache(maxsize=4096)
def _among(share: HeadShare, wanted: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    places = [share.heads.index(head) for head in wanted if head in share.heads]
    return index_on(places, device), index_on([share.heads[place] for place in places], device)


def index_on(numbers: Sequence[int], device: torch.device) -> Tensor:
    """[n] int64 on ``device``; the host does not wait for a GPU."""
    index = torch.tensor(numbers, dtype=torch.int64)
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)
