"""Block-sparse attention in Triton: one program walks the key blocks that one block of queries keeps."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .order import BLOCK
from .registry import Selection

TILE_N = 64
"""Keys held at a time: half a block, so that two stages of keys and values fit the 99 KiB of an RTX card as well."""
TILE_FP32 = 16
"""The same in fp32, whose products run outside the tensor cores: 64 keys would spill 13 KB a thread, and take 129 KiB
of shared memory."""
LOG2E = 1.4426950408889634


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, counts_ptr, blocks_ptr, queries, keys, scale,
    q_b, q_s, q_n, k_b, k_s, k_n, v_b, v_s, v_n, o_b, o_s, o_n, heads, key_blocks,
    ROWS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head and sample. Scores are scaled to base 2."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    lanes = tl.arange(0, TILE)
    q_base = q_ptr + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_n
    q = tl.load(q_base + rows.to(tl.int64)[:, None] * q_s + columns[None, :], mask=(rows < queries)[:, None], other=0.0)
    k_base = k_ptr + batch.to(tl.int64) * k_b + head.to(tl.int64) * k_n
    v_base = v_ptr + batch.to(tl.int64) * v_b + head.to(tl.int64) * v_n
    k_place = lanes[None, :] * k_s + columns[:, None]
    v_place = lanes[:, None] * v_s + columns[None, :]
    row = (batch * heads + head).to(tl.int64) * tl.num_programs(0) + tile
    count = tl.load(counts_ptr + row)
    list_ptr = blocks_ptr + row * key_blocks
    best = tl.full((ROWS,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for step in range(0, count * PARTS):
        first = tl.load(list_ptr + step // PARTS) * (PARTS * TILE) + (step % PARTS) * TILE
        inside = first + lanes < keys
        k = tl.load(k_base + first.to(tl.int64) * k_s + k_place, mask=inside[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        scores = tl.where(inside[None, :], scores, -1.0e30)
        higher = tl.maximum(best, tl.max(scores, axis=1))
        p = tl.where(inside[None, :], tl.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(v_base + first.to(tl.int64) * v_s + v_place, mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        best = higher
    out = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)
    out_base = out_ptr + batch.to(tl.int64) * o_b + head.to(tl.int64) * o_n
    tl.store(
        out_base + rows.to(tl.int64)[:, None] * o_s + columns[None, :], out.to(out_ptr.dtype.element_ty),
        mask=(rows < queries)[:, None],
    )  # fmt: skip
    if SUMS:
        lse = tl.where(total > 0, (best + tl.log2(total)) / 1.4426950408889634, float("-inf"))
        tl.store(lse_ptr + (batch * heads + head).to(tl.int64) * queries + rows, lse, mask=rows < queries)


def forward(
    q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor, selection: Selection, sums: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """[B, S, N, E]; the last dimension of each operand is contiguous. ``sums``: see ``SPARSE``."""
    batch, queries, heads, width = q_BSNE.shape
    out = torch.empty(q_BSNE.shape, dtype=q_BSNE.dtype, device=q_BSNE.device)
    lse = torch.empty(batch, heads, queries, device=out.device) if sums else None
    rows, tiles = selection.query_rows, selection.counts.shape[2]
    assert all(t.stride(3) == 1 for t in (q_BSNE, k_BLNE, v_BLNE)) and selection.blocks.is_contiguous()
    strides = [s for t in (q_BSNE, k_BLNE, v_BLNE, out) for s in t.stride()[:3]]
    half = q_BSNE.dtype in (torch.bfloat16, torch.float16)
    tile = TILE_N if half else TILE_FP32
    _forward_kernel[(tiles, heads, batch)](
        q_BSNE, k_BLNE, v_BLNE, out, lse, selection.counts, selection.blocks, queries, k_BLNE.shape[1],
        LOG2E / math.sqrt(width), *strides, heads, selection.key_blocks,
        ROWS=rows, TILE=tile, PARTS=BLOCK // tile, WIDTH=width, SUMS=sums,
        PRECISION="tf32" if half else "ieee", num_warps=8 if half else 16, num_stages=3 if half else 1,
    )  # fmt: skip
    return out if lse is None else (out, lse)
