"""The Triton side of ``low_rank``; imported only when it runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import quantize as reference
from .quantize import Granularity, QuantizedActivation

MODES = {Granularity.TENSOR: 0, Granularity.ROW: 1, Granularity.BLOCK: 2}


@triton.jit
def project_kernel(
    x_ptr, scale_ptr, down_ptr, out_ptr, rows, scale_stride,
    DIM: tl.constexpr, RANK: tl.constexpr, MODE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """ROWS tokens times COLUMNS ranks; rows and columns beyond the edge repeat the last one and are not stored."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    from_row, from_column = tl.minimum(row, rows - 1), tl.minimum(column, RANK - 1)
    inner = tl.arange(0, STEP)
    x_place = x_ptr + from_row[:, None].to(tl.int64) * DIM + inner[None, :]
    down_place = down_ptr + from_column[None, :] * DIM + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, DIM, STEP):
        down = tl.load(down_place + start)
        # through fp32: compute capability 8.9 has no instruction from fp16, which e4m3 is unpacked to, to bf16
        x = tl.load(x_place + start).to(tl.float32).to(down.dtype)
        if MODE == 2:  # STEP divides the 128 channels that share a scale
            scale = tl.load(scale_ptr + (start // 128) * scale_stride + from_row)
            total += tl.dot(x, down) * scale[:, None]
        else:
            total = tl.dot(x, down, total)
    if MODE == 0:
        total *= tl.load(scale_ptr)
    if MODE == 1:
        total *= tl.load(scale_ptr + from_row)[:, None]
    place = out_ptr + row[:, None].to(tl.int64) * RANK + column[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < RANK)[None, :])


@triton.jit
def add_kernel(
    y_ptr, hidden_ptr, up_ptr, rows,
    WIDTH: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of y; the columns of a row run beside each other, so that its hidden values come from the cache."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    place = y_ptr + row[:, None].to(tl.int64) * WIDTH + column[None, :]
    y = tl.load(place, mask=inside, other=0.0)
    from_row, from_column = tl.minimum(row, rows - 1), tl.minimum(column, WIDTH - 1)
    inner = tl.arange(0, STEP)
    hidden_place = hidden_ptr + from_row[:, None].to(tl.int64) * RANK + inner[None, :]
    up_place = up_ptr + from_column[None, :] * RANK + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, RANK, STEP):
        total = tl.dot(tl.load(hidden_place + start), tl.load(up_place + start), total)
    tl.store(place, (y.to(tl.float32) + total).to(y_ptr.dtype.element_ty), mask=inside)


def _step(size: int, most: int) -> int:
    """The largest power of two that divides ``size``, 16 to ``most``."""
    step = most
    while size % step:
        step //= 2
    assert step >= 16, size
    return step


def launch_project(x: QuantizedActivation, down_RD: Tensor) -> Tensor:
    """See ``low_rank.project``."""
    rank, dim = down_RD.shape
    assert x.qdata.is_contiguous() and down_RD.is_contiguous()
    rows = x.qdata.numel() // dim
    out = torch.empty(rows, rank, dtype=down_RD.dtype, device=down_RD.device)
    scale_stride = x.scale.stride(0) if x.granularity is Granularity.BLOCK else 0
    tile = 128
    columns = 64 if rank > 32 else 32 if rank > 16 else 16
    project_kernel[(-(-rank // columns), -(-rows // tile))](
        x.qdata, x.scale, down_RD, out, rows, scale_stride, DIM=dim, RANK=rank,
        MODE=MODES[x.granularity], ROWS=tile, COLUMNS=columns, STEP=_step(dim, reference.BLOCK),
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def launch_add(y: Tensor, hidden_MR: Tensor, up_NR: Tensor) -> None:
    """See ``low_rank.add_``. ``y`` itself, not a view of it: torch.compile then writes in place as well."""
    width, rank = up_NR.shape
    rows = y.numel() // width
    assert y.is_contiguous() and hidden_MR.is_contiguous() and up_NR.is_contiguous()
    tile, columns = 64, 128
    add_kernel[(-(-width // columns), -(-rows // tile))](
        y, hidden_MR, up_NR, rows, WIDTH=width, RANK=rank,
        ROWS=tile, COLUMNS=columns, STEP=_step(rank, 64), num_warps=4, num_stages=2,
    )  # fmt: skip
