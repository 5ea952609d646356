"""RMSNorm over the full model width, then the rotary turn of every head: queries and keys in one pass, in place.

Wan norms q and k across all heads together (not per head), so the whole row of a token has to be in hand before it can
be turned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import accumulate_dtype
from .parts import cut


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm over the last dimension, statistics and gain in fp32 and rounded once (the official code rounds before
    the gain)."""
    acc = accumulate_dtype(x)
    value = x.to(acc)
    return (value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * weight.to(acc)).to(x.dtype)


def apply_rope(x_BSNE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent channel pairs (2i, 2i+1) of every head by the token's angles."""
    acc = accumulate_dtype(x_BSNE)
    pairs = x_BSNE.to(acc).unflatten(-1, (-1, 2))
    real, imag = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None, :].to(acc), sin[:, None, :].to(acc)
    return torch.stack([real * cos - imag * sin, real * sin + imag * cos], dim=-1).flatten(-2).to(x_BSNE.dtype)


def eager(
    x_BSD: Tensor,
    weight: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    *,
    head_dim: int,
    eps: float,
    parts: int = 1,
    heads: Tensor | None = None,
) -> Tensor:
    """The reference: norm, then turn, then cut. Rounds to the tensor's type in between, as separate operations do."""
    y = rms_norm(x_BSD, weight, eps=eps)
    if rope is not None:
        y = apply_rope(y.unflatten(-1, (-1, head_dim)), *rope).flatten(2)
    return y if parts == 1 else cut(y, parts, heads, head_dim=head_dim)


def fused_(
    x_BSD: Tensor,
    weight: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    *,
    head_dim: int,
    eps: float,
    parts: int = 1,
    heads: Tensor | None = None,
) -> Tensor:
    """One Triton pass over a contiguous [B, S, D] tensor, overwriting it; or, with ``parts`` P, into a new tensor
    [B, P, S, D / P].

    Args:
        x_BSD: output of the q or k projection.
        weight: gain [D].
        rope: cosine and sine [S, E/2] fp32, or None to norm only (cross-attention).
        head_dim: E.
        eps: added to the mean square.
        parts, heads: as ``parts.cut`` has them; ``heads`` with ``parts`` only.
    """
    import triton

    from ._rms_rope_triton import rms_rope_kernel

    batch, tokens, dim = x_BSD.shape
    assert x_BSD.is_contiguous() and weight.is_contiguous()
    assert heads is None or parts > 1, "heads change places where the row is cut"
    cos, sin = (None, None) if rope is None else rope
    block = triton.next_power_of_2(dim)
    out = x_BSD if parts == 1 else x_BSD.new_empty(batch, parts, tokens, dim // parts)
    rms_rope_kernel[(batch * tokens,)](
        x_BSD, out, weight, cos, sin, heads, tokens, dim, EPS=eps, HEAD_DIM=head_dim, ROPE=rope is not None,
        PARTS=parts, ORDERED=heads is not None, BLOCK=block, num_warps=min(8, max(1, block // 1024)),
    )  # fmt: skip
    return out


def check_rope(rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Tables as the kernel reads them: contiguous fp32."""
    cos, sin = rope
    return cos.to(torch.float32).contiguous(), sin.to(torch.float32).contiguous()
