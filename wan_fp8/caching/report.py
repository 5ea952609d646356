"""What a cache did in one run of one model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .policy import Decision, Policy


@dataclass(slots=True)
class CacheReport:
    """Counts of passes: one conditioning at one step."""

    policy: Policy
    computed: int = 0
    skipped: int = 0
    steps: set[int] = field(default_factory=set)
    skipped_passes: set[int] = field(default_factory=set)
    """``2 * step + (0 cond, 1 uncond)``, steps counted in the schedule that the model was told."""
    computed_passes: set[int] = field(default_factory=set)
    """Likewise. A pass of which one window was computed and another skipped is in both."""
    refused: int = 0
    """Passes that the policy would have skipped, and could not: there was no residual of the last computed step, or the
    other conditioning of the batch had to be computed and the batch could not be divided."""
    outside: set[int] = field(default_factory=set)
    """Steps computed because the policy knows nothing about their noise level."""
    worst_error: float = 0.0
    """Largest error estimate at a skipped pass."""
    total_error: float = 0.0
    """Sum over skipped steps of the error that each added, the worst conditioning counted."""
    times: list[float] = field(default_factory=list)
    """Seconds that the blocks took in each computed pass; two in one batch share its time."""
    most_bytes: int = 0
    """Most memory that residuals took."""
    _before: dict[int, float] = field(default_factory=dict)

    def add(self, step: int, kind: int, decision: Decision) -> None:
        """Count one pass."""
        self.steps.add(step)
        if not decision.skip:
            self.computed += 1
            self.computed_passes.add(2 * step + (kind > 0))
            self.refused += decision.refused
            self._before[kind] = 0.0
            if decision.outside:
                self.outside.add(step)
            return
        self.skipped += 1
        self.skipped_passes.add(2 * step + (kind > 0))
        self.worst_error = max(self.worst_error, decision.error)
        self.total_error += max(0.0, decision.error - self._before.get(kind, 0.0))
        self._before[kind] = decision.error

    @property
    def seconds_of_pass(self) -> float:
        """Time of the blocks in a computed pass: the median, since compilation may be part of the first one."""
        return statistics.median(self.times) if self.times else 0.0

    @property
    def seconds_saved(self) -> float:
        """What the skipped passes would have taken in the blocks."""
        return self.skipped * self.seconds_of_pass

    def facts(self, expert: str | None = None) -> dict[str, Any]:
        """The same as plain data, for a receipt. Steps count from 1, in the schedule that the model was told."""

        def steps(passes: set[int]) -> dict[str, list[int]]:
            found = {"cond": 0, "uncond": 1}
            return {name: sorted(c // 2 + 1 for c in passes if c % 2 == kind) for name, kind in found.items()}

        return {
            "expert": expert,
            "policy": self.policy.name,
            "passes_computed": self.computed,
            "passes_skipped": self.skipped,
            "passes_refused": self.refused,
            "steps_computed": steps(self.computed_passes),
            "steps_skipped": steps(self.skipped_passes),
            "steps_outside": sorted(step + 1 for step in self.outside),
            "worst_error": self.worst_error,
            "total_error": self.total_error,
            "seconds_of_pass": self.seconds_of_pass,
            "seconds_saved": self.seconds_saved,
            "residuals_gib": self.most_bytes / 2**30,
        }

    def lines(self, who: str = "") -> list[str]:
        """The same in one to three sentences."""
        name, total = self.policy.name + (f" ({who})" if who else ""), self.computed + self.skipped
        lines = [
            f"{name}: {self.computed} of {total} passes computed, {self.skipped} skipped; {self.seconds_of_pass:.3g} s "
            f"a pass, about {self.seconds_saved:.3g} s saved"
        ]
        if self.skipped:
            estimate = ""
            if self.worst_error:
                estimate = f"error estimate at most {self.worst_error:.3f} of {self.policy.threshold:g} allowed, "
                estimate += f"{self.total_error:.3f} in all; "
            lines.append(f"{name}: {estimate}residuals took {self.most_bytes / 2**30:.2f} GiB")
        if self.outside:
            lines.append(f"{name}: {len(self.outside)} of {len(self.steps)} steps lie outside of the curve, computed")
        if self.refused:
            lines.append(
                f"{name}: {self.refused} passes computed that might have been skipped: nothing of the last computed "
                "step was there to take the place of the blocks, or their batch could not be divided"
            )
        return lines


def sum_line(facts: Sequence[dict[str, Any]], parts: str) -> str:
    """One sentence for a video of several runs.

    Args:
        facts: Of every run, as ``CacheReport.facts`` gives them (where a run had several settings, of each); one at
            least.
        parts: How many runs and what they are, as "3 segments".
    """
    policies = " and ".join(dict.fromkeys(entry["policy"] for entry in facts))
    computed, skipped = (sum(entry[f"passes_{name}"] for entry in facts) for name in ("computed", "skipped"))
    return (
        f"{policies}, all {parts}: {computed} of {computed + skipped} passes computed, "
        f"{skipped} skipped; about {sum(entry['seconds_saved'] for entry in facts):.3g} s saved"
    )
