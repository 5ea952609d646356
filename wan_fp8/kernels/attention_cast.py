"""Q, K and V for an FP8 attention kernel: token means of K and V taken out, one scale per head, cast to e4m3.

Exact in real arithmetic: softmax does not see a shift common to all keys, and its rows sum to one, so that the mean of
V only has to be added to
the output. Without it the FP8 tensor cores, which keep about 13 bits of their sums, lose weight over tens of thousands
of keys (relative error
0.114 at 16,384 keys and a mean of 0.5; 0.0015 with the means taken out).

``x ~= qdata * scale``; scales are [B, N] as FlashAttention 3 takes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3_MAX = 448.0
TINY = 1e-12
SAMPLED_FROM = 4096
"""Queries from which on the scale of Q comes from every sixteenth of them. Q has no mean to take out, so that this
spares a reading of it; K and V have to be read for their means."""
SAMPLE_STEP = 16
HEADROOM = 4.0
"""How far a query may exceed the largest sampled one before it is clamped. E4M3 is a floating point format: two bits
of exponent cost no precision. The largest of 75,600 x 128 normal values is 1.1 times that of a sixteenth of them."""


def sampled_queries(q_BSNE: Tensor) -> tuple[Tensor, float]:
    """The queries that the scale of Q is made from (a view), and the headroom that it gets."""
    if q_BSNE.shape[1] < SAMPLED_FROM:
        return q_BSNE, 1.0
    return q_BSNE[:, ::SAMPLE_STEP], HEADROOM


@dataclass(frozen=True, slots=True)
class CastQKV:
    """Operands of an FP8 attention and what its output lacks."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    v_mean_BNE: Tensor
    """fp32; to be added to every row of the output."""


def eager(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor, *, smooth: bool = True) -> CastQKV:
    """The reference. ``smooth=False`` keeps the means in: the known failure, for tests."""

    def cast(x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        value = x.float() if mean is None else x.float() - mean[:, None]
        seen, headroom = sampled_queries(value) if x is q_BSNE else (value, 1.0)
        scale = (seen.abs().amax(dim=(1, 3)) / E4M3_MAX).clamp_min(TINY) * headroom
        scaled = (value / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
        return scaled.to(torch.float8_e4m3fn), scale

    k_mean, v_mean = (x.float().mean(1) if smooth else None for x in (k_BLNE, v_BLNE))
    q, q_scale = cast(q_BSNE, None)
    k, k_scale = cast(k_BLNE, k_mean)
    v, v_scale = cast(v_BLNE, v_mean)
    zero = torch.zeros_like(v_BLNE[:, 0], dtype=torch.float32)
    return CastQKV(q, k, v, q_scale, k_scale, v_scale, zero if v_mean is None else v_mean)


def fused(q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor) -> CastQKV:
    """The same in two Triton passes: statistics, then the casts. Reads K and V twice and Q once."""
    from ._attention_cast_triton import cast, statistics

    batch, _, heads, width = q_BSNE.shape
    outputs = []
    for x, smooth in ((q_BSNE, False), (k_BLNE, True), (v_BLNE, True)):
        seen, headroom = (x, 1.0) if smooth else sampled_queries(x)
        mean, scale = statistics(seen, smooth)
        scale *= headroom
        outputs.append((cast(x, mean, scale), scale, mean))
    (q, q_scale, _), (k, k_scale, _), (v, v_scale, v_mean) = outputs
    return CastQKV(q, k, v, q_scale, k_scale, v_scale, v_mean.view(batch, heads, width))


def add_mean_(out_BSNE: Tensor, v_mean_BNE: Tensor, *, use_triton: bool) -> Tensor:
    """Add the mean of V back, in place, summed in fp32."""
    if use_triton:
        from ._attention_cast_triton import add_rows_

        return add_rows_(out_BSNE, v_mean_BNE)
    return out_BSNE.copy_(out_BSNE.float() + v_mean_BNE[:, None])
