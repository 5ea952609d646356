"""The Triton side of ``attention_cast``; imported only when it runs.

Tensors are [B, S, N, E] with the last two dimensions contiguous; batch and token strides are free (keys are views that
leave padding out).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._quantize_triton import to_e4m3

E4M3_MAX = tl.constexpr(448.0)
TINY = tl.constexpr(1e-12)
ROWS = 256
"""Tokens that one program of the statistics pass reduces."""
TILE = 4
COLUMNS = 1024
"""Tokens and channels held in registers at a time: 8 KB in flight a program."""
REDUCE_TILE = 32
CAST_ROWS = 8
"""Tokens that one program casts with one reading of the means and scales."""


@triton.jit
def _statistics_kernel(
    x_ptr, sum_ptr, low_ptr, high_ptr, tokens, stride_b, stride_s, dim,
    ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum, minimum and maximum of every channel over a run of tokens: one program per run, block of channels and
    sample."""
    chunk, batch = tl.program_id(0), tl.program_id(2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = columns < dim
    total = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    low = tl.full((TILE, COLUMNS), float("inf"), dtype=tl.float32)
    high = tl.full((TILE, COLUMNS), float("-inf"), dtype=tl.float32)
    base = x_ptr + batch.to(tl.int64) * stride_b + columns[None, :]
    for start in range(0, ROWS, TILE):  # reduced over the tile only once, at the end
        rows = chunk * ROWS + start + tl.arange(0, TILE)
        inside = (rows < tokens)[:, None] & in_row[None, :]
        x = tl.load(base + rows.to(tl.int64)[:, None] * stride_s, mask=inside, other=0.0).to(tl.float32)
        total += x
        low = tl.minimum(low, tl.where(inside, x, float("inf")))
        high = tl.maximum(high, tl.where(inside, x, float("-inf")))
    out = (batch * tl.num_programs(0) + chunk).to(tl.int64) * dim + columns
    tl.store(sum_ptr + out, tl.sum(total, axis=0), mask=in_row)
    tl.store(low_ptr + out, tl.min(low, axis=0), mask=in_row)
    tl.store(high_ptr + out, tl.max(high, axis=0), mask=in_row)


@triton.jit
def _reduce_kernel(
    sum_ptr, low_ptr, high_ptr, mean_ptr, scale_ptr, tokens, dim,
    CHUNKS: tl.constexpr, SMOOTH: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One head of one sample: channel means, and the largest distance from them over tokens and channels."""
    head, batch = tl.program_id(0), tl.program_id(1)
    columns = head * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    low = tl.full((WIDTH,), float("inf"), dtype=tl.float32)
    high = tl.full((WIDTH,), float("-inf"), dtype=tl.float32)
    for start in range(0, CHUNKS, TILE):
        rows = start + tl.arange(0, TILE)
        inside = (rows < CHUNKS)[:, None]
        place = (batch * CHUNKS + rows).to(tl.int64)[:, None] * dim + columns[None, :]
        total += tl.sum(tl.load(sum_ptr + place, mask=inside, other=0.0), axis=0)
        low = tl.minimum(low, tl.min(tl.load(low_ptr + place, mask=inside, other=float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.load(high_ptr + place, mask=inside, other=float("-inf")), axis=0))
    mean = total / tokens if SMOOTH else tl.zeros((WIDTH,), dtype=tl.float32)
    largest = tl.max(tl.maximum(high - mean, mean - low), axis=0)
    tl.store(mean_ptr + batch * dim + columns, mean)
    tl.store(scale_ptr + batch * tl.num_programs(0) + head, tl.maximum(largest / E4M3_MAX, TINY))


@triton.jit
def _cast_kernel(
    x_ptr, mean_ptr, scale_ptr, out_ptr, tokens, stride_b, stride_s, dim, heads,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A few tokens: subtract the mean, divide by the head's scale, clamp, cast. NaN stays NaN: the guard looks once a
    run, so that one which arises later has to be seen in the video."""
    first, batch = tl.program_id(0) * ROWS, tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    in_row = columns < dim
    mean = tl.load(mean_ptr + batch * dim + columns, mask=in_row, other=0.0)
    inverse = 1.0 / tl.load(scale_ptr + batch * heads + columns // WIDTH, mask=in_row, other=1.0)
    for row in range(0, ROWS):
        token = first + row
        inside = in_row & (token < tokens)
        place = batch.to(tl.int64) * stride_b + token.to(tl.int64) * stride_s + columns
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        out = (batch * tokens + token).to(tl.int64) * dim + columns
        tl.store(out_ptr + out, to_e4m3((x - mean) * inverse), mask=inside)


@triton.jit
def _add_rows_kernel(out_ptr, mean_ptr, tokens, dim, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    place = token.to(tl.int64) * dim + columns
    mean = tl.load(mean_ptr + (token // tokens) * dim + columns, mask=inside, other=0.0)
    value = tl.load(out_ptr + place, mask=inside, other=0.0).to(tl.float32) + mean
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


def _strides(x_BSNE: Tensor) -> tuple[int, int]:
    """Batch and token stride; a head's channels and the heads themselves must lie side by side."""
    assert x_BSNE.stride(3) == 1 and (x_BSNE.stride(2) == x_BSNE.shape[3] or x_BSNE.shape[2] == 1), x_BSNE.stride()
    return x_BSNE.stride(0), x_BSNE.stride(1)


def statistics(x_BSNE: Tensor, smooth: bool) -> tuple[Tensor, Tensor]:
    """Channel means [B, N * E] (zeros unless ``smooth``) and scales [B, N] of the values less their means, fp32."""
    batch, tokens, heads, width = x_BSNE.shape
    dim = heads * width
    chunks = triton.cdiv(tokens, ROWS)
    partial = [torch.empty(batch, chunks, dim, device=x_BSNE.device, dtype=torch.float32) for _ in range(3)]
    columns = min(COLUMNS, triton.next_power_of_2(dim))
    _statistics_kernel[(chunks, triton.cdiv(dim, columns), batch)](
        x_BSNE, *partial, tokens, *_strides(x_BSNE), dim, ROWS=ROWS, TILE=TILE, COLUMNS=columns, num_warps=4
    )
    mean = torch.empty(batch, dim, device=x_BSNE.device, dtype=torch.float32)
    scale = torch.empty(batch, heads, device=x_BSNE.device, dtype=torch.float32)
    _reduce_kernel[(heads, batch)](
        *partial, mean, scale, tokens, dim, CHUNKS=chunks, SMOOTH=smooth, WIDTH=width, TILE=REDUCE_TILE, num_warps=4
    )
    return mean, scale


def cast(x_BSNE: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """e4m3 values [B, S, N, E], contiguous."""
    batch, tokens, heads, width = x_BSNE.shape
    out = torch.empty(x_BSNE.shape, device=x_BSNE.device, dtype=torch.float8_e4m3fn)
    block = triton.next_power_of_2(heads * width)
    _cast_kernel[(triton.cdiv(tokens, CAST_ROWS), batch)](
        x_BSNE, mean, scale, out, tokens, *_strides(x_BSNE), heads * width, heads,
        WIDTH=width, BLOCK=block, ROWS=CAST_ROWS, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out


def add_rows_(out_BSNE: Tensor, mean_BNE: Tensor) -> Tensor:
    """Add one row per sample to every token, in place."""
    batch, tokens, heads, width = out_BSNE.shape
    assert out_BSNE.is_contiguous()
    block = triton.next_power_of_2(heads * width)
    _add_rows_kernel[(batch * tokens,)](
        out_BSNE, mean_BNE.contiguous(), tokens, heads * width, BLOCK=block, num_warps=min(8, max(1, block // 1024))
    )
    return out_BSNE
