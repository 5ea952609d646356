"""A table of quality against a committed one: what got worse by more than the seeds differ among themselves.

Rows are those of ``quality.py``: a setting, what was run, and a list ``videos`` with the scores of each prompt and
seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

HIGHER_IS_BETTER = {
    "latent_psnr_db": True,
    "latent_cosine": True,
    "latent_error": False,
    "worst_step_error": False,
    "psnr_db": True,
    "ssim": True,
    "lpips": False,
}
GATED = ("latent_psnr_db", "worst_step_error", "psnr_db")
"""Errors are compared in decibels too: a spread of 0.01 means another thing at 0.02 than at 0.5."""
SAME = ("model", "size", "frames", "steps", "reference")
"""What must agree before two rows may be compared."""
LEAST_SPREAD_DB = 0.1
"""Other machines sum in another order; a spread below this is not one of quality."""

Row = Mapping[str, Any]


def aggregated(videos: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Mean, worst and sample deviation of every score; None where a video has none (equal, or not measured)."""
    result = {}
    for name, higher in HIGHER_IS_BETTER.items():
        values = [video.get(name) for video in videos]
        known = [value for value in values if isinstance(value, float)]
        if len(known) < len(values) or not known:
            result[name] = dict.fromkeys(("mean", "worst", "spread"))
            continue
        result[name] = {
            "mean": statistics.fmean(known),
            "worst": (min if higher else max)(known),
            "spread": statistics.stdev(known) if len(known) > 1 else None,
        }
    return result


def worse(measured: Sequence[Row], committed: Sequence[Row]) -> list[str]:
    """One sentence for each score that fell by more than the seed spread; empty: nothing got worse.

    The mean over the videos measured is held against the committed values of the same videos; the spread is the sample
    deviation over all committed videos.

    Raises:
        ValueError: a setting, a video or a run that the table does not have: nothing would be compared.
    """
    table = {row["setting"]: row for row in committed}
    sentences = []
    for row in measured:
        known = table.get(row["setting"])
        if known is None:
            raise ValueError(f"the table has no setting {row['setting']!r}; it has {', '.join(table)}")
        for name in SAME:
            if row[name] != known[name]:
                raise ValueError(
                    f"{row['setting']}: measured with {name} {row[name]!r}, the table with {known[name]!r}"
                )
        sentences += _worse(row, known)
    return sentences


def _worse(row: Row, known: Row) -> list[str]:
    videos = {(video["prompt"], video["seed"]): video for video in known["videos"]}
    missing = [key for key in ((v["prompt"], v["seed"]) for v in row["videos"]) if key not in videos]
    if missing:
        raise ValueError(f"{row['setting']}: the table has no prompt {missing[0][0]} with seed {missing[0][1]}")
    if len(videos) < 2:
        raise ValueError(f"{row['setting']}: a spread needs two videos or more, and the table has {len(videos)}")
    pairs = [(video, videos[video["prompt"], video["seed"]]) for video in row["videos"]]
    sentences = []
    for name in GATED:
        if all(after.get(name) is None and before.get(name) is None for after, before in pairs):
            continue  # no frames were made
        everyone = [_decibels(name, video) for video in known["videos"]]
        finite = [value for value in everyone if math.isfinite(value)]
        spread = max(LEAST_SPREAD_DB, statistics.stdev(finite) if len(finite) > 1 else 0.0)
        losses = [_loss(name, before, after) for after, before in pairs]
        loss = statistics.fmean(losses)
        if not loss <= spread:
            means = [statistics.fmean(_decibels(name, pair[side]) for pair in pairs) for side in (1, 0)]
            sentences.append(
                f"{row['setting']}: {name} fell by {loss:.2f} dB ({means[0]:.2f} committed, {means[1]:.2f} now, over "
                f"{len(pairs)} videos), and the seeds differ by {spread:.2f} dB"
            )
    return sentences


def _loss(name: str, before: Row, after: Row) -> float:
    """How many dB worse; nothing is worse than what was not equal either."""
    a, b = _decibels(name, before), _decibels(name, after)
    return 0.0 if a == b else a - b


def _decibels(name: str, video: Row) -> float:
    """Higher is better; infinite where the result was equal to the reference."""
    value = video.get(name)
    if HIGHER_IS_BETTER[name]:
        return math.inf if value is None else float(value)
    return math.inf if not value else -20 * math.log10(value)
