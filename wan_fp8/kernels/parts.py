"""Between the layout of a model and that of an all-to-all: the heads that go to each rank lie together.

    whole   [B, S, N * E]        a token's heads side by side, as linears write and read them
    parts   [B, P, S, N / P * E] for each of P ranks, its heads of every token

torch copies either way element by element, at a sixth of what memory can do; the Triton kernel does it by rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cut(x_BSD: Tensor, parts: int, heads: Tensor | None = None, *, head_dim: int, fused: bool = False) -> Tensor:
    """[B, S, D] -> [B, P, S, D / P], contiguous.

    Args:
        parts: P.
        heads: [N] int64, all heads in the order in which they lie then; None: as they are.
        head_dim: E.
        fused: the Triton kernel.
    """
    if fused:
        return _moved(x_BSD, parts, heads, head_dim, join=False)
    if heads is None:
        return x_BSD.unflatten(2, (parts, -1)).transpose(1, 2).contiguous()
    tokens = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    found = x_BSD.unflatten(2, (heads.shape[0], -1))[:, tokens[None, :, None], heads.view(parts, 1, -1)]
    return found.flatten(3).contiguous()


def join(x_BPSd: Tensor, heads: Tensor | None = None, *, head_dim: int, fused: bool = False) -> Tensor:
    """[B, P, S, D / P] -> [B, S, D]: undoes ``cut`` with the same ``heads``."""
    if fused:
        return _moved(x_BPSd, x_BPSd.shape[1], heads, head_dim, join=True)
    side_by_side = x_BPSd.transpose(1, 2).flatten(2)
    if heads is None:
        return side_by_side
    whole = torch.empty_like(side_by_side).unflatten(2, (heads.shape[0], -1))
    whole[:, :, heads] = side_by_side.unflatten(2, (heads.shape[0], -1))
    return whole.flatten(2)


def _moved(x: Tensor, parts: int, heads: Tensor | None, head_dim: int, *, join: bool) -> Tensor:
    import triton

    from ._parts_triton import parts_kernel

    x = x.contiguous()
    batch, tokens = x.shape[0], x.shape[-2]
    dim = x.shape[-1] * (parts if join else 1)
    out = x.new_empty((batch, tokens, dim) if join else (batch, parts, tokens, dim // parts))
    block = triton.next_power_of_2(dim)
    parts_kernel[(batch * tokens,)](
        x, out, heads, tokens, dim, HEAD_DIM=head_dim, PARTS=parts, ORDERED=heads is not None, JOIN=join, BLOCK=block,
        num_warps=min(8, max(1, block // 1024)),
    )  # fmt: skip
    return out
