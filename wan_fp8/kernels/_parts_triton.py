"""The Triton side of ``parts``; imported only when it runs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def parts_kernel(
    x_ptr, out_ptr, heads_ptr, tokens, dim, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, ORDERED: tl.constexpr,
    JOIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token per program. Column c of the parts, counted through all of them, is column c of the whole row, or,
    ORDERED, the same column of head ``heads[c // HEAD_DIM]``."""
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    column = columns
    if ORDERED:
        head = tl.load(heads_ptr + columns // HEAD_DIM, mask=inside, other=0).to(tl.int32)
        column = head * HEAD_DIM + columns % HEAD_DIM
    whole = token.to(tl.int64) * dim + column
    width = dim // PARTS
    piece = (token // tokens) * PARTS + columns // width
    parts = (piece.to(tl.int64) * tokens + token % tokens) * width + columns % width
    if JOIN:
        tl.store(out_ptr + whole, tl.load(x_ptr + parts, mask=inside), mask=inside)
    else:
        tl.store(out_ptr + parts, tl.load(x_ptr + whole, mask=inside), mask=inside)
