"""The Triton side of ``guarantee``; imported only when it runs. The keys of a sampled head are read once, in parts."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .order import BLOCK

TILE_N, TILE_FP32 = 64, 16
"""Keys held at a time, in two bytes and in fp32; see ``_forward_triton``."""
PROGRAMS = 528
"""Programs wanted in all: four for each multiprocessor of an H100."""
LOG2E = 1.4426950408889634


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, kept_ptr, heads_ptr, top_ptr, sum_ptr, out_ptr, keys, scale,
    k_b, k_s, k_n, v_b, v_s, v_n, samples, every, blocks_each,
    ROWS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the keys for one sample: sums of the kept blocks and of the dropped ones, over a common maximum."""
    part, sample, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, columns, lanes = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, TILE)
    number = batch * samples + sample
    head = tl.load(heads_ptr + sample)
    q = tl.load(q_ptr + (number * ROWS + row)[:, None] * WIDTH + columns[None, :])
    k_base = k_ptr + batch.to(tl.int64) * k_b + head.to(tl.int64) * k_n
    v_base = v_ptr + batch.to(tl.int64) * v_b + head.to(tl.int64) * v_n
    k_place = lanes[None, :] * k_s + columns[:, None]
    v_place = lanes[:, None] * v_s + columns[None, :]
    best = tl.full((ROWS,), -1.0e30, dtype=tl.float32)
    sum_kept = tl.zeros((ROWS,), dtype=tl.float32)
    sum_dropped = tl.zeros((ROWS,), dtype=tl.float32)
    kept_acc = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    dropped_acc = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    start = part * blocks_each
    for step in range(start * PARTS, tl.minimum(start + blocks_each, every) * PARTS):
        kept = tl.load(kept_ptr + number * every + step // PARTS).to(tl.float32)
        first = step * TILE
        inside = first + lanes < keys
        k = tl.load(k_base + first.to(tl.int64) * k_s + k_place, mask=inside[None, :], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(q, k, input_precision=PRECISION) * scale, -1.0e30)
        higher = tl.maximum(best, tl.max(scores, axis=1))
        p = tl.where(inside[None, :], tl.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.exp2(best - higher)
        v = tl.load(v_base + first.to(tl.int64) * v_s + v_place, mask=inside[:, None], other=0.0)
        held = tl.sum(p, axis=1)
        sum_kept = sum_kept * shrink + held * kept
        sum_dropped = sum_dropped * shrink + held * (1.0 - kept)
        found = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        kept_acc = kept_acc * shrink[:, None] + found * kept
        dropped_acc = dropped_acc * shrink[:, None] + found * (1.0 - kept)
        best = higher
    place = ((number * tl.num_programs(0) + part) * 2 * ROWS).to(tl.int64)
    tl.store(top_ptr + (number * tl.num_programs(0) + part) * ROWS + row, best)
    tl.store(sum_ptr + place + row, sum_kept)
    tl.store(sum_ptr + place + ROWS + row, sum_dropped)
    tl.store(out_ptr + (place + row)[:, None] * WIDTH + columns[None, :], kept_acc)
    tl.store(out_ptr + (place + ROWS + row)[:, None] * WIDTH + columns[None, :], dropped_acc)


def attend(
    q_BnRE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor, kept_BnM: Tensor, heads_n: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact output, output over the kept blocks (both [B, n, R, E] fp32), the mass of the others, and the logarithm of
    the sum over the kept ones (both [B, n, R])."""
    batch, samples, rows, width = q_BnRE.shape
    every, device = kept_BnM.shape[2], q_BnRE.device
    assert k_BLNE.stride(3) == 1 and v_BLNE.stride(3) == 1
    parts = max(1, min(every, PROGRAMS // (batch * samples)))
    each = triton.cdiv(every, parts)
    parts = triton.cdiv(every, each)
    top = torch.empty(batch, samples, parts, rows, device=device)
    sums = torch.empty(batch, samples, parts, 2, rows, device=device)
    outs = torch.empty(batch, samples, parts, 2, rows, width, device=device)
    half = q_BnRE.dtype in (torch.bfloat16, torch.float16)
    tile = TILE_N if half else TILE_FP32
    _attend_kernel[(parts, samples, batch)](
        q_BnRE.contiguous(), k_BLNE, v_BLNE, kept_BnM.to(torch.uint8), heads_n, top, sums, outs, k_BLNE.shape[1],
        LOG2E / math.sqrt(width), *k_BLNE.stride()[:3], *v_BLNE.stride()[:3], samples, every, each,
        ROWS=rows, TILE=tile, PARTS=BLOCK // tile, WIDTH=width, PRECISION="tf32" if half else "ieee",
        num_warps=8, num_stages=2 if half else 1,
    )  # fmt: skip
    highest = top.amax(2, keepdim=True)
    shrink = torch.exp2(top - highest)[:, :, :, None]  # [B, n, P, 1, R]
    sums = (sums * shrink).sum(2)  # [B, n, 2, R]
    outs = (outs * shrink[..., None]).sum(2)
    whole = sums.sum(2)
    chosen = torch.where(sums[:, :, :1, :, None] > 0, outs[:, :, :1] / sums[:, :, :1, :, None].clamp_min(1e-30), 0.0)
    lse = (highest[:, :, 0] + sums[:, :, 0].log2()) / LOG2E
    return outs.sum(2) / whole[..., None], chosen[:, :, 0], sums[:, :, 1] / whole, lse
