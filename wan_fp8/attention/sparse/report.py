"""What became of block-sparse attention in one run: what was kept, what was lost, and what it saved."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .calibration import Calibration
from .run import SparseRun
from .setting import Sparsity


@dataclass(slots=True)
class SparseReport:
    """Self-attentions of one run under one setting."""

    sparsity: Sparsity
    answered: Counter[str] = field(default_factory=Counter)
    """Calls by the backend that answered them; ``dense`` outside the window."""
    density_by_step: dict[int, float] = field(default_factory=dict)
    """Share of the key blocks that was kept, over heads and transformer blocks."""
    density_by_block: dict[int, float] = field(default_factory=dict)
    dropped_by_step: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Softmax mass of the dropped blocks over the samples: mean, and worst sample."""
    worst_query: float = 0.0
    """The largest mass that a single sampled query lost."""
    error_by_step: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Relative error of a head's output over the samples: mean, and worst sample."""
    above_bound: float = 0.0
    """Share of the samples whose error was above the bound."""
    samples: int = 0
    dense_heads: int = 0
    """Heads that kept every block in their last sparse call."""
    heads: int = 0
    dense_ms: float | None = None
    """Median of an attention over all keys in this run; None: there was none."""
    sparse_ms: float | None = None
    """Median of a sparse one, choosing and measuring included."""
    seconds_saved: float | None = None
    table: tuple[tuple[int, int, tuple[float, ...]], ...] = ()
    """(step, transformer block, density of each head)."""

    @property
    def sparse_calls(self) -> int:
        """Attentions that were sparse."""
        return self.answered.total() - self.answered["dense"]

    @property
    def density(self) -> float | None:
        """Over the sparse calls."""
        return statistics.fmean(self.density_by_block.values()) if self.density_by_block else None

    @property
    def as_asked(self) -> bool:
        """True if it was used, and what was lost lies below the bound but for one sample in twenty."""
        return self.sparse_calls > 0 and self.above_bound <= 0.05

    def calibration(self, total: int) -> Calibration:
        """A table for ``calibrated``.

        Args:
            total: Steps of the run.
        """
        return Calibration(total, self.table)

    def facts(self) -> dict[str, Any]:
        """For a receipt, as JSON has it."""
        dropped, error = _over(self.dropped_by_step), _over(self.error_by_step)
        return {
            "policy": self.sparsity.policy,
            "bound": self.sparsity.bound,
            "attentions": self.answered.total(),
            "answered": dict(self.answered),
            "density": _short(self.density),
            "dropped_mass": {
                "mean": _short(dropped[0]),
                "worst": _short(dropped[1]),
                "query": _short(self.worst_query),
            },
            "error": {"mean": _short(error[0]), "worst": _short(error[1]), "above_bound": _short(self.above_bound)},
            "heads_dense": self.dense_heads,
            "heads": self.heads,
            "dense_ms": _short(self.dense_ms),
            "sparse_ms": _short(self.sparse_ms),
            "seconds_saved": _short(self.seconds_saved),
            "density_by_step": {str(s + 1): _short(d) for s, d in sorted(self.density_by_step.items())},
            "density_by_block": {str(b): _short(d) for b, d in sorted(self.density_by_block.items())},
            "dropped_by_step": {str(s + 1): [_short(x) for x in d] for s, d in sorted(self.dropped_by_step.items())},
        }

    def lines(self) -> list[str]:
        """The same in two to four sentences."""
        total, sparse, policy = self.answered.total(), self.sparse_calls, self.sparsity.policy
        names = " and ".join(sorted(self.answered.keys() - {"dense"}))
        if not sparse:
            return [
                f"sparse attention ({policy}) was not used: nothing in this run lies inside its window (the first "
                f"{self.sparsity.skip_first:.0%} and last {self.sparsity.skip_last:.0%} of the steps stay dense)"
            ]
        density, dropped, error = self.density, _over(self.dropped_by_step), _over(self.error_by_step)
        assert density is not None
        lines = [
            f"sparse attention ({policy}, {names}): {sparse:,} of {total:,} self-attentions, {density:.1%} of the "
            f"blocks kept; {self.dense_heads} of {self.heads} heads dense at the end",
            f"dropped attention mass, measured on {self.samples:,} samples: mean {dropped[0]:.4f}, worst "
            f"{dropped[1]:.4f}; error mean {error[0]:.4f}, worst {error[1]:.4f}",
        ]
        bound = self.sparsity.bound
        if bound is None:
            lines.append("no bound was set: nothing moved to keep the error small")
        else:
            lines.append(f"{self.above_bound:.1%} of the samples were above the bound of {bound:g}")
        if self.seconds_saved is not None:
            lines.append(
                f"an attention took {self.sparse_ms:.1f} ms sparse and {self.dense_ms:.1f} ms dense: "
                f"{self.seconds_saved:.1f} s saved in this run"
            )
        return lines


