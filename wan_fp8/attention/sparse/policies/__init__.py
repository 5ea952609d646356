"""Who chooses blocks: one policy a file. A policy gives each key block a score for each block of queries, and says by
which rule and how much a head keeps; the bound moves how much (``guarantee.py``), whatever the policy.

A policy is a function ``choice(asked: Asked) -> Choice``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..order import BlockLayout
from ..selection import BlockStatistics, estimated_scores
from ..setting import Sparsity


@dataclass(frozen=True, slots=True)
class Asked:
    """What a policy may look at."""

    sparsity: Sparsity
    layout: BlockLayout
    statistics: Callable[[], tuple[BlockStatistics, BlockStatistics]]
    """Of queries and keys; computed when called."""
    heads: tuple[int, ...]
    """Which of the transformer block's heads these are (a rank may hold some)."""
    num_heads: int
    block: int
    """Number of the transformer block."""
    step: int
    total: int
    query_rows: int
    query_blocks: int
    device: torch.device

    def estimated(self) -> Tensor:
        """[B, N, Mq, Mk] log of the estimated mass."""
        return estimated_scores(*self.statistics())


@dataclass(frozen=True, slots=True)
class Choice:
    """What a policy answers."""

    scores: Tensor
    """[B, N, Mq, Mk], or [1, 1, Mq, Mk] for all heads."""
    rule: str
    """``mass`` or ``count``; see ``selection.choose``."""
    amount: float | Tensor
    """Of the mass or of the blocks, [N] or for all heads, before the bound moves it."""


Policy = Callable[[Asked], Choice]


def policy(name: str) -> Policy:
    """By name."""
    from . import calibrated, coverage, density, window

    return {
        "coverage": coverage.choice,
        "density": density.choice,
        "window": window.choice,
        "calibrated": calibrated.choice,
    }[name]
