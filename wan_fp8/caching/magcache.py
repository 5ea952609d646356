"""MagCache: skip while the magnitude of the residual, known from a curve, has moved little (arXiv:2506.09045).

The decisions of a run are fixed before it begins: they follow from the curve and the noise levels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ..errors import InputError
from .curves import UNKNOWN, Curve, mismatch, published_for
from .policy import FEW_STEPS, Decision, Policy, RunPlan, Tracker, few_steps
from .rule import decide, is_allowed

Phase = Literal["in_phase", "published"]
PHASES: tuple[Phase, ...] = get_args(Phase)

PRESETS: dict[str, tuple[float, int, float]] = {
    "E012K2R20": (0.12, 2, 0.2),
    "E024K2R10": (0.24, 2, 0.1),
    "E006K2R10": (0.06, 2, 0.1),
    "E006K2R20": (0.06, 2, 0.2),
    "E006K2R40": (0.06, 2, 0.4),
    "E004K2R20": (0.04, 2, 0.2),
}
"""Threshold, skips in a row and retention. The last four are the authors': recommended for I2V-A14B, TI2V-5B and
T2V-A14B, and the default of their command line."""


@dataclass(frozen=True)
class MagCache(Policy):
    """Thresholds of the published rule.

    Two things differ from the published code unless ``phase`` is ``published``. Cond and uncond are skipped at the same
    steps, by the worse of their two errors: skipped out of phase, guidance takes the difference of two steps. And the
    two experts share no state: errors of one say nothing about the residuals of the other.
    """

    name: ClassVar[str] = "MagCache"
    phase: Phase = "in_phase"
    curve: Curve | None = None
    """None: the published one of the model's task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.phase not in PHASES:
            raise InputError(f"phase must be one of {', '.join(PHASES)}; got {self.phase!r}")

    def curve_of(self, plan: RunPlan) -> Curve | None:
        """The curve that a run follows; None where there is none."""
        return self.curve or published_for(plan.spec, per_frame=plan.per_frame)

    def refusal(self, plan: RunPlan) -> str | None:
        curve, spec = self.curve_of(plan), plan.spec
        reason = mismatch(curve, spec)
        if curve is None or (reason is not None and (self.curve is None or curve.task != spec.task)):
            return f"{reason}: measure one with Wan2.2 Calibrate MagCache, or remove the cache"
        part = plan.schedule[plan.first : plan.end + 1]
        total = plan.steps
        if plan.is_whole:  # perhaps one of core's two samplers, which knows its own steps only: as fine as what run?
            total = round(len(curve.sigmas) / max(curve.coarseness(part), 1e-9))
        if total <= FEW_STEPS and not curve.models:
            return few_steps(self.name, total)
        both_sides = curve.side(part[0]) == "high_noise" and curve.side(part[-2]) == "low_noise" and part[-1] == 0
        if plan.is_whole and plan.expert is None and both_sides:
            return (
                f"the curve '{curve.name}' is of two experts, and one model runs every step of this run: run both, or "
                "measure a curve of this run with Wan2.2 Calibrate MagCache"
            )
        return None

    def start(self, plan: RunPlan) -> ScheduledTracker:
        return ScheduledTracker(self, plan)

    def describe(self) -> str:
        how = "cond and uncond together" if self.phase == "in_phase" else "cond and uncond apart, as published"
        return f"{super().describe()}, {how}, curve: {'published' if self.curve is None else self.curve.name}"


class ScheduledTracker(Tracker):
    """The decisions of one model's part of a run, made in advance."""

    def __init__(self, setting: MagCache, plan: RunPlan) -> None:
        self.setting, self.plan = setting, plan
        curve = setting.curve_of(plan)
        assert curve is not None, "a plan that is not refused"
        self.curve: Curve = curve
        self.expert = plan.expert
        if self.curve.switch is None:
            self.expert = None
        elif self.expert is None:
            self.expert = self.curve.side(plan.schedule[plan.first])

    def decide(self, step: int, kind: int, key: Hashable, tokens_BSD: Tensor, kinds: frozenset[int]) -> Decision:
        del key, tokens_BSD
        alone = self.setting.phase == "in_phase" and kinds == {0}
        decisions = self.cond_alone if alone else self.decisions
        c = 2 * step + (kind > 0)
        return decisions.get(c) or Decision(False, outside=step > self.plan.first and self.ratio(c) == UNKNOWN)

    @cached_property
    def decisions(self) -> dict[int, Decision]:
        """Skipped passes of a run with guidance, as ``2 * step + (0 cond, 1 uncond)``."""
        if self.setting.phase == "published":
            return self._decided([[c] for c in range(2 * self.plan.steps)])
        return self._decided([[2 * step, 2 * step + 1] for step in range(self.plan.steps)])

    @cached_property
    def cond_alone(self) -> dict[int, Decision]:
        """The same without guidance: by cond's ratios only."""
        return self._decided([[2 * step] for step in range(self.plan.steps)])

    def _decided(self, groups: list[list[int]]) -> dict[int, Decision]:
        plan = self.plan
        mine = range(2 * plan.first, 2 * plan.end)
        if self.setting.phase == "in_phase":
            groups = [group for group in groups if group[0] in mine]
        found = decide(
            groups,
            self.ratio,
            self.allowed,
            threshold=self.setting.threshold,
            max_skips=self.setting.max_skips,
        )
        return {c: decision for c, decision in found.items() if c in mine}

    @cached_property
    def allowed(self) -> Callable[[int], bool]:
        """The published windows; of a run whose other part is not known, those of this part by itself."""
        plan, mode, total = self.plan, str(self.plan.spec.task), 2 * self.plan.steps
        if self.curve.switch is None or not plan.spec.task.two_experts:
            mode, split = "ti2v", 0
        elif plan.is_whole:
            split = total if self.expert == "high_noise" else 0
        else:
            split = 2 * plan.end if self.expert == "high_noise" else 2 * plan.first
        # the first step of a model has no residual to take the place of its blocks, whatever the window says
        return lambda c: c // 2 not in (0, plan.first) and is_allowed(c, mode, split, total, self.setting.retention)

    def ratio(self, c: int) -> float:
        """The curve's ratio for pass ``c``; 1 at the first step, which has nothing before it."""
        step, plan = c // 2, self.plan
        if step == 0:
            return 1.0
        expert = self.expert
        if not plan.is_whole and expert is not None:
            switch = plan.end if expert == "high_noise" else plan.first
            if step == switch:
                return UNKNOWN  # residuals of two models
            expert = "high_noise" if step < switch else "low_noise"
        return self.curve.ratio(plan.schedule[step - 1], plan.schedule[step], c % 2, expert)