def _over(by_step: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """Mean of means and worst of all."""
    means, worst = zip(*by_step.values(), strict=True) if by_step else ((0.0,), (0.0,))
    return statistics.fmean(means), max(worst)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def sparse_report(runs: Iterable[SparseRun]) -> list[SparseReport]:
    """One report for each setting of these runs, one run a transformer block. Waits for the GPU."""
    by_setting: dict[Sparsity, list[SparseRun]] = defaultdict(list)
    for run in runs:
        by_setting[run.sparsity].append(run)
    return [_report(sparsity, found) for sparsity, found in by_setting.items()]


def _report(sparsity: Sparsity, runs: list[SparseRun]) -> SparseReport:
    report = SparseReport(sparsity)
    density: dict[int, list[float]] = defaultdict(list)
    dropped: dict[int, list[float]] = defaultdict(list)
    error: dict[int, list[float]] = defaultdict(list)
    of_heads: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for run in runs:
        report.answered.update(run.answered)
        for kind, seconds in run.times.read().items():
            times[kind] += seconds
        if not run.calls:
            continue
        kept = torch.stack([call.density for call in run.calls]).cpu()
        found = [torch.stack([call.found.dropped, call.found.error, call.found.worst]).flatten(1) for call in run.calls]
        samples = [one.cpu() for one in found]
        for call, shares, (lost, off, worst) in zip(run.calls, kept, samples, strict=True):
            density[call.step].append(float(shares.mean()))
            dropped[call.step] += lost.tolist()
            error[call.step] += off.tolist()
            of_heads[call.step, run.block].append(shares)
            report.worst_query = max(report.worst_query, float(worst.max()))
        report.density_by_block[run.block] = float(kept.mean())
        report.heads += kept.shape[1]
        report.dense_heads += int((kept[-1] == 1).sum())
    report.density_by_step = {step: statistics.fmean(values) for step, values in density.items()}
    report.dropped_by_step = {step: (statistics.fmean(values), max(values)) for step, values in dropped.items()}
    report.error_by_step = {step: (statistics.fmean(values), max(values)) for step, values in error.items()}
    errors = [value for values in error.values() for value in values]
    report.samples = len(errors)
    if sparsity.bound is not None and errors:
        report.above_bound = sum(value > sparsity.bound for value in errors) / len(errors)
    if times["dense"]:
        report.dense_ms = 1000 * statistics.median(times["dense"])
    if times["sparse"]:
        report.sparse_ms = 1000 * statistics.median(times["sparse"])
    if report.dense_ms is not None and times["sparse"]:
        report.seconds_saved = report.dense_ms / 1000 * len(times["sparse"]) - sum(times["sparse"])
    report.table = tuple(
        (step, block, tuple(float(f"{x:.4g}") for x in torch.stack(shares).mean(0).clamp_min(1e-4).tolist()))
        for (step, block), shares in sorted(of_heads.items())
    )
    return report
