"""The arithmetic of a Wan block as pure functions of tensors: eager, fp32 inside, and the reference for any fused
kernel.

B batch, S video tokens, L text tokens, D model width, N heads, E head width, R distinct timestep rows.
Source: Wan-Video/Wan2.2 ``wan/modules/model.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeOptions:
    """Stretch and shift of the token positions on each axis (time, rows y, columns x), in tokens."""

    scale_t: float = 1.0
    scale_y: float = 1.0
    scale_x: float = 1.0
    shift_t: float = 0.0
    shift_y: float = 0.0
    shift_x: float = 0.0


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """fp32 for every storage type up to fp32; fp64 stays fp64, so that a float64 model is an oracle."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Embed timesteps [R] (0..1000) as [R, dim] fp64: cosines first, angles and functions in fp64 as in the official
    code."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double()[:, None] * torch.pow(10000.0, -exponent)[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def layer_norm_modulate(x_BSD: Tensor, shift: Tensor, scale: Tensor, *, eps: float, out_dtype: torch.dtype) -> Tensor:
    """``LN(x) * (1 + scale) + shift`` without learned affine; shift and scale broadcast over [B, S, D]."""
    acc = accumulate_dtype(x_BSD)
    normed = F.layer_norm(x_BSD.to(acc), x_BSD.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(acc)) + shift.to(acc)).to(out_dtype)


def layer_norm_affine(
    x_BSD: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """LayerNorm with a learned gain and offset, in fp32."""
    acc = accumulate_dtype(x_BSD)
    return F.layer_norm(
        x_BSD.to(acc), x_BSD.shape[-1:], weight.to(acc), None if bias is None else bias.to(acc), eps
    ).to(out_dtype)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm over the last dimension, statistics and gain in fp32 and rounded once (the official code rounds before
    the gain)."""
    acc = accumulate_dtype(x)
    value = x.to(acc)
    return (value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * weight.to(acc)).to(x.dtype)


def rope_frequencies(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Angular frequencies of the time, row and column axes, fp64.

    A 128-wide head has 64 rotating pairs: 22 for time, 21 for rows, 21 for columns (``d - 4 * (d // 6)`` channels,
    then ``2 * (d // 6)`` twice).
    """
    spatial = 2 * (head_dim // 6)
    widths = (head_dim - 2 * spatial, spatial, spatial)
    time, rows, columns = (
        torch.pow(10000.0, -torch.arange(0, width, 2, dtype=torch.float64) / width) for width in widths
    )
    return time, rows, columns


def rope_table(positions_S3: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [S, E/2] of each token's rotation, from fp64 positions (time, row, column), rounded once to
    ``dtype``."""
    positions = positions_S3.double()
    frequencies = (f.to(positions.device) for f in rope_frequencies(head_dim))
    angles = torch.cat([positions[:, axis : axis + 1] * f for axis, f in enumerate(frequencies)], dim=1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x_BSNE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent channel pairs (2i, 2i+1) of every head by the token's angles."""
    acc = accumulate_dtype(x_BSNE)
    pairs = x_BSNE.to(acc).unflatten(-1, (-1, 2))
    real, imag = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None, :].to(acc), sin[:, None, :].to(acc)
    return torch.stack([real * cos - imag * sin, real * sin + imag * cos], dim=-1).flatten(-2).to(x_BSNE.dtype)


def gated_residual(x_BSD: Tensor, branch_BSD: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * branch`` in the accumulation type, stored in the type of ``x`` (the residual stream)."""
    acc = accumulate_dtype(x_BSD)
    return (x_BSD.to(acc) + branch_BSD.to(acc) * gate.to(acc)).to(x_BSD.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, the one of the FFN and of the text projection."""
    return F.gelu(x, approximate="tanh")


def residual(x_BSD: Tensor, branch_BSD: Tensor) -> Tensor:
    """``x + branch`` in the accumulation type, stored in the type of ``x``."""
    acc = accumulate_dtype(x_BSD)
    return (x_BSD.to(acc) + branch_BSD.to(acc)).to(x_BSD.dtype)


def grid_positions(grid: tuple[int, int, int], options: RopeOptions | None = None) -> Tensor:
    """Positions [S, 3] fp64 of a (time, rows, columns) grid, time slowest; stretched and shifted by ``options``."""
    if options is None:
        axes = [torch.arange(n, dtype=torch.float64) for n in grid]
    else:
        scales = (options.scale_t, options.scale_y, options.scale_x)
        shifts = (options.shift_t, options.shift_y, options.shift_x)
        axes = [
            torch.linspace(shift, shift + (n - 1.0) * scale, steps=n, dtype=torch.float64)
            for n, scale, shift in zip(grid, scales, shifts, strict=True)
        ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
