"""The Triton side of ``rms_rope``; imported only when it runs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_rope_kernel(
    x_ptr, out_ptr, weight_ptr, cos_ptr, sin_ptr, heads_ptr, tokens, dim, EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROPE: tl.constexpr, PARTS: tl.constexpr, ORDERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token per program. Adjacent channels (2i, 2i+1) are a pair; pair p turns by angle p mod (HEAD_DIM / 2).
    The row is stored in PARTS equal pieces, each among the same pieces of its sample's other tokens; ORDERED: its heads
    in the order of ``heads``."""
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    source = columns
    if ORDERED:
        head = tl.load(heads_ptr + columns // HEAD_DIM, mask=inside, other=0).to(tl.int32)
        source = head * HEAD_DIM + columns % HEAD_DIM
    offset = token.to(tl.int64) * dim + columns
    x = tl.load(x_ptr + token.to(tl.int64) * dim + source, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight_ptr + source, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / dim + EPS) * gain
    if ROPE:
        pair = tl.arange(0, BLOCK // 2)
        place = (token % tokens).to(tl.int64) * (HEAD_DIM // 2) + pair % (HEAD_DIM // 2)
        cos = tl.load(cos_ptr + place)
        sin = tl.load(sin_ptr + place)
        real, imaginary = tl.split(tl.reshape(y, (BLOCK // 2, 2)))
        y = tl.reshape(tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos), (BLOCK,))
    if PARTS > 1:
        width = dim // PARTS
        piece = (token // tokens) * PARTS + columns // width
        offset = (piece.to(tl.int64) * tokens + token % tokens) * width + columns % width
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=inside)
