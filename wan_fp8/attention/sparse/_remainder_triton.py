"""The Triton side of ``remainder``; imported only when it runs. Mean keys and values are in the queries' own type."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registry import Selection

if TYPE_CHECKING:
    from .remainder import Remainder

ROWS, ROWS_FP32 = 128, 16
"""Queries of a program, in two bytes and in fp32: more would spill."""
TILE, TILE_FP32 = 64, 16
"""Key blocks held at a time; see ``_forward_triton``."""
LOG2E = 1.4426950408889634


@triton.jit
def _remainder_kernel(
    out_ptr, lse_ptr, q_ptr, key_ptr, value_ptr, size_ptr, kept_ptr, queries, every, scale,
    o_b, o_s, o_n, q_b, q_s, q_n, heads, query_blocks,
    ROWS: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head and sample; the output over the kept blocks goes in as what was summed before.
    Scores are to base 2."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns, lanes = tl.arange(0, WIDTH), tl.arange(0, TILE)
    inside = rows < queries
    number = (batch * heads + head).to(tl.int64)
    q_place = batch.to(tl.int64) * q_b + head.to(tl.int64) * q_n + rows.to(tl.int64)[:, None] * q_s + columns[None, :]
    o_place = batch.to(tl.int64) * o_b + head.to(tl.int64) * o_n + rows.to(tl.int64)[:, None] * o_s + columns[None, :]
    q = tl.load(q_ptr + q_place, mask=inside[:, None], other=0.0)
    best = tl.load(lse_ptr + number * queries + rows, mask=inside, other=0.0) * 1.4426950408889634
    total = tl.where(best > -1.0e29, 1.0, 0.0)
    best = tl.maximum(best, -1.0e30)
    acc = tl.load(out_ptr + o_place, mask=inside[:, None], other=0.0).to(tl.float32) * total[:, None]
    kept_row = kept_ptr + (number * query_blocks + tile // STEP) * every
    base = number * every * WIDTH
    for first in range(0, every, TILE):
        block = first + lanes
        there = block < every
        place = base + block[:, None] * WIDTH + columns[None, :]
        key = tl.load(key_ptr + place, mask=there[:, None], other=0.0)
        size = tl.load(size_ptr + block, mask=there, other=0.0)
        kept = tl.load(kept_row + block, mask=there, other=1)
        dropped = (kept == 0)[None, :]
        scores = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale + size[None, :]
        scores = tl.where(dropped, scores, -1.0e30)
        higher = tl.maximum(best, tl.max(scores, axis=1))
        p = tl.where(dropped, tl.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(p, axis=1)
        value = tl.load(value_ptr + place, mask=there[:, None], other=0.0)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        best = higher
    out = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)
    tl.store(out_ptr + o_place, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def add_(out_BSNE: Tensor, lse_BNS: Tensor, q_BSNE: Tensor, rest: Remainder, selection: Selection) -> Tensor:
    """See ``remainder.add_``; the last dimension of ``out`` and ``q`` is contiguous."""
    batch, queries, heads, width = q_BSNE.shape
    assert out_BSNE.stride(3) == q_BSNE.stride(3) == 1 and selection.query_rows % ROWS == 0
    half = q_BSNE.dtype in (torch.bfloat16, torch.float16)
    kept = selection.mask().to(torch.uint8)
    rows = ROWS if half else ROWS_FP32
    _remainder_kernel[(triton.cdiv(queries, rows), heads, batch)](
        out_BSNE, lse_BNS.contiguous(), q_BSNE, rest.key.to(q_BSNE.dtype).contiguous(),
        rest.value.to(q_BSNE.dtype).contiguous(), rest.log_size * LOG2E, kept, queries, selection.key_blocks,
        LOG2E / math.sqrt(width), *out_BSNE.stride()[:3], *q_BSNE.stride()[:3], heads, kept.shape[2],
        ROWS=rows, STEP=selection.query_rows // rows, TILE=TILE if half else TILE_FP32, WIDTH=width,
        PRECISION="tf32" if half else "ieee", num_warps=8, num_stages=2 if half else 1,
    )  # fmt: skip
    return out_BSNE
