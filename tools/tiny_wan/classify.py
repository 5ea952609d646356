"""What a video of the drawn world shows, measured from its pixels: colour, shape and motion. No network, no weights.

Backgrounds and walls have no hue, so the shape is what has one. Colour is the nearest of the palette; motion follows
from how its centre, its size and its dark spot move; shape from how its silhouette fills rings around its centre.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import COLOURS, MOTIONS, SHAPES, Scene
from .world import SPOT_DISTANCE, WorldSize, draw, make_clips

HUE = 0.22
"""Largest minus smallest of a pixel's RGB (0..1) from which it belongs to the shape."""
SMALLEST_AREA = 0.004
"""Share of the picture that a shape covers at least; less of it in half of the frames means that there is none."""
STEADY, GROWTH, TURN = 0.14, 0.4, 2.5
"""A shape stays if it moves less than this share of the height; sizes change by more than exp(GROWTH); a spin turns
by more radians than TURN."""
RINGS = 24


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was seen, by name; None where nothing was."""

    colour: str | None
    shape: str | None
    motion: str | None

    def matches(self, scene: Scene, *, shape: bool = False) -> bool:
        """Whether colour and motion (and shape, if asked) are those of ``scene``."""
        colour, wanted_shape, motion = scene.words
        return self.colour == colour and self.motion == motion and (not shape or self.shape == wanted_shape)


def classify(video_N3THW: Tensor) -> list[Verdict]:
    """One verdict a clip; videos are in -1..1."""
    return [_classify(clip.permute(1, 0, 2, 3)) for clip in video_N3THW.float().clamp(-1, 1).cpu()]


def _classify(clip_T3HW: Tensor) -> Verdict:
    pixels = (clip_T3HW + 1) / 2
    hue = pixels.amax(1) - pixels.amin(1)
    mask = hue > HUE
    area = mask.sum((1, 2)).float()
    seen = area > SMALLEST_AREA * mask[0].numel()
    if seen.float().mean() < 0.5:
        return Verdict(None, None, None)
    colour_RGB, colour = _colour(pixels, hue, mask)
    # Hues that are not the shape's (a stain elsewhere, the fringe of an edge) do not count.
    mask &= (pixels - colour_RGB[None, :, None, None]).abs().amax(1) < 0.35
    x, y, size = _track(mask)
    if len(x) < 3:
        return Verdict(colour, None, None)
    angle = _turned(pixels, x, y, size)
    return Verdict(colour, _shape(mask, x, y, size), _motion(x, y, size, angle, mask.shape[1]))


def _colour(pixels_T3HW: Tensor, hue: Tensor, mask: Tensor) -> tuple[Tensor, str]:
    """Mean RGB of the most coloured half of the shape's pixels, and the nearest colour of the palette."""
    chosen = mask & (hue >= hue[mask].median())
    mean = pixels_T3HW.permute(0, 2, 3, 1)[chosen].mean(0)
    palette = torch.tensor(list(COLOURS.values())) / 255
    return mean, tuple(COLOURS)[int((palette - mean).square().sum(1).argmin())]


