"""The Triton side of ``residual_norm``; imported only when it runs.

A row is held in two parts, the largest power of two that it contains and the rest: 5,120 channels are 4,096 and 1,024,
where one block of 8,192 would leave three lanes of eight idle.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._quantize_triton import largest_of, row_multiplier, store_part


@triton.jit
def _summed(
    x_ptr, branch_ptr, gate_ptr, x_out_ptr, offset, columns, inside, ADD: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """A part of the stream in fp32, the branch added and written back."""
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        branch = tl.load(branch_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            branch *= tl.load(gate_ptr + columns, mask=inside, other=0.0)
        # round to the stream's type first: the norm must see what later blocks will read back
        stored = (x + branch).to(x_out_ptr.dtype.element_ty)
        tl.store(x_out_ptr + offset, stored, mask=inside)
        x = stored.to(tl.float32)
    return x


@triton.jit
def _scaled(normed, scale_ptr, shift_ptr, columns, inside, MODULATED: tl.constexpr):
    """Scale and shift of a part; zero outside, where both tables read as zero."""
    scale = tl.load(scale_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        scale += 1.0
    return normed * scale + shift


@triton.jit
def residual_norm_kernel(
    x_ptr, branch_ptr, gate_ptr, scale_ptr, shift_ptr, row_ptr, x_out_ptr, out_ptr,
    out_scale_ptr, multiplier_ptr, amax_ptr,
    tokens, dim, gate_stride, table_stride, EPS: tl.constexpr,
    ADD: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, MODULATED: tl.constexpr, HAS_ROWS: tl.constexpr,
    MODE: tl.constexpr, POWER_OF_2: tl.constexpr, COLLECT: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One token per program: its whole row stays in registers between the sum, the statistics and the output.

    ``EPS`` is a constant: torch.compile would pass a number as float64, and all that it touches would be float64.
    """
    token, rows = tl.program_id(0), tl.num_programs(0)
    row = (tl.load(row_ptr + token) if HAS_ROWS else token // tokens).to(tl.int64)
    start = token.to(tl.int64) * dim
    first = tl.arange(0, HEAD)
    all_inside = first < dim
    if GATED:
        gate_ptr += row * gate_stride
    x = _summed(x_ptr, branch_ptr, gate_ptr, x_out_ptr, start + first, first, all_inside, ADD, GATED)
    if TAIL > 0:
        rest = HEAD + tl.arange(0, TAIL)
        inside = rest < dim
        x_rest = _summed(x_ptr, branch_ptr, gate_ptr, x_out_ptr, start + rest, rest, inside, ADD, GATED)
    if NORM:
        total = tl.sum(x, axis=0)
        if TAIL > 0:
            total += tl.sum(x_rest, axis=0)
        mean = total / dim
        x = tl.where(all_inside, x - mean, 0.0)
        squares = tl.sum(x * x, axis=0)
        if TAIL > 0:
            x_rest = tl.where(inside, x_rest - mean, 0.0)
            squares += tl.sum(x_rest * x_rest, axis=0)
        inverse = tl.rsqrt(squares / dim + EPS)
        scale_ptr += row * table_stride
        shift_ptr += row * table_stride
        y = _scaled(x * inverse, scale_ptr, shift_ptr, first, all_inside, MODULATED)
        largest = 0.0
        if COLLECT or MODE == 1:
            largest = largest_of(y, out_ptr, MODE)
        if TAIL > 0:
            y_rest = _scaled(x_rest * inverse, scale_ptr, shift_ptr, rest, inside, MODULATED)
            if COLLECT or MODE == 1:
                largest = tl.maximum(largest, largest_of(y_rest, out_ptr, MODE))
        multiplier = row_multiplier(largest, token, out_scale_ptr, multiplier_ptr, amax_ptr, MODE, COLLECT)
        store_part(
            y, multiplier, all_inside, start + first, token, rows, 0, dim, out_ptr, out_scale_ptr,
            MODE, POWER_OF_2, HEAD,
        )  # fmt: skip
        if TAIL > 0:
            store_part(
                y_rest, multiplier, inside, start + rest, token, rows, HEAD, dim, out_ptr, out_scale_ptr,
                MODE, POWER_OF_2, TAIL,
            )  # fmt: skip
