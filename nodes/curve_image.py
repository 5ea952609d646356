"""A magnitude curve and the steps that presets skip, as a picture, on a ground of its own for light and dark pages."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..wan_fp8.caching import PRESETS, Curve, MagCache, RunPlan
from ..wan_fp8.models.specs import SPECS, ModelSpec
from ..wan_fp8.sampling import DEFAULTS

WIDTH, HEIGHT = 1120, 680
GROUND, INK, FAINT_INK, FAINT = (28, 30, 36), (232, 232, 236), (164, 168, 180), (86, 90, 102)
COND, UNCOND, SWITCH = (255, 176, 64), (96, 180, 255), (190, 120, 255)
SKIPPED, COMPUTED = (78, 201, 140), (58, 62, 72)
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 64, 420
DRAWN = ("E012K2R20", "E024K2R10")
ROW = 58
LONGEST = 40
"""Letters of a curve's name in the title."""


def planned_passes(curve: Curve, preset: str) -> tuple[list[int], int]:
    """Passes that a preset would skip in a run on the curve's own schedule, in phase, as ``2 * step + (0 cond, 1
    uncond)``; and how many there are."""
    threshold, max_skips, retention = PRESETS[preset]
    setting = MagCache(threshold, max_skips, retention, curve=curve)
    steps, schedule = len(curve.sigmas), (*curve.sigmas, 0.0)
    parts: list[tuple[int, int, str | None]] = [(0, steps, None)]
    if curve.switch is not None:
        parts = [(0, curve.switch, "high_noise"), (curve.switch, steps, "low_noise")]
    skipped: list[int] = []
    for first, end, expert in parts:
        plan = RunPlan(spec=_spec(curve), schedule=schedule, first=first, end=end, expert=expert)
        tracker = setting.start(plan)
        skipped += sorted(tracker.cond_alone if curve.uncond is None else tracker.decisions)
    return skipped, steps if curve.uncond is None else 2 * steps


def _spec(curve: Curve) -> ModelSpec:
    """A model of the curve's task; its size does not matter to the rule."""
    return next(spec for spec in SPECS.values() if spec.task == curve.task)


def curve_image(curve: Curve) -> Tensor:
    """IMAGE [1, H, W, 3] in 0..1."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), GROUND)
    draw = ImageDraw.Draw(picture)
    _title(draw, curve)
    _plot(draw, curve)
    for index, preset in enumerate(DRAWN):
        _schedule(draw, curve, preset, BOTTOM + 92 + index * ROW)
    _legend(draw, curve)
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own, in pixels."""
    return ImageFont.load_default(size)


def _x(curve: Curve, step: float) -> float:
    return LEFT + (step + 0.5) * (WIDTH - LEFT - RIGHT) / len(curve.sigmas)


def _title(draw: ImageDraw.ImageDraw, curve: Curve) -> None:
    experts = "one transformer" if curve.switch is None else f"switch at step {curve.switch + 1}"
    steps = len(curve.sigmas)
    known = DEFAULTS.get(_spec(curve).task)
    published = "" if known is None else f" (published: {known.steps})"
    draw.text((LEFT, 14), f"{_short(curve.name)}: {curve.task}, {steps} steps{published}, {experts}", INK, font(20))


def _short(name: str) -> str:
    """A name that leaves room for the rest of its line."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."


def _plot(draw: ImageDraw.ImageDraw, curve: Curve) -> None:
    rows = [(curve.cond, COND, 6)] + ([] if curve.uncond is None else [(curve.uncond, UNCOND, 2)])
    shown = [value for row, *_ in rows for step, value in enumerate(row) if step not in (0, curve.switch)]
    low, high = min([*shown, 0.95]), max([*shown, 1.0])
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)

    def y(value: float) -> float:
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    for line in range(5):
        value = low + (high - low) * line / 4
        draw.line([(LEFT, y(value)), (WIDTH - RIGHT, y(value))], FAINT)
        draw.text((LEFT - 8, y(value)), f"{value:.3f}", INK, font(15), anchor="rm")
    if curve.switch is not None:
        at = _x(curve, curve.switch - 0.5)
        draw.line([(at, TOP), (at, BOTTOM)], SWITCH, 2)
        draw.text((at + 6, TOP + 2), "experts switch", SWITCH, font(15))
    for row, colour, width in rows:
        parts = [range(1, len(row))]
        if curve.switch is not None:
            parts = [range(1, curve.switch), range(curve.switch + 1, len(row))]
        for part in parts:
            points = [(_x(curve, step), y(row[step])) for step in part]
            if len(points) > 1:
                draw.line(points, colour, width, joint="curve")
            for px, py in points:
                draw.ellipse([px - width, py - width, px + width, py + width], fill=colour)
    every = max(1, len(curve.sigmas) // 10)
    for step in range(0, len(curve.sigmas), every):
        draw.text((_x(curve, step), BOTTOM + 14), str(step + 1), INK, font(15), anchor="mt")
        draw.text((_x(curve, step), BOTTOM + 34), f"{curve.sigmas[step]:.2f}", FAINT_INK, font(13), anchor="mt")
    draw.text((LEFT - 8, BOTTOM + 14), "step", INK, font(15), anchor="rt")
    draw.text((LEFT - 8, BOTTOM + 34), "noise", FAINT_INK, font(13), anchor="rt")


def _schedule(draw: ImageDraw.ImageDraw, curve: Curve, preset: str, top: int) -> None:
    skipped, total = planned_passes(curve, preset)
    steps = {c // 2 for c in skipped}
    width = (WIDTH - LEFT - RIGHT) / len(curve.sigmas)
    text = f"{preset}: {len(skipped)} of {total} passes skipped, {total / (total - len(skipped)):.2f} x fewer"
    draw.text((LEFT, top - 22), text, INK, font(15))
    for step in range(len(curve.sigmas)):
        left = LEFT + step * width
        colour = SKIPPED if step in steps else COMPUTED
        draw.rectangle([left + 1, top, left + width - 1, top + 22], fill=colour)


def _legend(draw: ImageDraw.ImageDraw, curve: Curve) -> None:
    entries = [("cond", COND)] + ([] if curve.uncond is None else [("uncond", UNCOND)])
    entries += [("skipped", SKIPPED), ("computed", COMPUTED)]
    x = LEFT
    for word, colour in entries:
        draw.rectangle([x, HEIGHT - 30, x + 18, HEIGHT - 14], fill=colour)
        draw.text((x + 26, HEIGHT - 22), word, INK, font(15), anchor="lm")
        x += 130
    draw.text((WIDTH - RIGHT, HEIGHT - 22), "|residual| over the step before", FAINT_INK, font(14), anchor="rm")
