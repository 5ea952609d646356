"""What the dropped blocks would have added, by their means: one key and one value for each block of 128.

A block that nobody looks at is not nothing. Its keys weigh at least as much as their mean does (the exponential is
convex), and its values pull towards their mean: each dropped block takes part in the softmax as its number of keys at
the mean key, with the mean value. That costs a product of [S, M] a head and changes nothing in what is kept.

B batch, N heads, E head width, M blocks (Mq of queries, Mk of keys).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .order import BLOCK
from .registry import Selection
from .selection import BlockStatistics


@dataclass(frozen=True, slots=True)
class Remainder:
    """Every key block in one row."""

    key: Tensor
    """[B, N, Mk, E] fp32 mean keys."""
    value: Tensor
    """[B, N, Mk, E] fp32 mean values."""
    log_size: Tensor
    """[Mk] fp32: the logarithm of a block's number of keys."""

    @classmethod
    def of(cls, k_BLNE: Tensor, v_BLNE: Tensor, fused: bool) -> Remainder:
        """Of keys and values, none of them padding."""
        tokens = k_BLNE.shape[1]
        key, value = (BlockStatistics.of(x, tokens, BLOCK, fused) for x in (k_BLNE, v_BLNE))
        return cls(key.mean, value.mean, key.sizes.log())

    def of_heads(self, heads_n: Tensor) -> Remainder:
        """Of some of the heads."""
        return Remainder(self.key[:, heads_n], self.value[:, heads_n], self.log_size)


def add_(
    out_BSNE: Tensor, lse_BNS: Tensor, q_BSNE: Tensor, rest: Remainder, selection: Selection, fused: bool
) -> Tensor:
    """Add what was dropped to the output of a sparse attention, in place.

    Args:
        out_BSNE: over the kept blocks.
        lse_BNS: fp32 logarithms of the sums of the kept blocks' exponentials; -inf where nothing was kept.
    """
    if fused:
        from ._remainder_triton import add_ as fused_add_

        return fused_add_(out_BSNE, lse_BNS, q_BSNE, rest, selection)
    mask, tokens = selection.mask(), q_BSNE.shape[1]
    for head in range(q_BSNE.shape[2]):
        kept = mask[:, head].repeat_interleave(selection.query_rows, 1)[:, :tokens]
        part = merged(
            out_BSNE[:, :, head], lse_BNS[:, head], q_BSNE[:, :, head], rest.key[:, head], rest.value[:, head],
            rest.log_size, kept,
        )  # fmt: skip
        out_BSNE[:, :, head] = part.to(out_BSNE.dtype)
    return out_BSNE


def merged(out: Tensor, lse: Tensor, q: Tensor, key: Tensor, value: Tensor, log_size: Tensor, kept: Tensor) -> Tensor:
    """[..., R, E] in fp32 (fp64 for fp64 queries): ``out`` with what was dropped.

    Args:
        out, q: [..., R, E]; ``lse``: [..., R].
        key, value: [..., Mk, E]; ``kept``: bool, to [..., R, Mk].
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(dtype) @ key.to(dtype).transpose(-1, -2) / math.sqrt(q.shape[-1]) + log_size.to(dtype)
    scores = scores.masked_fill(kept, -math.inf)
    top = torch.maximum(scores.amax(-1), lse.to(dtype)).nan_to_num(neginf=0.0)[..., None]
    weights, ours = torch.exp(scores - top), torch.exp(lse.to(dtype)[..., None] - top)
    whole = weights.sum(-1, keepdim=True) + ours
    return torch.where(whole > 0, (weights @ value.to(dtype) + ours * out.to(dtype)) / whole.clamp_min(1e-30), 0.0)
