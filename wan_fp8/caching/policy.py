"""What a cache of steps skips (a policy), apart from how (``step_cache``). A policy is one small file.

A ``Policy`` is a frozen setting. ``start`` makes a ``Tracker`` for one model in one run, which is asked before each
pass and shown what each computed pass did. A *pass* is one conditioning at one step. The mechanism owns residuals,
batches, memory and counting; a policy holds numbers, at most a few rows of tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ..errors import InputError
from ..models.specs import ModelSpec

Reuse = Literal["keep", "scale", "linear"]
REUSES: tuple[Reuse, ...] = get_args(Reuse)
"""What stands in for the blocks in a skipped pass. ``keep``: the last computed residual, as published. ``scale``: the
same times the magnitude that the curve predicts. ``linear``: the line through the last two computed residuals."""
ALMOST_NOISE = 0.99
"""A run that begins above this noise level begins at its first step."""
FEW_STEPS = 8
"""Up to this many steps nothing is worth skipping: neighbouring steps differ too much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """One model's part of a run, known before its first step."""

    spec: ModelSpec
    schedule: tuple[float, ...]
    """[steps + 1] noise levels, as much of the run as is known."""
    first: int
    end: int
    """The model serves the steps ``first`` to ``end - 1`` of ``schedule``."""
    expert: str | None = None
    per_frame: bool = False
    """TI2V from an image: the first frame has a timestep of its own."""

    @property
    def steps(self) -> int:
        """Steps of the part of the run that is known."""
        return len(self.schedule) - 1

    @property
    def is_whole(self) -> bool:
        """False for a part that is known to be one of two."""
        return self.first == 0 and self.end == self.steps


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one pass."""

    skip: bool
    scale: float = 1.0
    """Magnitude of this step's residual relative to the last computed one, where the policy knows it."""
    error: float = 0.0
    """The policy's estimate of the error that has piled up since the last computed pass, this one included."""
    outside: bool = False
    """Computed because the policy knows nothing about this noise level."""
    refused: bool = False
    """Computed although the policy would have skipped it: the mechanism had nothing to put in its place."""


COMPUTE = Decision(False)


class Tracker(ABC):
    """A policy at work: one model, one run, every conditioning."""

    expert: str | None = None
    """Which of two experts it takes the model for."""

    @abstractmethod
    def decide(self, step: int, kind: int, key: Hashable, tokens_BSD: Tensor, kinds: frozenset[int]) -> Decision:
        """Whether to skip a pass.

        Args:
            step: Index in the plan's schedule; never goes back within a tracker.
            kind: 0 cond, 1 uncond.
            key: Names the conditioning.
            tokens_BSD: Before the first block; not to be changed or kept.
            kinds: Every kind that the run has had so far, this one included.
        """

    def computed(self, step: int, kind: int, key: Hashable, before_BSD: Tensor, after_BSD: Tensor) -> None:
        """What the blocks made of a pass; the tensors are not to be changed or kept."""
        del step, kind, key, before_BSD, after_BSD


@dataclass(frozen=True)
class Policy(ABC):
    """A setting: what to skip."""

    name: ClassVar[str]
    """In reports and nodes."""
    looks_at_tokens: ClassVar[bool] = False
    """Decisions depend on what the passes hold, not on the schedule alone."""
    threshold: float = 0.12
    max_skips: int = 2
    """Skipped steps in a row."""
    retention: float = 0.2
    """Share of the steps at the start that is computed in any case."""
    reuse: Reuse = "keep"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise InputError(f"threshold is an error of at least 0 (published 0.04 to 0.24); got {self.threshold}")
        if self.max_skips < 0 or self.max_skips != int(self.max_skips):
            raise InputError(f"max_skips counts steps in a row from 0 (published 2); got {self.max_skips}")
        if not 0 <= self.retention <= 1:
            raise InputError(f"retention is a share of the steps, 0 to 1 (published 0.1 to 0.4); got {self.retention}")
        if self.reuse not in REUSES:
            raise InputError(f"reuse must be one of {', '.join(REUSES)}; got {self.reuse!r}")

    @property
    def depth(self) -> int:
        """Residuals kept for each conditioning."""
        return 2 if self.reuse == "linear" else 1

    def refusal(self, plan: RunPlan) -> str | None:
        """Why this run must not be cached, in a sentence that says what to do; None where it may."""
        # one of core's two samplers knows its own steps only; few of them may be part of many
        known = not plan.is_whole or (plan.schedule[0] > ALMOST_NOISE and plan.schedule[-1] == 0)
        return few_steps(self.name, plan.steps) if plan.steps <= FEW_STEPS and known else None

    @abstractmethod
    def start(self, plan: RunPlan) -> Tracker:
        """For one model in one run."""

    def describe(self) -> str:
        """The setting in words."""
        return (
            f"{self.name}: threshold {self.threshold:g}, at most {self.max_skips} skipped steps in a row, the first "
            f"{100 * self.retention:g} % computed, residual {self.reuse}"
        )


def few_steps(name: str, steps: int) -> str:
    """The refusal of a run with too few steps."""
    return (
        f"{name} cannot skip in a run of {steps} steps: up to {FEW_STEPS} steps (distilled LoRAs), neighbours differ "
        "too much for one to stand in for another; remove the cache, or take 20 steps or more without such a LoRA"
    )
