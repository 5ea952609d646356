"""Where a forward stands in its sampling run: what a cache of steps needs to know, and no forward can see by itself."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


def step_at(sigma: float, schedule: Sequence[float]) -> int:
    """Index of the step that an evaluation at ``sigma`` belongs to; one between two sigmas belongs to the later step.

    Args:
        schedule: [steps + 1] decreasing noise levels, the terminal one last.
    """
    return min(sum(s > sigma * (1 + 1e-6) for s in schedule[:-1]), len(schedule) - 2)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """One of the conditionings that share a forward's batch."""

    key: Hashable
    """The same from step to step of one run, and different for any two passes of a step that may differ."""
    kind: int = 0
    """0: what the video shows (cond). 1: what guidance steers away from (uncond)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPosition:
    """One forward in its run. Steps are counted by noise level, never by calls."""

    sigma: float
    schedule: tuple[float, ...]
    """[steps + 1] noise levels of the run, as much of it as the caller knows; decreasing, the terminal one last."""
    conditionings: tuple[Conditioning, ...]
    """One for each equal part of the batch, in order."""
    share: tuple[int, int] | None = None
    """First step of ``schedule`` that this model serves, and the one after its last; None: all of them."""
    elsewhere: frozenset[int] = frozenset()
    """Kinds of this step's conditionings that other ranks compute at the same time."""
    expert: str | None = None
    """``high_noise`` or ``low_noise`` where the caller knows which of two experts the model is."""

    @property
    def step(self) -> int:
        """Index of this forward's step in ``schedule``."""
        return step_at(self.sigma, self.schedule)
