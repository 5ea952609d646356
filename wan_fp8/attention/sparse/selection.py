"""Which key blocks each block of queries keeps: from scores by block, without a look at the host.

Scores come from block means. In a block whose keys vary, the mass of the mean key is less than the mean of the masses;
with a diagonal covariance C of the keys around their mean the log of the mean of exp(q k) is q k + q C q / 2, and the
same holds for the queries. Both corrections ride along in the one product of [Mq, 3 E] and [Mk, 3 E] a head. The mean
of all keys is taken out first: softmax does not see it, and a correction must not either.

B batch, N heads, E head width, M blocks (Mq of queries, Mk of keys).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import kernels
from .order import BLOCK, BlockLayout
from .registry import Selection

DENSE_FROM = 0.9
"""A block of queries that would keep more of the key blocks than this keeps all of them: the rest saves next to
nothing, and a head whose attention is spread over everything is then exact."""


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """Means and variances of queries or keys by block."""

    mean: Tensor
    """[B, N, M, E] fp32."""
    variance: Tensor
    """[B, N, M, E] fp32, around the block's own mean."""
    sizes: Tensor
    """[M] fp32 tokens of each block."""

    @classmethod
    def of(cls, x_BSNE: Tensor, num_tokens: int, rows: int, fused: bool) -> BlockStatistics:
        """Of the first ``num_tokens`` tokens; a block without any has zeros."""
        blocks = -(-x_BSNE.shape[1] // rows)
        starts = torch.arange(blocks, device=x_BSNE.device, dtype=torch.float32) * rows
        sizes = (num_tokens - starts).clamp(0, rows)
        if fused:
            from ._selection_triton import statistics

            return cls(*statistics(x_BSNE, num_tokens, rows), sizes)
        x = x_BSNE.float()[:, :num_tokens]
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, blocks * rows - x.shape[1]))
        x = x.unflatten(1, (blocks, rows)).permute(0, 3, 1, 2, 4)  # [B, N, M, rows, E]
        inside = (torch.arange(rows, device=x.device) < sizes[:, None])[..., None]
        count = sizes.clamp_min(1)[:, None]
        mean = x.sum(3) / count
        variance = ((x - mean[..., None, :]).square() * inside).sum(3) / count
        return cls(mean, variance, sizes)


def estimated_scores(q: BlockStatistics, k: BlockStatistics) -> Tensor:
    """[B, N, Mq, Mk] fp32: log of the estimated attention mass of each key block, up to a constant for each row."""
    width = q.mean.shape[-1]
    everything = (k.mean * k.sizes[:, None]).sum(2, keepdim=True) / k.sizes.sum()
    centred = k.mean - everything
    of_queries = torch.cat([q.mean / math.sqrt(width), q.mean.square() / (2 * width), q.variance / (2 * width)], dim=-1)
    of_keys = torch.cat([centred, k.variance, centred.square()], dim=-1)
    whole = (k.sizes / BLOCK).log()  # a last block that is short has fewer keys to hold mass
    return torch.matmul(of_queries, of_keys.transpose(-1, -2)).add_(whole)


def choose(
    scores_BNMM: Tensor,
    amount_N: Tensor,
    dense_N: Tensor,
    rule: str,
    layout: BlockLayout,
    num_queries: int,
    query_rows: int,
    fused: bool,
) -> Selection:
    """The key blocks that are kept.

    Args:
        scores_BNMM: Logarithms of mass; [1, 1, Mq, Mk] serves every sample and head.
        amount_N: What a head keeps, as a share: of the mass (``mass``: the fewest blocks that hold it) or of the blocks
            (``count``: those with the highest scores).
        dense_N: Heads that keep everything.
        layout: Blocks that every query keeps; each block of queries keeps its own tokens as well.
    """
    assert rule in ("mass", "count")
    batch = scores_BNMM.shape[0]
    if fused:
        from ._selection_triton import choose as fused_choose

        counts, blocks = fused_choose(scores_BNMM, amount_N, dense_N, rule, layout, query_rows, DENSE_FROM)
        return Selection(counts, blocks, num_queries, layout.num_tokens, query_rows)
    heads = amount_N.shape[0]
    scores = scores_BNMM.expand(batch, heads, -1, -1)
    kept = always_kept(layout, scores.shape[2], query_rows, scores.device).expand_as(scores)
    every = scores.shape[3]
    probability = torch.softmax(scores, dim=-1)
    weight = probability if rule == "mass" else torch.ones_like(probability)
    wanted = amount_N.view(1, -1, 1, 1).expand(batch, -1, scores.shape[2], 1)
    if rule == "count":
        wanted = torch.ceil(wanted * every - 1e-3)
    wanted = wanted - (weight * kept).sum(-1, keepdim=True)
    order = scores.masked_fill(kept, -math.inf).argsort(dim=-1, descending=True, stable=True)
    free = (weight * ~kept).gather(-1, order)
    before = free.cumsum(-1) - free
    # a share that no sum of fp32 reaches exactly is reached a rounding early, as in the kernel
    taken = torch.zeros_like(kept).scatter(-1, order, (before < wanted - 1e-6) & ~kept.gather(-1, order))
    mask = kept | taken
    empty = torch.arange(scores.shape[2], device=scores.device) * query_rows >= layout.num_tokens
    mask = torch.where(empty[:, None], kept, mask)
    whole = (mask.sum(-1, keepdim=True) > DENSE_FROM * every) | dense_N.view(1, -1, 1, 1)
    return Selection.of_mask(mask | whole, num_queries, layout.num_tokens, query_rows)


def always_kept(layout: BlockLayout, query_blocks: int, query_rows: int, device: torch.device) -> Tensor:
    """[Mq, Mk] bool."""
    every = layout.key_blocks
    key = torch.arange(every, device=device)
    step = query_rows // BLOCK
    first = (torch.arange(query_blocks, device=device) * step).clamp_max(every - 1)[:, None]
    kept = (key >= first) & (key < first + step)
    for start, end in layout.kept:
        kept = kept | ((key >= start) & (key < end))
    return kept


def use_fused(x: Tensor) -> bool:
    """Whether the Triton kernels run on tensors like these."""
    return kernels.select("auto", x.device, x.dtype)
