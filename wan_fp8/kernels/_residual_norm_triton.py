"""The Triton side of ``residual_norm``; imported only when it runs."""

from __future__ import annotations

import triton
import triton.language as tl

from ._quantize_triton import store_row


@triton.jit
def residual_norm_kernel(
    x_ptr, branch_ptr, gate_ptr, scale_ptr, shift_ptr, row_ptr, x_out_ptr, out_ptr,
    out_scale_ptr, multiplier_ptr, amax_ptr,
    tokens, dim, eps, gate_stride, table_stride,
    ADD: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, MODULATED: tl.constexpr, HAS_ROWS: tl.constexpr,
    MODE: tl.constexpr, POWER_OF_2: tl.constexpr, COLLECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token per program: its whole row stays in registers between the sum, the statistics and the output."""
    token = tl.program_id(0)
    row = tl.load(row_ptr + token) if HAS_ROWS else token // tokens
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    offset = token.to(tl.int64) * dim + columns
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        branch = tl.load(branch_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            branch *= tl.load(gate_ptr + row.to(tl.int64) * gate_stride + columns, mask=inside, other=0.0)
        # round to the stream's type first: the norm must see what later blocks will read back
        x = (x + branch).to(x_out_ptr.dtype.element_ty)
        tl.store(x_out_ptr + offset, x, mask=inside)
        x = x.to(tl.float32)
    if NORM:
        mean = tl.sum(x, axis=0) / dim
        centred = tl.where(inside, x - mean, 0.0)
        variance = tl.sum(centred * centred, axis=0) / dim
        normed = centred * tl.rsqrt(variance + eps)
        table = row.to(tl.int64) * table_stride + columns
        scale = tl.load(scale_ptr + table, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + table, mask=inside, other=0.0).to(tl.float32)
        if MODULATED:
            scale += 1.0
        store_row(
            normed * scale + shift, inside, offset, token, tl.num_programs(0), dim,
            out_ptr, out_scale_ptr, multiplier_ptr, amax_ptr, MODE, POWER_OF_2, COLLECT, BLOCK,
        )  # fmt: skip
