"""Closed forms of the model that are computed once per forward or per shape: timestep sinusoid, token positions,
rotary angles.

The arithmetic inside the blocks stands in ``wan_fp8.kernels``, each fused kernel with its eager reference.
Source: Wan-Video/Wan2.2 ``wan/modules/model.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Embed timesteps [R] (0..1000) as [R, dim] fp64: cosines first, angles and functions in fp64 as in the official
    code."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double()[:, None] * torch.pow(10000.0, -exponent)[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


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
