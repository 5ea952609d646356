"""Every n-th step computed, the others on the line through the last two residuals: TaylorSeer's first order
(arXiv:2503.06923) on the residual of the whole stack instead of on every layer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .policy import COMPUTE, Decision, Policy, Reuse, RunPlan, Tracker


@dataclass(frozen=True)
class Taylor(Policy):
    """``max_skips`` steps are skipped after each computed one; ``threshold`` is not used. Two residuals are kept."""

    name: ClassVar[str] = "Taylor"
    reuse: Reuse = "linear"

    def start(self, plan: RunPlan) -> TaylorTracker:
        return TaylorTracker(self, plan)


class TaylorTracker(Tracker):
    """A fixed rhythm; the first steps and the last one are computed."""

    def __init__(self, setting: Taylor, plan: RunPlan) -> None:
        self.rhythm = setting.max_skips + 1
        self.earliest = plan.first + max(2, int((plan.end - plan.first) * setting.retention))
        self.last = plan.end - 1

    def decide(self, step: int, kind: int, key: Hashable, tokens_BSD: Tensor, kinds: frozenset[int]) -> Decision:
        del kind, key, tokens_BSD, kinds
        if not self.earliest <= step < self.last:
            return COMPUTE
        return Decision((step - self.earliest + 1) % self.rhythm != 0)
