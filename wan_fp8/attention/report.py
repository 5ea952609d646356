"""What became of a low-precision attention in one run: where it was used, what the guard measured, what it refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from .core import Attention, attention_cores
from .guard import Verdict
from .sparse.report import SparseReport, sparse_report

MOST_BLOCKS = 8
"""Refused blocks that a line names one by one."""


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """Self-attentions of one run under one low-precision setting."""

    setting: Attention
    answered: Counter[str]
    """Calls by the backend that answered them."""
    verdicts: dict[int, Verdict]
    """What the guard found, by block; empty where it is off or never had a call to look at."""

    @property
    def refused(self) -> dict[int, Verdict]:
        """Blocks in which the guard refused the low-precision backend."""
        return {block: verdict for block, verdict in self.verdicts.items() if not verdict.accepted}

    @property
    def as_asked(self) -> bool:
        """True if the low-precision backend was used and refused nowhere."""
        return self.answered[self.setting.backend] > 0 and not self.refused

    def lines(self) -> list[str]:
        """The same in one to three sentences."""
        setting, name = self.setting, self.setting.backend
        used, total = self.answered[name], self.answered.total()
        others = ", ".join(sorted(self.answered.keys() - {name}))
        lines = [f"attention {name}: used for {used:,} of {total:,} self-attentions" + (others and f", {others} else")]
        if not self.verdicts and not used:
            lines.append(
                f"attention {name} was not used: nothing in this run lies inside its window (the first "
                f"{setting.skip_first_steps} and last {setting.skip_last_steps} steps and the first "
                f"{setting.skip_first_blocks} and last {setting.skip_last_blocks} blocks stay exact); a run of few "
                "steps needs smaller skip_first_steps and skip_last_steps"
            )
        if self.verdicts:
            worst, blocks = max(verdict.error for verdict in self.verdicts.values()), len(self.verdicts)
            lines.append(f"guard: worst relative error {worst:.3f} in {blocks} blocks, the bound is {setting.bound:g}")
        if self.refused:
            named = [f"{block} ({verdict.error:.3f})" for block, verdict in sorted(self.refused.items())]
            shown = ", ".join(named[:MOST_BLOCKS]) + (", …" if len(named) > MOST_BLOCKS else "")
            lines.append(f"guard: {name} refused in {len(named)} of {blocks} blocks, which ran exactly: {shown}")
        return lines


def attention_report(model: nn.Module) -> list[AttentionReport]:
    """One report for each low-precision setting that was asked for since ``reset_guard``; none for exact ones."""
    answered: dict[Attention, Counter[str]] = {}
    verdicts: dict[Attention, dict[int, Verdict]] = {}
    for core in attention_cores(model):
        for setting, calls in core.answered.items():
            answered.setdefault(setting, Counter()).update(calls)
            if setting in core.verdicts:
                verdicts.setdefault(setting, {})[core.block] = core.verdicts[setting]
    return [AttentionReport(setting, calls, verdicts.get(setting, {})) for setting, calls in answered.items()]


def sparsity_report(model: nn.Module) -> list[SparseReport]:
    """One report for each sparse setting that was asked for since ``reset_guard``. Waits for the GPU; over several
    ranks it is about the heads of all of them, and every rank must ask for it."""
    runs = (run for core in attention_cores(model) for run in core.sparse_runs.values())
    return sparse_report(runs, getattr(model, "gather_findings", None))