def _track(mask_THW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre (columns, rows) and radius of the disc of the same area, in the frames where there is a shape."""
    weight = mask_THW.float()
    area = weight.sum((1, 2))
    rows = torch.arange(mask_THW.shape[1]) + 0.5
    columns = torch.arange(mask_THW.shape[2]) + 0.5
    there = area > 0.5 * SMALLEST_AREA * mask_THW[0].numel()
    area = area.clamp_min(1)
    x, y = (weight.sum(1) * columns).sum(1) / area, (weight.sum(2) * rows).sum(1) / area
    return x[there], y[there], (area / math.pi).sqrt()[there]


def _motion(x: Tensor, y: Tensor, size: Tensor, turned: float, height: int) -> str | None:
    def ends(values: Tensor) -> float:
        return float(values[-2:].mean() - values[:2].mean())

    growth = ends(size.log())
    if abs(growth) > GROWTH:
        return "grow" if growth > 0 else "shrink"
    width_of_path, height_of_path = (float(v.max() - v.min()) / height for v in (x, y))
    if max(width_of_path, height_of_path) < STEADY:
        return "spin" if abs(turned) > TURN else None
    if min(width_of_path, height_of_path) > max(0.6 * max(width_of_path, height_of_path), STEADY):
        return "orbit"
    sideways = width_of_path > height_of_path
    share = ends(x if sideways else y) / (height * max(width_of_path, height_of_path))
    if abs(share) > 0.6:
        return {(True, True): "right", (True, False): "left", (False, True): "fall", (False, False): "rise"}[
            sideways, share > 0
        ]
    return "bump" if sideways else "bounce"


def _polar(image_T1HW: Tensor, x: Tensor, y: Tensor, radii_TR: Tensor, angles: int) -> Tensor:
    """Values on circles around each frame's centre: [T, R, A]."""
    height, width = image_T1HW.shape[-2:]
    phi = torch.arange(angles) * (2 * math.pi / angles)
    columns = x[:, None, None] + radii_TR[:, :, None] * phi.cos()
    rows = y[:, None, None] + radii_TR[:, :, None] * phi.sin()
    grid = torch.stack([2 * columns / width - 1, 2 * rows / height - 1], dim=-1)
    return F.grid_sample(image_T1HW, grid, align_corners=False)[:, 0]


def _turned(pixels_T3HW: Tensor, x: Tensor, y: Tensor, size: Tensor) -> float:
    """Radians, clockwise, by which the dark spot goes around the centre over the clip."""
    if len(x) != len(pixels_T3HW):
        return 0.0  # it vanished in between
    dark = 1 - pixels_T3HW.amax(1, keepdim=True)
    ring = _polar(dark, x, y, SPOT_DISTANCE * size[:, None], 48)[:, 0]
    phi = torch.arange(48) * (2 * math.pi / 48)
    where = torch.atan2((ring * phi.sin()).sum(1), (ring * phi.cos()).sum(1))
    steps = where.diff()
    return float((steps - 2 * math.pi * torch.round(steps / (2 * math.pi))).sum())


def _profile(mask_THW: Tensor, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """What a silhouette looks like however it is turned, over the larger frames: [RINGS + 3 * RINGS].

    Share of each ring that it fills, and how strongly it repeats three, four and five times around the ring.
    """
    large = size >= size.median()
    radii = torch.linspace(0.6, 1.8, RINGS)[None] * size[large, None]
    values = _polar(mask_THW[large].float()[:, None], x[large], y[large], radii, 64)
    folds = torch.fft.fft(values, dim=2).abs()[:, :, 3:6] / 64
    return torch.cat([values.mean((0, 2)), 2 * folds.mean(0).flatten()])


def _shape(mask_THW: Tensor, x: Tensor, y: Tensor, size: Tensor) -> str | None:
    if len(x) != len(mask_THW):
        return None
    profile = _profile(mask_THW, x, y, size)
    distance = (_templates() - profile).square().sum(1)
    return tuple(SHAPES)[int(distance.argmin())]


@functools.cache
def _templates() -> Tensor:
    """The profile of each shape, measured on clips of the world."""
    size, rows = WorldSize(), []
    for shape in range(len(SHAPES)):
        scenes = [Scene(0, shape, tuple(MOTIONS).index("spin"))] * 4
        video = draw(make_clips(scenes, [0] * 4, size, seed=shape), size)
        profiles = []
        for clip in video.permute(0, 2, 1, 3, 4):
            pixels = (clip + 1) / 2
            mask = pixels.amax(1) - pixels.amin(1) > HUE
            profiles.append(_profile(mask, *_track(mask)))
        rows.append(torch.stack(profiles).mean(0))
    return torch.stack(rows)
