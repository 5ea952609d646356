"""Which of the two A14B experts runs at each step, and with which guidance.

Source: Wan-Video/Wan2.2 ``wan/text2video.py`` (``_prepare_model_for_timestep`` and the loop of ``generate``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..errors import InputError
from .schedules import TRAIN_TIMESTEPS

Expert = Literal["high_noise", "low_noise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """One step of a schedule."""

    index: int
    timestep: int
    """What the model is given, 0..1000."""
    expert: Expert | None
    """None for a model with one transformer."""
    guidance: float
    """``v = uncond + guidance * (cond - uncond)``."""


def high_noise_steps(timesteps: Tensor | Sequence[int], boundary: float | None) -> int:
    """How many leading steps belong to the high-noise expert: those with ``timestep >= 1000 boundary``.

    Args:
        timesteps: Truncated integer timesteps, as ``schedules.timesteps`` gives them.
        boundary: 0..1 (T2V-A14B 0.875, I2V-A14B 0.9), or None for a model with one transformer, which has none.
    Raises:
        InputError: the boundary is out of range, or high-noise steps follow low-noise ones.
    """
    flags = [_is_high_noise(t, boundary) for t in _as_list(timesteps)]
    count = sum(flags)
    if any(flags[count:]):
        raise InputError("timesteps must decrease: a high-noise step follows a low-noise one")
    return count


def plan_steps(
    timesteps: Tensor | Sequence[int], *, boundary: float | None, guidance: float | tuple[float, float]
) -> tuple[PlannedStep, ...]:
    """Expert and guidance of every step.

    Args:
        timesteps: [steps] integers.
        boundary: As in ``high_noise_steps``.
        guidance: One value for all steps, or (low noise, high noise), in the order of the published configs.
    Raises:
        InputError: the boundary is out of range, timesteps rise, or two guidances are given for a model with one
        transformer.
    """
    values = _as_list(timesteps)
    low, high = guidance if isinstance(guidance, tuple) else (guidance, guidance)
    if boundary is None and low != high:
        raise InputError(f"a model with one transformer takes one guidance; got {low} and {high}")
    switch = high_noise_steps(values, boundary)
    return tuple(
        PlannedStep(
            index=index,
            timestep=timestep,
            expert=None if boundary is None else "high_noise" if index < switch else "low_noise",
            guidance=high if index < switch else low,
        )
        for index, timestep in enumerate(values)
    )


def _as_list(timesteps: Tensor | Sequence[int]) -> list[int]:
    return timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)


def _is_high_noise(timestep: int, boundary: float | None) -> bool:
    if boundary is None:
        return False
    if not 0 <= boundary <= 1:
        raise InputError(f"boundary is a fraction of the noise range, 0..1; got {boundary}")
    return timestep >= boundary * TRAIN_TIMESTEPS
