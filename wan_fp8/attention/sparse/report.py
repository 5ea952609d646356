"""What became of block-sparse attention in one run: what was kept, what was lost, and what it saved.

Where ranks share the heads, each has seen its own: their findings are put together once, when the report is made.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .calibration import Calibration
from .run import SparseRun
from .setting import Sparsity

Gather = Callable[[Tensor], list[list[Tensor]]]
"""Every rank's row of bytes: by half of guidance, and in it the ranks that share the heads."""


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
    """Median of a sparse one, choosing and measuring included; of ranks the slowest counts, for which all wait."""
    seconds_saved: float | None = None
    ranks: int = 1
    """How many shared the heads."""
    imbalance: float = 1.0
    """Blocks kept by the rank that kept most, over the mean of the ranks; over the calls."""
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
            "remainder": self.sparsity.remainder,
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
            "ranks": self.ranks,
            "imbalance": _short(self.imbalance),
            "dropped_by_step": {str(s + 1): [_short(x) for x in d] for s, d in sorted(self.dropped_by_step.items())},
        }

    def lines(self) -> list[str]:
        """The same in one to five sentences."""
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
            f"blocks kept{', the others by their means' if self.sparsity.remainder else ''}; {self.dense_heads} of "
            f"{self.heads} heads dense at the end",
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
        if self.ranks > 1:
            lines.append(
                f"heads on {self.ranks} ranks: the one with most to do kept {self.imbalance - 1:.1%} more blocks than "
                "the mean"
            )
        return lines


