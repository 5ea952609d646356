"""The Triton side of ``selection``; imported only when it runs. 75,648 tokens and 40 heads: queries and keys are read
once (1.5 GB), and one program finds the blocks of one row of 591 scores in registers, by bisection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .order import BLOCK, BlockLayout

HALVINGS = 24
"""Of the span of a row's scores: at a span of 100 the threshold is then exact to 6e-6."""


@triton.jit
def _statistics_kernel(
    x_ptr, mean_ptr, variance_ptr, tokens, blocks, x_b, x_s, x_n, heads,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One block of tokens of one head and sample, held in registers."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (rows < tokens)[:, None]
    place = batch.to(tl.int64) * x_b + head.to(tl.int64) * x_n + rows.to(tl.int64)[:, None] * x_s + columns[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(tl.maximum(tokens - block * ROWS, 1), ROWS).to(tl.float32)
    mean = tl.sum(x, axis=0) / count
    apart = tl.where(inside, x - mean[None, :], 0.0)
    out = ((batch * heads + head).to(tl.int64) * blocks + block) * WIDTH + columns
    tl.store(mean_ptr + out, mean)
    tl.store(variance_ptr + out, tl.sum(apart * apart, axis=0) / count)


def statistics(x_BSNE: Tensor, num_tokens: int, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and variance by block, each [B, N, M, E] fp32."""
    batch, tokens, heads, width = x_BSNE.shape
    assert x_BSNE.stride(3) == 1
    blocks = triton.cdiv(tokens, rows)
    mean, variance = (
        torch.empty(batch, heads, blocks, width, device=x_BSNE.device, dtype=torch.float32) for _ in range(2)
    )
    _statistics_kernel[(blocks, heads, batch)](
        x_BSNE,
        mean,
        variance,
        num_tokens,
        blocks,
        *x_BSNE.stride()[:3],
        heads,
        ROWS=rows,
        WIDTH=width,
        num_warps=rows // 32,
    )
    return mean, variance


@triton.jit
def _choose_kernel(
    scores_ptr, amount_ptr, dense_ptr, counts_ptr, blocks_ptr, s_b, s_n, s_m, heads, every, tokens,
    first_0, end_0, first_1, end_1, dense_from,
    MASS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """One row of scores. Invariant of the bisection: what lies at or above ``low`` is enough, at or above ``high`` it
    is not."""
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, LANES)
    valid = lane < every
    base = scores_ptr + batch.to(tl.int64) * s_b + head.to(tl.int64) * s_n + row.to(tl.int64) * s_m
    score = tl.load(base + lane, mask=valid, other=float("-inf"))
    own = tl.minimum(row * STEP, every - 1)
    kept = ((lane >= own) & (lane < own + STEP)) | ((lane >= first_0) & (lane < end_0))
    kept = (kept | ((lane >= first_1) & (lane < end_1))) & valid
    free = valid & (tl.where(kept, 0, 1) != 0)
    top = tl.max(score, axis=0)
    amount = tl.load(amount_ptr + head)
    if MASS:
        weight = tl.where(valid, tl.exp(score - top), 0.0)
        weight = weight / tl.sum(weight, axis=0)
        wanted = amount - tl.sum(tl.where(kept, weight, 0.0), axis=0) - 1e-6
    else:
        weight = tl.where(valid, 1.0, 0.0)
        wanted = tl.ceil(amount * every - 1e-3) - tl.sum(tl.where(kept, weight, 0.0), axis=0)
    low = tl.min(tl.where(free, score, float("inf")), axis=0)
    high = tl.max(tl.where(free, score, float("-inf")), axis=0) + 1.0
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        enough = tl.sum(tl.where(free & (score >= middle), weight, 0.0), axis=0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    if MASS:
        taken = free & (score >= low)
    else:  # of equal scores as many as are wanted, the first ones
        above = free & (score >= high)
        tied = free & (score >= low) & (score < high)
        left = wanted - tl.sum(tl.where(above, 1.0, 0.0), axis=0)
        taken = above | (tied & (tl.cumsum(tl.where(tied, 1.0, 0.0), axis=0) <= left))
    asks = tl.where(wanted > 0, 1, 0) * tl.where(row * STEP * BLOCK < tokens, 1, 0)
    chosen = kept | (tl.where(taken, asks, 0) != 0)
    count = tl.sum(tl.where(chosen, 1, 0), axis=0)
    whole = tl.where(count > dense_from * every, 1, 0) + tl.load(dense_ptr + head)
    chosen = valid & (tl.where(chosen, 1, whole) != 0)
    one = tl.where(chosen, 1, 0)
    out = (batch * heads + head).to(tl.int64) * tl.num_programs(0) + row
    tl.store(counts_ptr + out, tl.sum(one, axis=0))
    tl.store(blocks_ptr + out * every + tl.cumsum(one, axis=0) - 1, lane, mask=chosen)


def choose(
    scores_BNMM: Tensor,
    amount_N: Tensor,
    dense_N: Tensor,
    rule: str,
    layout: BlockLayout,
    query_rows: int,
    dense_from: float,
) -> tuple[Tensor, Tensor]:
    """Counts [B, N, Mq] and blocks [B, N, Mq, Mk], int32."""
    batch, _, rows, every = scores_BNMM.shape
    heads = amount_N.shape[0]
    scores = scores_BNMM.expand(batch, heads, rows, every)
    assert scores.stride(3) == 1 and len(layout.kept) <= 2
    ranges = [*layout.kept, (0, 0), (0, 0)][:2]
    counts = torch.empty(batch, heads, rows, device=scores.device, dtype=torch.int32)
    blocks = torch.empty(batch, heads, rows, every, device=scores.device, dtype=torch.int32)
    _choose_kernel[(rows, heads, batch)](
        scores, amount_N, dense_N, counts, blocks, *scores.stride()[:3], heads, every, layout.num_tokens,
        *ranges[0], *ranges[1], dense_from,
        MASS=rule == "mass", STEP=query_rows // BLOCK, BLOCK=BLOCK, LANES=triton.next_power_of_2(every),
        HALVINGS=HALVINGS, num_warps=4,
    )  # fmt: skip
    return counts, blocks
