"""Add a gated branch to the residual stream, then LayerNorm and modulate it: one pass over memory.

    x   <- x + gate * branch
    out <- LayerNorm(x) * (scale + one) + shift

``gate``, ``scale`` and ``shift`` are rows of small fp32 tables [R, D]; a token finds its row through ``row_of_token``
[B * S], or is in row
``token // S`` (one row per sample) when that is None, or always in row 0 for a learned affine norm. Arithmetic is fp32
throughout.

Traffic per element: read stream and branch, write stream and ``out``. Eager PyTorch makes ten passes of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import accumulate_dtype
from .quantize import Cast, QuantizedActivation, emit

NUM_WARPS = 8
"""Warps that share one row of a full-size model."""


@dataclass(frozen=True, slots=True)
class NormTable:
    """Scale and shift of a norm: modulation rows found by token (``one`` = 1), or a learned gain and offset (``one`` =
    0)."""

    scale_RD: Tensor
    shift_RD: Tensor
    modulated: bool


def gated_residual(x_BSD: Tensor, branch_BSD: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * branch`` in the accumulation type, stored in the type of ``x`` (the residual stream)."""
    acc = accumulate_dtype(x_BSD)
    return (x_BSD.to(acc) + branch_BSD.to(acc) * gate.to(acc)).to(x_BSD.dtype)


def residual(x_BSD: Tensor, branch_BSD: Tensor) -> Tensor:
    """``x + branch`` in the accumulation type, stored in the type of ``x``."""
    acc = accumulate_dtype(x_BSD)
    return (x_BSD.to(acc) + branch_BSD.to(acc)).to(x_BSD.dtype)


def layer_norm_modulate(x_BSD: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """``LN(x) * (1 + scale) + shift`` without learned affine; shift and scale broadcast over [B, S, D]."""
    acc = accumulate_dtype(x_BSD)
    normed = F.layer_norm(x_BSD.to(acc), x_BSD.shape[-1:], eps=eps)
    return normed * (1 + scale.to(acc)) + shift.to(acc)


def layer_norm_affine(x_BSD: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> Tensor:
    """LayerNorm with a learned gain and offset, in fp32."""
    acc = accumulate_dtype(x_BSD)
    return F.layer_norm(x_BSD.to(acc), x_BSD.shape[-1:], weight.to(acc), None if bias is None else bias.to(acc), eps)


def eager(
    x_BSD: Tensor,
    branch_BSD: Tensor | None,
    gate_RD: Tensor | None,
    table: NormTable | None,
    row_of_token: Tensor | None,
    *,
    eps: float,
    out_dtype: torch.dtype,
    in_place: bool,
    cast: Cast | None = None,
) -> tuple[Tensor, Tensor | QuantizedActivation | None]:
    """The reference, in separate torch operations. See ``fused`` for the arguments."""
    del in_place

    def spread(rows: Tensor) -> Tensor:
        return rows[:, None] if row_of_token is None else rows[row_of_token]

    if branch_BSD is not None:
        gate = None if gate_RD is None else spread(gate_RD)
        x_BSD = residual(x_BSD, branch_BSD) if gate is None else gated_residual(x_BSD, branch_BSD, gate)
    if table is None:
        return x_BSD, None
    if table.modulated:
        shift, scale = spread(table.shift_RD), spread(table.scale_RD)
        return x_BSD, emit(layer_norm_modulate(x_BSD, shift, scale, eps=eps), cast, out_dtype)
    gain, offset = table.scale_RD[0], table.shift_RD[0]
    return x_BSD, emit(layer_norm_affine(x_BSD, gain, offset, eps=eps), cast, out_dtype)


def fused(
    x_BSD: Tensor,
    branch_BSD: Tensor | None,
    gate_RD: Tensor | None,
    table: NormTable | None,
    row_of_token: Tensor | None,
    *,
    eps: float,
    out_dtype: torch.dtype,
    in_place: bool,
    cast: Cast | None = None,
) -> tuple[Tensor, Tensor | QuantizedActivation | None]:
    """One Triton pass.

    Args:
        x_BSD: residual stream, contiguous, bf16 or fp32.
        branch_BSD: what to add, contiguous; None to norm only.
        gate_RD: rows that multiply the branch; None for a plain sum.
        table: how to norm; None to add only.
        row_of_token: [B, S] integer row of each token; None: sample b uses row b.
        eps: added to the variance.
        out_dtype: type of the normed result.
        in_place: write the new stream over ``x_BSD``; False leaves ``x_BSD`` as it was.
        cast: store the normed result in FP8, or collect its maximum, in the same pass.
    Returns:
        The new residual stream (``x_BSD`` itself if nothing was added) and the normed result (None without ``table``).
    """
    import triton

    from . import _quantize_triton as quantized
    from ._residual_norm_triton import residual_norm_kernel

    batch, tokens, dim = x_BSD.shape
    assert x_BSD.is_contiguous() and (branch_BSD is None or branch_BSD.is_contiguous())
    x_out = x_BSD if branch_BSD is None or in_place else torch.empty_like(x_BSD)
    out, out_scale, amax = (None, None, None) if table is None else quantized.outputs(x_BSD, cast, out_dtype)
    scale, shift, modulated = (
        (None, None, False) if table is None else (table.scale_RD, table.shift_RD, table.modulated)
    )
    rows = None if row_of_token is None else row_of_token.to(torch.int32)
    head = 1 << (dim.bit_length() - 1)
    tail = 0 if head == dim else max(quantized.NARROWEST, triton.next_power_of_2(dim - head))
    residual_norm_kernel[(batch * tokens,)](
        x_BSD, branch_BSD, gate_RD, scale, shift, rows, x_out, out,
        out_scale, None if cast is None else cast.multiplier, amax,
        tokens, dim,
        0 if gate_RD is None else gate_RD.stride(0),
        scale.stride(0) if scale is not None and modulated else 0,
        EPS=eps, ADD=branch_BSD is not None, GATED=gate_RD is not None, NORM=table is not None,
        MODULATED=modulated, HAS_ROWS=rows is not None,
        MODE=quantized.MODES[None if cast is None else cast.granularity],
        POWER_OF_2=cast is not None and cast.power_of_2, COLLECT=amax is not None,
        HEAD=head, TAIL=tail, num_warps=min(NUM_WARPS, max(1, head // 512)),
    )  # fmt: skip
    return x_out, None if out is None else quantized.finish(out, out_scale, amax, cast, out_dtype)
