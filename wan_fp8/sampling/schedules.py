"""Noise schedules of the published pipelines: sigma (noise level, 0..1) and the integer timestep that the model sees.

The published solvers do not share one grid: UniPC starts just below pure noise, DPM++ at pure noise. Both warp an
even grid u by the shift k, ``S(u) = k u / (1 + (k - 1) u)``.

Source: Wan-Video/Wan2.2 ``wan/utils/fm_solvers_unipc.py`` and ``wan/utils/fm_solvers.py`` (``set_timesteps``,
``get_sampling_sigmas``).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError

SolverName = Literal["unipc", "dpm++", "euler"]
SOLVER_NAMES: tuple[SolverName, ...] = get_args(SolverName)

TRAIN_TIMESTEPS = 1000
"""The model's timestep is 1000 sigma."""

_GRID_START: dict[str, float] = {
    # The published class reads its largest training sigma, 1 - 1/1000, back from a float32 table.
    "unipc": torch.tensor(1 - 1 / TRAIN_TIMESTEPS, dtype=torch.float32).item(),
    "dpm++": 1.0,
    # Four-step distilled models: sigma 1, .9375, .8333, .625 at shift 5. The same grid as DPM++.
    "euler": 1.0,
}


def check_solver(solver: str) -> None:
    """Raise InputError unless ``solver`` is one of SOLVER_NAMES."""
    if solver not in _GRID_START:
        raise InputError(f"solver must be one of {', '.join(SOLVER_NAMES)}; got {solver!r}")


def shift_sigmas(grid: Tensor, shift: float) -> Tensor:
    """Warp an even grid in 0..1 towards high noise: ``shift * u / (1 + (shift - 1) * u)``; shift 1 changes nothing."""
    if not (math.isfinite(shift) and shift > 0):
        raise InputError(f"shift must be a number above 0; got {shift}. The published values are 12, 5 and 3")
    return shift * grid / (1 + (shift - 1) * grid)


def sigmas(steps: int, shift: float, solver: str = "unipc") -> Tensor:
    """The noise levels before each step, and the terminal 0.

    Args:
        steps: Number of model evaluations, at least 1.
        shift: Schedule warp, above 0 (published: T2V-A14B 12, I2V-A14B 5, TI2V-5B 5).
        solver: "unipc", "dpm++" or "euler"; each has its own first sigma.
    Returns:
        [steps + 1] float64 on the CPU, strictly decreasing, in 0..1.
    Raises:
        InputError: steps, shift or solver is not allowed.
    Numerics: bit-equal to the float64 grid of the published code, which then stores float32.
    """
    check_solver(solver)
    if steps < 1 or steps != int(steps):
        raise InputError(f"steps must be a whole number of at least 1; got {steps}")
    steps = int(steps)
    start = _GRID_START[solver]
    # Operation by operation what numpy.linspace(start, 0, steps + 1) does, so that truncation to timesteps agrees.
    grid = torch.arange(steps, dtype=torch.float64) * (-start / steps) + start
    return torch.cat([shift_sigmas(grid, shift), torch.zeros(1, dtype=torch.float64)])


def timesteps(steps: int, shift: float, solver: str = "unipc") -> Tensor:
    """The timestep given to the model at each step: 1000 sigma, truncated in float64.

    Truncating float32 sigmas would move some DPM++ timesteps by one.

    Returns:
        [steps] int64 on the CPU. Neighbours may coincide in long schedules (from 92 steps at shift 12): index by step.
    Raises:
        InputError: as ``sigmas``.
    """
    return (sigmas(steps, shift, solver)[:-1] * TRAIN_TIMESTEPS).to(torch.int64)
