"""How far a low-precision attention is from the exact one, on the tensors at hand.

A few heads and a few runs of neighbouring queries are recomputed in fp32 over all keys. At 75,600 tokens and 40 heads
that is 0.05 % of the products of the block's attention (``sampled_share``); it needs one look at the result on the
host, once a block and run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLED_HEADS = 8
SAMPLED_RUNS = 3
RUN_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the guard found for one block in one run."""

    error: float
    """Relative L2 error over the samples; infinite if the output holds a NaN."""
    bound: float

    @property
    def accepted(self) -> bool:
        """True if the low-precision kernel may go on."""
        return self.error <= self.bound


def sampled_share(tokens: int, heads: int) -> float:
    """Share of an attention's products that ``measure_error`` computes again; above 1
    where runs overlap."""
    picked, starts, length = _samples(tokens, heads)
    return len(picked) * len(starts) * length / (heads * tokens)


def _samples(tokens: int, heads: int) -> tuple[list[int], list[int], int]:
    """Heads that are looked at, where the runs of queries begin, and how long each is."""
    picked = sorted({round(i * (heads - 1) / max(1, SAMPLED_HEADS - 1)) for i in range(SAMPLED_HEADS)})
    length = min(RUN_LENGTH, tokens)
    starts = sorted({round(i * (tokens - length) / max(1, SAMPLED_RUNS - 1)) for i in range(SAMPLED_RUNS)})
    return picked, starts, length


def measure_error(out_BSNE: Tensor, q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> float:
    """Worst relative L2 error of ``out`` over sampled heads, against fp32 attention on the same q, k and v."""
    picked, starts, length = _samples(*q_BSNE.shape[1:3])
    worst = torch.zeros((), device=q_BSNE.device)
    for head in picked:
        k, v = k_BLNE[:, :, head].float(), v_BLNE[:, :, head].float()
        q = torch.cat([q_BSNE[:, s : s + length, head] for s in starts], dim=1).float()
        ours = torch.cat([out_BSNE[:, s : s + length, head] for s in starts], dim=1).float()
        exact = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1) @ v
        worst = torch.maximum(worst, torch.nan_to_num((ours - exact).norm() / exact.norm(), nan=math.inf))
    return float(worst)
