"""Which rank holds which heads while attention is sparse.

Heads keep different shares of the blocks, and an attention over several ranks takes as long as its slowest one. So
heads change ranks after the first sparse attentions of a run, and again whenever twice as many have passed: each rank
holds as many as before, and together they keep about as much as those of any other. All ranks decide from the same
numbers. What is known of a head moves along with it. Between two forwards the host then waits for the GPU once.

Nothing is copied for it: what is sent is put into parts in any case, and takes heads from another place.

N heads of a block, P ranks, h = N / P heads of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.sparse.setting import Sparsity
from ..attention.sparse.share import index_on
from .exchange import all_gather

if TYPE_CHECKING:
    from .ulysses import ParallelCore

WORTH = 0.01
"""Heads stay where they are unless the fullest rank is relieved of this share of the mean."""


def imbalance(work_N: Sequence[float], order: Sequence[int], ranks: int) -> float:
    """What the fullest rank has to do over the mean, where equal parts of ``order`` lie on ``ranks`` ranks."""
    each = len(order) // ranks
    sums = [sum(work_N[head] for head in order[first : first + each]) for first in range(0, len(order), each)]
    return max(sums) * ranks / sum(sums)


def balanced(work_N: Sequence[float], ranks: int) -> list[int]:
    """An order of the heads whose equal parts have about equally much to do: the largest first, each to the rank that
    has least and still has room; then two heads change places as long as that relieves the fullest rank."""
    each = len(work_N) // ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    for head in sorted(range(len(work_N)), key=lambda head: (-work_N[head], head)):
        rank = min((rank for rank in range(ranks) if len(held[rank]) < each), key=lambda rank: (sums[rank], rank))
        held[rank].append(head)
        sums[rank] += work_N[head]
    for _ in range(len(work_N)):
        full = max(range(ranks), key=lambda rank: (sums[rank], -rank))
        swaps = (
            (max(sums[full] - work_N[a] + work_N[b], sums[rank] + work_N[a] - work_N[b]), a, b, rank)
            for rank in range(ranks)
            if rank != full
            for a in held[full]
            for b in held[rank]
        )
        top, a, b, rank = min(swaps, default=(sums[full], 0, 0, 0))
        if top >= sums[full] * (1 - 1e-6):
            break
        held[full][held[full].index(a)], held[rank][held[rank].index(b)] = b, a
        sums[full] += work_N[b] - work_N[a]
        sums[rank] += work_N[a] - work_N[b]
    return [head for part in held for head in sorted(part)]


class HeadBalance:
    """Of one model's blocks."""

    def __init__(self, cores: Callable[[], list[ParallelCore]], group: dist.ProcessGroup) -> None:
        self._cores, self._group = cores, group
        self._due: dict[Sparsity, int] = {}

    def reset(self) -> None:
        """Every head goes back to where it was: runs with the same seed have the same bits."""
        self._due.clear()
        for core in self._cores():
            core.arrange(None)

    def update(self, sparsity: Sparsity, step: int) -> None:
        """Before a forward with this setting: let heads change ranks where that is due, and where no choice that was
        made for them before serves this step too."""
        runs = [
            (core, run)
            for core in self._cores()
            for run in core.attention.sparse_runs.values()
            if run.control is not None
        ]
        calls = max((len(run.calls) for _, run in runs if run.sparsity == sparsity), default=0)
        if calls == 0 or calls < self._due.get(sparsity, 1) or any(run.keeps(step) for _, run in runs):
            return
        self._due[sparsity] = 2 * calls
        known = all_gather(torch.stack([run.known() for _, run in runs]), self._group)  # [P, R, 5, h]
        known = known.movedim(0, 2).flatten(2)  # [R, 5, N] by place
        moved: dict[ParallelCore, Tensor] = {}
        for (core, run), shares in zip(runs, known[:, 0].tolist(), strict=True):
            order = core.order
            work = [share for _, share in sorted(zip(order, shares, strict=True))]
            wanted, ranks = balanced(work, self._group.size()), self._group.size()
            if run.sparsity != sparsity or imbalance(work, order, ranks) - imbalance(work, wanted, ranks) < WORTH:
                continue
            core.arrange(wanted, known.device)
            moved[core] = index_on([order.index(head) for head in core.share.heads], known.device)
        for (core, run), table in zip(runs, known, strict=True):
            if core in moved:
                run.learnt_elsewhere(table[:, moved[core]])
