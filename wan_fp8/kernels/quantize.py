"""Activations to e4m3, with an optional GELU in front: row by row, with one scale for the tensor, or in blocks of 128.

``x ~= qdata * scale``. A row fits in registers, so that its scale comes free in one pass over memory; one scale for
the whole tensor needs either a scale from before (then its maximum is collected on the way) or a pass of its own.

    row      one scale a token                          [tokens, 1]
    tensor   one scale                                  [1]
    block    one scale for 128 channels of a token      [D / 128, tokens], the layout that cuBLAS multiplies from
    mx       one power of two for 32 channels           [tokens, D / 32] in E8M0 (MXFP8)

Eager references here, Triton beside it (not for ``mx``). Values are clamped before every cast: up to torch 2.12 a cast
makes NaN of what exceeds 448.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from . import accumulate_dtype, refusal

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
TINY = 1e-12
"""Smallest maximum that a scale is made of: a row of zeros stays zeros."""
BLOCK = 128
"""Channels of an activation, or rows and columns of a weight, that share a scale under block scaling."""
MX_BLOCK = 32
"""Input channels that share a scale in MXFP8."""
E8M0: torch.dtype | None = getattr(torch, "float8_e8m0fnu", None)
"""Eight bits of exponent, nothing else: the scales of MXFP8. None before torch 2.7."""


class Granularity(StrEnum):
    """What shares one scale."""

    TENSOR = "tensor"
    ROW = "row"
    BLOCK = "block"
    MX = "mx"


@dataclass(frozen=True, slots=True)
class QuantizedActivation:
    """An activation that is cast already, on its way from the kernel that made it to the linears that read it."""

    qdata: Tensor
    """[..., D] e4m3."""
    scale: Tensor
    """fp32 (``mx``: E8M0); see the module's table."""
    granularity: Granularity
    dtype: torch.dtype
    """Type that the values had; a GEMM answers in it."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the values."""
        return self.qdata.shape

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.qdata.device

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that the bytes stand for: multiplied in fp32 at least and rounded once, without a spread-out
        scale."""
        value = self.qdata.flatten(0, -2).to(dtype)  # exact: every floating type has room for e4m3
        scale = self.scale.to(torch.promote_types(dtype, torch.float32))
        if self.granularity is Granularity.BLOCK:
            value.unflatten(1, (-1, BLOCK)).mul_(scale[:, : value.shape[0]].t()[..., None])
        elif self.granularity is Granularity.MX:
            value.unflatten(1, (-1, MX_BLOCK)).mul_(scale[..., None])
        else:
            value.mul_(scale.reshape(-1, 1))  # two dimensions: a scalar would be rounded to ``dtype`` first
        return value.view(self.qdata.shape)


@dataclass(frozen=True, slots=True)
class Cast:
    """What a fused kernel does with its result before it stores it."""

    granularity: Granularity | None
    """None: store in high precision."""
    power_of_2: bool = False
    """Round scales down to powers of two (block scaling only), as Transformer Engine does by default."""
    multiplier: Tensor | None = None
    """[1] fp32: what values are multiplied by under one scale for the tensor."""
    dequant: Tensor | None = None
    """[1] fp32: its inverse."""
    amax: Tensor | None = None
    """[1] fp32: raised to the largest magnitude seen, that of the stored values where they stay in high precision."""
    padding: tuple[int, int] | None = None
    """(S, tokens): of the S rows of each sample only the first ``tokens`` count for ``amax``; applies to inputs of S
    rows."""


def counted(rows: Tensor, padding: tuple[int, int] | None, tokens: int) -> Tensor:
    """Of ``rows`` [B * S, ...], ``tokens`` being S, those that are no padding."""
    if padding is None or tokens != padding[0]:
        return rows
    return rows.unflatten(0, (-1, padding[0]))[:, : padding[1]]


def largest(magnitudes: Tensor) -> Tensor:
    """[1] fp32: the largest of them; 0 where there are none (a rank that holds nothing but padding)."""
    if magnitudes.numel() == 0:
        return torch.zeros(1, dtype=torch.float32, device=magnitudes.device)
    return magnitudes.amax().float().reshape(1)


# ---- activations ---------------------------------------------------------------------------------------------------


def quantize(x: Tensor, cast: Cast, *, gelu: bool = False, fused: bool | None = None) -> QuantizedActivation:
    """One pass over ``x`` [..., D].

    Args:
        cast: ``tensor`` granularity needs its multiplier (see ``quantize_current`` for a scale of this very tensor).
        gelu: put a GELU (tanh form) before the cast.
        fused: the Triton kernel or the eager reference; None takes Triton wherever it runs.
    """
    assert cast.granularity is not None
    if cast.granularity is Granularity.MX or not _use_triton(x, fused):
        return emit(_activated(x, gelu), cast, x.dtype)  # type: ignore[return-value]
    from ._quantize_triton import launch_quantize

    return launch_quantize(x, cast, gelu)


def quantize_current(
    x: Tensor,
    *,
    gelu: bool = False,
    amax: Tensor | None = None,
    fused: bool | None = None,
    padding: tuple[int, int] | None = None,
) -> QuantizedActivation:
    """One scale, from this tensor's own maximum: two passes over ``x``.

    Args:
        amax: [1] fp32 cell that is raised to the maximum.
        padding: as in ``Cast``.
    """
    largest = collect_amax(x, gelu=gelu, fused=fused, padding=padding)
    if amax is not None:
        torch.maximum(amax, largest, out=amax)
    multiplier = current_multiplier(largest)
    return quantize(x, Cast(Granularity.TENSOR, multiplier=multiplier, dequant=1 / multiplier), gelu=gelu, fused=fused)


def collect_amax(
    x: Tensor, *, gelu: bool = False, fused: bool | None = None, padding: tuple[int, int] | None = None
) -> Tensor:
    """[1] fp32: the largest magnitude of ``x`` [..., S, D], or of its GELU."""
    if not _use_triton(x, fused):
        values = counted(_activated(x, gelu).flatten(0, -2), padding, x.shape[-2])
        return largest(values.abs())
    from ._quantize_triton import launch_amax

    return launch_amax(x, gelu, padding)


def current_multiplier(amax: Tensor, margin: int = 0) -> Tensor:
    """``448 / amax / 2^margin``."""
    return E4M3_MAX / amax.clamp_min(TINY) / 2.0**margin


def emit(values: Tensor, cast: Cast | None, dtype: torch.dtype) -> Tensor | QuantizedActivation:
    """The eager end of a kernel: store ``values`` [..., D] (accumulation type) in ``dtype``, or cast."""
    if cast is None or cast.granularity is None:
        out = values.to(dtype)
        _raise_amax(cast, out)
        return out
    _raise_amax(cast, values)
    flat = values.flatten(0, -2).float()
    if cast.granularity is Granularity.TENSOR:
        assert cast.multiplier is not None and cast.dequant is not None
        scaled, scale = flat * cast.multiplier, cast.dequant
    elif cast.granularity is Granularity.ROW:
        multiplier, scale = _factors(flat.abs().amax(1, keepdim=True), False)
        scaled = flat * multiplier
    elif cast.granularity is Granularity.MX:
        blocks = flat.unflatten(1, (-1, MX_BLOCK))
        multiplier, scale = _factors(blocks.abs().amax(2, keepdim=True), True)
        scaled, scale = (blocks * multiplier).flatten(1), _to_e8m0(scale[..., 0])
    else:
        blocks = flat.unflatten(1, (-1, BLOCK))
        multiplier, scale = _factors(blocks.abs().amax(2, keepdim=True), cast.power_of_2)
        scaled, scale = (blocks * multiplier).flatten(1), scale[..., 0].t().contiguous()
    return QuantizedActivation(_to_e4m3(scaled).view(values.shape), scale, cast.granularity, dtype)


def _raise_amax(cast: Cast | None, values: Tensor) -> None:
    if cast is not None and cast.amax is not None:
        values = counted(values.flatten(0, -2), cast.padding, values.shape[-2])
        torch.maximum(cast.amax, largest(values.abs()), out=cast.amax)


def _factors(amax: Tensor, power_of_2: bool, limit: float = E4M3_MAX) -> tuple[Tensor, Tensor]:
    """Multiplier and scale for maxima of any shape."""
    amax = amax.clamp_min(TINY)
    if not power_of_2:
        # A tensor as divisor: by a number, a GPU multiplies by the reciprocal, and its scale differs in the last bit.
        return limit / amax, amax / torch.full_like(amax, limit)
    mantissa, exponent = torch.frexp(limit / amax)
    multiplier = torch.ldexp(torch.ones_like(mantissa), exponent - 1)
    return multiplier, 1 / multiplier


def _to_e4m3(scaled: Tensor) -> Tensor:
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def _to_e8m0(powers_of_2: Tensor) -> Tensor:
    assert E8M0 is not None, "Recipe refuses MXFP8 where torch has no E8M0"
    return powers_of_2.to(E8M0)


def _activated(x: Tensor, gelu: bool) -> Tensor:
    value = x.to(accumulate_dtype(x))
    return F.gelu(value, approximate="tanh") if gelu else value


def _use_triton(x: Tensor, fused: bool | None) -> bool:
    return refusal(x.device, x.dtype) is None if fused is None else fused


# ---- weights -------------------------------------------------------------------------------------------------------


def quantize_weight(
    weight: Tensor, granularity: Granularity, *, power_of_2: bool = False, dtype: torch.dtype = E4M3
) -> tuple[Tensor, Tensor]:
    """A weight [D_out, D_in] in FP8 and its scale: fp32 (), [D_out, 1] or [D_out / 128, D_in / 128], or for ``mx`` E8M0
    [D_out, D_in / 32]."""
    value = weight.float()
    if granularity is Granularity.MX:
        value, power_of_2 = value.unflatten(1, (-1, MX_BLOCK)), True
        amax = value.abs().amax(dim=2, keepdim=True)
    elif granularity is Granularity.BLOCK:
        value = value.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        amax = value.abs().amax(dim=(1, 3), keepdim=True)
    else:
        amax = value.abs().amax(1, keepdim=True) if granularity is Granularity.ROW else value.abs().amax()
    limit = torch.finfo(dtype).max
    multiplier, scale = _factors(amax, power_of_2, limit)
    qdata = (value * multiplier).clamp_(-limit, limit).to(dtype).view(weight.shape)
    if granularity is Granularity.MX:
        return qdata, _to_e8m0(scale[..., 0])
    return qdata, scale[:, 0, :, 0].contiguous() if granularity is Granularity.BLOCK else scale


def weight_granularity(scale: Tensor, weight_shape: torch.Size) -> Granularity:
    """What shares a scale of this shape (and type: E8M0 is MXFP8's alone)."""
    if scale.dtype == E8M0:
        assert scale.shape == (weight_shape[0], weight_shape[1] // MX_BLOCK), (scale.shape, weight_shape)
        return Granularity.MX
    if scale.numel() == 1 and scale.ndim < 2:
        return Granularity.TENSOR
    if scale.shape == (weight_shape[0], 1):
        return Granularity.ROW
    assert scale.shape == (weight_shape[0] // BLOCK, weight_shape[1] // BLOCK), (scale.shape, weight_shape)
    return Granularity.BLOCK


def spread_scale(scale: Tensor, weight_shape: torch.Size) -> Tensor:
    """A weight's scale, in fp32 and in a shape that multiplies the weight."""
    kind = weight_granularity(scale, weight_shape)
    if kind is Granularity.BLOCK:
        return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    if kind is Granularity.MX:
        return scale.float().repeat_interleave(MX_BLOCK, 1)
    return scale


def dequantized_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight's real values in ``dtype``: multiplied in fp32 at least and rounded once, without a spread-out scale."""
    value = weight.to(dtype)  # exact: every floating type has room for e4m3
    kind = weight_granularity(scale, weight.shape)
    factor = scale if scale.dtype == torch.float64 else scale.float()
    if kind is Granularity.BLOCK:
        value.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).mul_(factor[:, None, :, None])
    elif kind is Granularity.MX:
        value.unflatten(1, (-1, MX_BLOCK)).mul_(factor[..., None])
    else:
        value.mul_(factor.reshape(-1, 1))  # two dimensions: a scalar would be rounded to ``dtype`` first
    return value


def cublas_tiles(scale: Tensor) -> Tensor:
    """Scales [rows, groups] of MXFP8 in the order that cuBLAS reads them.

    Tiles of 128 rows and 4 groups, one after the other; in a tile the scales of rows r, r + 32, r + 64 and r + 96 lie
    side by side (``SWIZZLE_32_4_4``). Missing rows and groups are filled with scales that multiply nothing.
    """
    rows, groups = scale.shape
    tall, wide = -(-rows // 128), -(-groups // 4)
    bits = F.pad(scale.view(torch.uint8), (0, wide * 4 - groups, 0, tall * 128 - rows))
    tiles = bits.view(tall, 4, 32, wide, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(scale.dtype)
