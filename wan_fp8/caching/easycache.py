"""EasyCache: skip while the output has, by estimate, changed little since it was last computed (arXiv:2507.02860).

The estimate is measured in the run itself, so no curve is needed: how fast the output moves when the input does, at
the last two computed steps, times how far the input has moved since. Input and output are the tokens before and
after all blocks; every ``STRIDE``-th of them is looked at. The first conditioning of a step decides for all. What was
measured stays on the device until a decision needs it, so that the host waits once for each step that may be skipped.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .policy import COMPUTE, Decision, Policy, RunPlan, Tracker

STRIDE = 16


@dataclass(frozen=True)
class EasyCache(Policy):
    """``threshold`` is the summed relative change of the output; the last step is always computed."""

    name: ClassVar[str] = "EasyCache"
    looks_at_tokens: ClassVar[bool] = True

    def start(self, plan: RunPlan) -> EasyTracker:
        return EasyTracker(self, plan)


class EasyTracker(Tracker):
    """Follows one conditioning: the first one that a run brings."""

    def __init__(self, setting: EasyCache, plan: RunPlan) -> None:
        self.setting = setting
        self.earliest = plan.first + max(2, int((plan.end - plan.first) * setting.retention))
        self.last = plan.end - 1
        self.leader: Hashable | None = None
        self.decided: tuple[int, Decision] = (-1, COMPUTE)
        self.seen: Tensor | None = None
        """Tokens of the leader's last step."""
        self.output: Tensor | None = None
        self.input: Tensor | None = None
        """Of its last computed step."""
        self.changes: tuple[Tensor, Tensor] | None = None
        """Of input and output between its last two computed steps: scalars on the device."""
        self.error, self.count = 0.0, 0

    def decide(self, step: int, kind: int, key: Hashable, tokens_BSD: Tensor, kinds: frozenset[int]) -> Decision:
        del kind, kinds
        self.leader = key if self.leader is None else self.leader
        if self.decided[0] != step:
            self.decided = step, self._decide(step, tokens_BSD) if key == self.leader else COMPUTE
        return self.decided[1]

    def _decide(self, step: int, tokens_BSD: Tensor) -> Decision:
        now = _sample(tokens_BSD)
        moved = None if self.seen is None or self.seen.shape != now.shape else (now - self.seen).abs().mean()
        self.seen = now
        if moved is None or self.changes is None or self.output is None or not self.earliest <= step < self.last:
            return COMPUTE
        entered, left, share = torch.stack([*self.changes, moved / self.output.abs().mean()]).tolist()  # one transfer
        if entered <= 0:
            return COMPUTE
        self.error += left / entered * share
        self.count += 1
        if self.error < self.setting.threshold and self.count <= self.setting.max_skips:
            return Decision(True, error=self.error)
        self.error, self.count = 0.0, 0
        return COMPUTE

    def computed(self, step: int, kind: int, key: Hashable, before_BSD: Tensor, after_BSD: Tensor) -> None:
        del step, kind
        if key != self.leader:
            return
        entered, left = _sample(before_BSD), _sample(after_BSD)
        if self.input is not None and self.output is not None and self.input.shape == entered.shape:
            self.changes = (entered - self.input).abs().mean(), (left - self.output).abs().mean()
        self.input, self.output = entered, left


def _sample(tokens_BSD: Tensor) -> Tensor:
    return tokens_BSD[:, ::STRIDE].to(torch.float32, copy=True)  # what they are part of is written over
