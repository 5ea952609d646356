"""The quality receipt as pictures: error by step, and frames side by side, on a ground of their own for light and dark
pages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .curve_image import COMPUTED, FAINT, FAINT_INK, GROUND, INK, SKIPPED, SWITCH, font

WIDTH, HEIGHT = 1120, 620
LEFT, RIGHT, TOP, BOTTOM = 96, 28, 126, 540
LINE, DOT = (255, 176, 64), 4
SPARSE = (96, 190, 255)
MARKS, MARK, ROW = 46, 18, 24
"""From the axis down to the first row of marks; height of a mark, and of its row."""
COLUMNS, FRAME_WIDTH, BAR, GAP = 6, 240, 34, 4
MOST_GAIN = 64


def receipt_plot(facts: dict[str, Any]) -> Tensor:
    """IMAGE [1, H, W, 3] in 0..1: relative error of the clean estimate at each step, on a logarithmic axis; below it
    the steps that a cache computed and skipped."""
    caches, steps = facts["setting"].get("caches") or [], facts["steps"]
    rows = _cache_rows(caches)
    height = HEIGHT + (ROW * len(rows) + 30 if rows else 0)
    picture = Image.new("RGB", (WIDTH, height), GROUND)
    draw = ImageDraw.Draw(picture)

    def x(step: float) -> float:
        return LEFT + (step - 0.5) * (WIDTH - LEFT - RIGHT) / len(steps)

    for index, line in enumerate(_title(facts)):
        draw.text((LEFT, 14 + 30 * index), line, INK if index < 2 else FAINT_INK, font(20 if index == 0 else 16))
    every = max(1, len(steps) // 10)
    for entry in steps[::every]:
        draw.text((x(entry["step"]), BOTTOM + 14), str(entry["step"]), INK, font(15), anchor="mt")
    draw.text((LEFT - 8, BOTTOM + 14), "step", INK, font(15), anchor="rt")
    if rows:
        _draw_schedule(draw, caches, rows, x)
    found = [entry["relative_error"] for entry in steps if 0 < entry["relative_error"] < math.inf]
    if not found:
        draw.text((WIDTH / 2, (TOP + BOTTOM) / 2), "equal at every step, to the bit", INK, font(24), anchor="mm")
        return _image(picture)
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    high = high if high > low else low + 1

    def y(error: float) -> float:
        return BOTTOM - (math.log10(error) - low) / (high - low) * (BOTTOM - TOP)

    for power in range(low, high + 1):
        draw.line([(LEFT, y(10**power)), (WIDTH - RIGHT, y(10**power))], FAINT)
        draw.text((LEFT - 8, y(10**power)), f"{10.0**power:g}", INK, font(15), anchor="rm")
    points = [(x(e["step"]), y(e["relative_error"])) for e in steps if 0 < e["relative_error"] < math.inf]
    if len(points) > 1:
        draw.line(points, LINE, 2, joint="curve")
    for px, py in points:
        draw.ellipse([px - DOT, py - DOT, px + DOT, py + DOT], fill=LINE)
    _draw_densities(draw, facts["setting"].get("sparsity") or [], x)
    about = "relative error of the clean estimate against the reference, by step; lower is better"
    draw.text((WIDTH - RIGHT, height - 20), about, FAINT_INK, font(14), anchor="rm")
    return _image(picture)


def _cache_rows(caches: list[dict[str, Any]]) -> list[tuple[str, dict[int, bool]]]:
    """Rows of marks, by step whether it was skipped: one for each conditioning, or one for both where they agree."""
    rows = []
    for kind in ("cond", "uncond"):
        marks = {step: True for entry in caches for step in entry["steps_skipped"][kind]}
        marks |= {step: False for entry in caches for step in entry["steps_computed"][kind]}
        rows.append((kind, marks))
    rows = [(kind, marks) for kind, marks in rows if marks]
    return [("cache", rows[0][1])] if len(rows) == 2 and rows[0][1] == rows[1][1] else rows


def _draw_schedule(
    draw: ImageDraw.ImageDraw,
    caches: list[dict[str, Any]],
    rows: list[tuple[str, dict[int, bool]]],
    x: Callable[[float], float],
) -> None:
    """A mark for each step, full where its pass was skipped and an outline where it was computed; a line where the
    second expert takes over."""
    for number, (kind, marks) in enumerate(rows):
        top = BOTTOM + MARKS + ROW * number
        draw.text((LEFT - 8, top + MARK / 2), kind, INK, font(15), anchor="rm")
        for step, skipped in marks.items():
            box = [x(step - 0.5) + 1, top, x(step + 0.5) - 1, top + MARK]
            draw.rectangle(box, fill=SKIPPED if skipped else COMPUTED, outline=None if skipped else FAINT_INK)
    below = BOTTOM + MARKS + ROW * len(rows) + 4
    known = [min(min(steps, default=math.inf) for steps in _all_steps(entry)) for entry in caches]
    for start in sorted(start for start in known if math.inf > start > min(known)):
        at = x(start - 0.5)
        draw.line([(at, TOP), (at, below - 6)], SWITCH, 2)
        draw.text((at + 6, BOTTOM - 6), "experts switch", SWITCH, font(15), anchor="lb")
    words = []
    for entry in caches:
        skipped, passes = entry["passes_skipped"], entry["passes_skipped"] + entry["passes_computed"]
        who = "" if entry["expert"] is None else f" {entry['expert'].replace('_', '-')}"
        words.append(f"{entry['policy']}{who}: {skipped} of {passes} passes skipped")
    draw.text((LEFT, below), "; ".join(words), INK, font(15))
    for left, word, skipped in ((WIDTH - RIGHT - 96, "computed", False), (WIDTH - RIGHT - 200, "skipped", True)):
        box = [left, below + 2, left + 14, below + 14]
        draw.rectangle(box, fill=SKIPPED if skipped else COMPUTED, outline=None if skipped else FAINT_INK)
        draw.text((left + 22, below + 8), word, INK, font(15), anchor="lm")


def _all_steps(entry: dict[str, Any]) -> list[list[int]]:
    return [steps for name in ("steps_computed", "steps_skipped") for steps in entry[name].values()]


def _draw_densities(draw: ImageDraw.ImageDraw, found: list[dict[str, Any]], x: Callable[[int], float]) -> None:
    """The share of key blocks that sparse attention kept at each step, from 0 at the bottom to 1 at the top, and what
    that lost."""
    for number, facts in enumerate(found):
        points = [(x(int(s)), BOTTOM - share * (BOTTOM - TOP)) for s, share in facts["density_by_step"].items()]
        if len(points) > 1:
            draw.line(points, SPARSE, 2, joint="curve")
        for px, py in points:
            draw.rectangle([px - DOT, py - DOT, px + DOT, py + DOT], fill=SPARSE)
        if facts["density"] is None:
            continue
        lost, saved = facts["dropped_mass"], facts["seconds_saved"]
        text = (
            f"blocks kept {facts['density']:.0%}; attention mass lost {lost['mean']:.2%}, at worst {lost['worst']:.1%}"
        )
        text += "" if saved is None else f"; {saved:.3g} s saved"
        draw.text((WIDTH - RIGHT, TOP + 8 + 22 * number), text, SPARSE, font(15), anchor="rt")


def _title(facts: dict[str, Any]) -> list[str]:
    before, after = facts["reference"], facts["setting"]
    latent = facts["latent"]
    score = "equal latents" if latent["identical"] else f"latents {latent['psnr_db']:.2f} dB"
    if facts["video"] is not None and not facts["video"]["identical"]:
        score += f", frames {facts['video']['psnr_db']:.2f} dB, SSIM {facts['video']['ssim']:.4f}"
    cost = f"{before['seconds']:.3g} s in the reference, {after['seconds']:.3g} s here"
    if after["peak_gib"] is not None and before["peak_gib"] is not None:
        cost += f"; {before['peak_gib']:.1f} and {after['peak_gib']:.1f} GiB"
    run = facts["settings"]
    made = f"{facts['task']}, {run['steps']} steps, seed {run['seed']}, {facts['device']}"
    return [score, f"{_choices(after)}; {cost}", f"{made}; reference {before['precision']}"]


def _choices(side: dict[str, Any]) -> str:
    model = side["models"][0]
    attention = model["attention"]
    if not isinstance(attention, str):
        attention = attention["backend"] + (" sparse" if attention["sparsity"] else "")
    cache = model["cache"].partition(":")[0]
    return f"recipe {model['recipe']}, attention {attention}, cache {cache}"


def receipt_strip(facts: dict[str, Any], frames_NHWC: Tensor, exact_NHWC: Tensor) -> Tensor:
    """IMAGE [1, H, W, 3]: some frames of the reference, of the settings, and how far they are apart, made brighter.

    Args:
        frames_NHWC: [N, H, W, 3] in 0..1; ``exact_NHWC`` likewise.
    """
    count, rows, columns = frames_NHWC.shape[:3]
    shown = min(COLUMNS, count)
    chosen = [round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)]
    apart = (frames_NHWC - exact_NHWC).abs()
    largest = float(apart[chosen].max())
    gain = 1 if largest == 0 else max(1, min(MOST_GAIN, 2 ** int(math.log2(1 / largest))))
    width, height = FRAME_WIDTH, max(1, round(FRAME_WIDTH * rows / columns))
    labels = ("reference", _choices(facts["setting"]), f"difference x {gain}")
    total = (shown * (width + GAP) - GAP, 3 * (height + BAR))
    picture = Image.new("RGB", total, GROUND)
    draw = ImageDraw.Draw(picture)
    for row, (label, video) in enumerate(zip(labels, (exact_NHWC, frames_NHWC, apart * gain), strict=True)):
        top = row * (height + BAR)
        draw.text((8, top + BAR / 2), label, INK, font(16), anchor="lm")
        for column, frame in enumerate(chosen):
            pixels = (video[frame].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
            picture.paste(tile, (column * (width + GAP), top + BAR))
            if row == 0 and column:
                at = (column * (width + GAP) + width - 8, BAR / 2)
                draw.text(at, f"frame {frame + 1}", FAINT_INK, font(14), anchor="rm")
    return _image(picture)


def _image(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]