def _over(by_step: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """Mean of means and worst of all."""
    means, worst = zip(*by_step.values(), strict=True) if by_step else ((0.0,), (0.0,))
    return statistics.fmean(means), max(worst)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


@dataclass(slots=True)
class OfHeads:
    """One sparse attention, on the heads of one rank or of several."""

    block: int
    step: int
    heads: list[int]
    density: list[float]
    """Of each of ``heads``."""
    dropped: list[float]
    error: list[float]
    worst: list[float]
    """Of each sample."""


@dataclass(slots=True)
class Seen:
    """What one rank, or the ranks that share the heads together, saw of a run under one setting."""

    answered: dict[str, int]
    times: dict[str, list[float]]
    """Seconds of each attention, ``dense`` and ``sparse``."""
    calls: list[OfHeads]
    imbalances: list[float] = field(default_factory=list)
    """Of each call: blocks kept by the rank that kept most, over the mean."""

    @classmethod
    def of(cls, runs: Iterable[SparseRun]) -> Seen:
        """On this rank. Waits for the GPU."""
        seen = cls({}, {"dense": [], "sparse": []}, [])
        answered: Counter[str] = Counter()
        for run in runs:
            answered.update(run.answered)
            for kind, seconds in run.times.read().items():
                seen.times[kind] += seconds
            if not run.calls:
                continue
            for call, shares in zip(run.calls, torch.stack([call.density for call in run.calls]).tolist(), strict=True):
                measured = [] if call.found is None else [call.found.dropped, call.found.error, call.found.worst]
                numbers = torch.stack(measured).flatten(1).tolist() if measured else [[], [], []]
                seen.calls.append(OfHeads(run.block, call.step, list(call.share.heads), shares, *numbers))
        seen.answered = dict(answered)
        return seen

    def to_bytes(self) -> Tensor:
        """[n] uint8, for other ranks."""
        calls = [[c.block, c.step, c.heads, c.density, c.dropped, c.error, c.worst] for c in self.calls]
        text = json.dumps([self.answered, self.times, calls])
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    @classmethod
    def from_bytes(cls, row: Tensor) -> Seen:
        """The reverse."""
        answered, times, calls = json.loads(row.cpu().numpy().tobytes())
        return cls(answered, times, [OfHeads(*call) for call in calls])

    @classmethod
    def together(cls, ranks: Sequence[Seen]) -> Seen:
        """Of ranks that ran the same attentions, each for its own heads; each waited for the slowest."""
        times = {
            kind: [max(each) for each in zip(*(rank.times[kind] for rank in ranks), strict=True)] for kind in KINDS
        }
        seen = cls(ranks[0].answered, times, [])
        for parts in zip(*(rank.calls for rank in ranks), strict=True):
            columns = ([x for part in parts for x in getattr(part, name)] for name in COLUMNS)
            seen.calls.append(OfHeads(parts[0].block, parts[0].step, *columns))
            kept = [sum(part.density) for part in parts]
            seen.imbalances.append(max(kept) * len(kept) / sum(kept))
        return seen


KINDS = ("dense", "sparse")
COLUMNS = ("heads", "density", "dropped", "error", "worst")


def sparse_report(runs: Iterable[SparseRun], gather: Gather | None = None) -> list[SparseReport]:
    """One report for each setting of these runs, one run a transformer block. Waits for the GPU.

    Args:
        gather: Where ranks share the work: brings their findings together; every one of them must ask for the report.
    """
    by_setting: dict[Sparsity, list[SparseRun]] = defaultdict(list)
    for run in runs:
        by_setting[run.sparsity].append(run)
    reports = []
    for sparsity, found in by_setting.items():
        halves = [[Seen.of(found)]]
        if gather is not None:
            halves = [[Seen.from_bytes(row) for row in half] for half in gather(halves[0][0].to_bytes())]
        reports.append(_report(sparsity, [Seen.together(half) for half in halves], len(halves[0])))
    return reports


def _report(sparsity: Sparsity, halves: list[Seen], ranks: int) -> SparseReport:
    report = SparseReport(sparsity, ranks=ranks)
    density: dict[int, list[float]] = defaultdict(list)
    by_block: dict[int, list[float]] = defaultdict(list)
    dropped: dict[int, list[float]] = defaultdict(list)
    error: dict[int, list[float]] = defaultdict(list)
    of_heads: dict[tuple[int, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    heads: set[tuple[int, int]] = set()
    whole: set[tuple[int, int]] = set()
    for seen in halves:
        report.answered.update(seen.answered)
        last = {call.block: call for call in seen.calls}
        for call in seen.calls:
            density[call.step].append(statistics.fmean(call.density))
            by_block[call.block].append(density[call.step][-1])
            dropped[call.step] += call.dropped
            error[call.step] += call.error
            for head, share in zip(call.heads, call.density, strict=True):
                of_heads[call.step, call.block][head].append(share)
            report.worst_query = max(report.worst_query, *call.worst, 0.0)
        for block, call in last.items():
            heads |= {(block, head) for head in call.heads}
            whole |= {(block, head) for head, share in zip(call.heads, call.density, strict=True) if share == 1}
    report.heads, report.dense_heads = len(heads), len(whole)
    report.density_by_block = {block: statistics.fmean(values) for block, values in by_block.items()}
    report.density_by_step = {step: statistics.fmean(values) for step, values in density.items()}
    report.dropped_by_step = {step: (statistics.fmean(values), max(values)) for step, values in dropped.items()}
    report.error_by_step = {step: (statistics.fmean(values), max(values)) for step, values in error.items()}
    errors = [value for values in error.values() for value in values]
    report.samples = len(errors)
    if sparsity.bound is not None and errors:
        report.above_bound = sum(value > sparsity.bound for value in errors) / len(errors)
    imbalances = [value for seen in halves for value in seen.imbalances]
    if imbalances:
        report.imbalance = statistics.fmean(imbalances)
    dense, sparse = ([s for seen in halves for s in seen.times[kind]] for kind in KINDS)
    if dense:
        report.dense_ms = 1000 * statistics.median(dense)
    if sparse:
        report.sparse_ms = 1000 * statistics.median(sparse)
    if report.dense_ms is not None and sparse:  # halves of guidance save at the same time
        report.seconds_saved = (report.dense_ms / 1000 * len(sparse) - sum(sparse)) / len(halves)
    report.table = tuple(
        (step, block, tuple(float(f"{max(statistics.fmean(shares[h]), 1e-4):.4g}") for h in sorted(shares)))
        for (step, block), shares in sorted(of_heads.items())
    )
    return report
