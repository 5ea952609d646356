"""The published decision rule of MagCache for Wan2.2, on numbers only.

A pass c of a run is ``2 * step + (0 cond, 1 uncond)``; ``r[c]`` is how the magnitude of its residual changes from the
step before. While residuals are kept, the product of the ratios says how far the kept one is off:

    if caching is allowed at c:  rho *= r[c];  S += 1;  E += |1 - rho|;  skip if E < threshold and S <= max_skips
    if it is not skipped:        rho = 1;  E = 0;  S = 0
    if it is not allowed:        compute, and leave rho, E and S as they are

Source: Zehong-Ma/MagCache ``MagCache4Wan2.2/magcache_generate.py``. ``nearest`` and the windows of ``is_allowed`` are
the published ones to the truncation and comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from ..errors import InputError
from .policy import Decision

Mode = Literal["t2v", "i2v", "ti2v"]
MODES: tuple[Mode, ...] = get_args(Mode)


def skipped_passes(
    *,
    steps: int,
    threshold: float,
    max_skips: int,
    retention: float,
    ratios: Sequence[float],
    mode: str,
    high_noise_steps: int | None = None,
) -> list[int]:
    """Passes that the published code skips, as ``2 * step + (0 cond, 1 uncond)``, ascending.

    Args:
        steps: Steps of the whole run, both experts together.
        ratios: Interleaved cond, uncond from step 1 on, as published (40 steps have 78); two ones before them are
            taken as those of step 0. For another number of steps: the nearest by index, as published.
        mode: ``t2v`` and ``i2v`` (two experts), or ``ti2v`` (one transformer).
        high_noise_steps: Steps of the high-noise expert; not used by ``ti2v``.
    Raises:
        InputError: an unknown mode, a split that is missing or beyond the run, or ratios that come in no pairs.
    """
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if steps < 1:
        raise InputError(f"steps must be at least 1; got {steps}")
    if mode == "ti2v":
        high_noise_steps = 0
    if high_noise_steps is None or not 0 <= high_noise_steps <= steps:
        raise InputError(
            f"mode {mode} needs high_noise_steps, the steps of the first expert, 0 to {steps}; got {high_noise_steps}"
        )
    split, total = 2 * high_noise_steps, 2 * steps
    values = interleaved(ratios, steps)
    decisions = decide(
        ([c] for c in range(total)),
        values,
        lambda c: is_allowed(c, mode, split, total, retention),
        threshold=threshold,
        max_skips=max_skips,
    )
    return sorted(decisions)


def is_allowed(c: int, mode: str, split: int, total: int, retention: float) -> bool:
    """Whether pass ``c`` of ``total`` may be skipped at all. ``split``: passes of the high-noise expert."""
    if mode == "t2v":
        return not (c < int(split * retention) or split <= c <= (total - split) * retention + split)
    if mode == "i2v":
        return c >= int(split + (total - split) * retention)
    return c >= int(total * retention)


def decide(
    groups: Iterable[Sequence[int]],
    ratios: Callable[[int], float] | Sequence[float],
    allowed: Callable[[int], bool],
    *,
    threshold: float,
    max_skips: int,
) -> dict[int, Decision]:
    """Skipped passes and what is known of them.

    Args:
        groups: Passes in order; those of one group are skipped together or not at all, by the worst of them. One pass
            a group is the published rule.
        ratios: By pass; infinity where nothing is known.
    """
    ratio = ratios if callable(ratios) else ratios.__getitem__
    rho, error, count = [1.0, 1.0], [0.0, 0.0], [0, 0]
    skipped: dict[int, Decision] = {}
    for group in groups:
        if not all(allowed(c) for c in group):
            continue
        for p, c in ((c % 2, c) for c in group):
            rho[p] *= ratio(c)
            count[p] += 1
            error[p] += abs(1 - rho[p])
        if all(error[c % 2] < threshold and count[c % 2] <= max_skips for c in group):
            skipped |= {c: Decision(True, rho[c % 2], error[c % 2]) for c in group}
        else:
            for p in (c % 2 for c in group):
                rho[p], error[p], count[p] = 1.0, 0.0, 0
    return skipped


def interleaved(ratios: Sequence[float], steps: int) -> list[float]:
    """Published ratios for ``steps`` steps, step 0 included: nearest by index, cond and uncond apart."""
    if len(ratios) % 2 or not len(ratios):
        raise InputError(f"ratios come in pairs, cond and uncond; got {len(ratios)} numbers")
    values = [float(r) for r in ratios]
    if not (len(values) == 2 * steps and values[:2] == [1.0, 1.0]):
        values = [1.0, 1.0, *values]
    if len(values) == 2 * steps:
        return values
    rows = [nearest(values[p::2], steps) for p in (0, 1)]
    return [value for pair in zip(*rows, strict=True) for value in pair]


def nearest(values: Sequence[float], count: int) -> list[float]:
    """``count`` of the values, nearest by index (halves to even, as numpy rounds)."""
    if count == 1:
        return [values[-1]]
    scale = (len(values) - 1) / (count - 1)
    return [values[int(i)] for i in np.round(np.arange(count) * scale)]
