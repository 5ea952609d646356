"""The drawn world: one coloured shape that moves over a plain background, as tensors, on any device.

Every clip is a row of numbers (``Clips``): what is drawn follows from them alone. Shapes are signed distance functions,
so edges are anti-aliased; all four have the same area at the same size. A dark spot beside the centre shows rotation.
Lengths are pixels, times 0..1 over the clip, angles radians, clockwise as seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .captions import BACKGROUNDS, COLOURS, MOTIONS, Scene

SPOT_DISTANCE, SPOT_RADIUS = 0.5, 0.32
"""Of the dark spot, in sizes of the shape."""
SPOT_BRIGHTNESS = 0.08
DRAWN_AT_ONCE = 256
"""Clips drawn in one piece: bounds the memory of the intermediate tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldSize:
    """Pixels and frames of every clip."""

    width: int = 96
    height: int = 64
    frames: int = 17

    @property
    def shown(self) -> str:
        """In words."""
        return f"{self.width}x{self.height}, {self.frames} frames"

    @property
    def unit(self) -> float:
        """Pixels per unit of length: the world is laid out for a height of 64."""
        return min(self.height, self.width) / 64


@dataclass(frozen=True, slots=True)
class Clips:
    """N clips: where the shape is, how large and how far turned in every frame, and what it looks like."""

    x_NT: Tensor
    y_NT: Tensor
    size_NT: Tensor
    """Radius of the disc of the same area."""
    angle_NT: Tensor
    colour_N3: Tensor
    """0..1."""
    shape_N: Tensor
    background_N: Tensor
    """Brightness, 0..1."""
    slope_N: Tensor
    """How much brighter the lowest row is than the middle."""
    wall_N: Tensor
    """Column at which a wall begins; beyond the picture for clips without one."""

    def __len__(self) -> int:
        return self.x_NT.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Clips:
        return Clips(*(getattr(self, field.name)[index] for field in fields(self)))


def make_clips(
    scenes: Sequence[Scene],
    backgrounds: Sequence[int],
    size: WorldSize,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> Clips:
    """One clip per scene; place, size, speed and tint are drawn from ``seed`` on the CPU, the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    n, unit, width, height = len(scenes), size.unit, float(size.width), float(size.height)

    def uniform(low: float | Tensor, high: float | Tensor) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    motion = torch.tensor([scene.motion for scene in scenes])
    is_motion = {name: motion == index for index, name in enumerate(MOTIONS)}
    time = torch.linspace(0, 1, size.frames)[None]
    radius = uniform(8.5, 11.0) * unit
    margin = 1.6 * radius
    """What the largest shape needs on each side, whichever way it is turned."""
    x_mid, y_mid = uniform(margin, width - margin), uniform(margin, height - margin)
    turn = uniform(-0.4, 0.4)

    def column(value: Tensor) -> Tensor:
        return value[:, None]

    x, y = column(x_mid).expand(n, size.frames).clone(), column(y_mid).expand(n, size.frames).clone()
    r, angle = column(radius).expand(n, size.frames).clone(), column(turn).expand(n, size.frames).clone()
    wall = torch.full((n,), 2 * width)

    def put(name: str, target: Tensor, values: Tensor) -> None:
        chosen = is_motion[name]
        target[chosen] = values[chosen]

    # Sideways, rolling without slip.
    distance = uniform(0.38, 0.55) * width
    start = margin + uniform(0.0, 1.0) * (width - 2 * margin - distance).clamp_min(0)
    path = column(distance) * time
    put("right", x, column(start) + path)
    put("right", angle, column(turn) + path / column(radius))
    put("left", x, column(start + distance) - path)
    put("left", angle, column(turn) - path / column(radius))
    # Up and down.
    climb = uniform(0.75, 1.0) * (height - 2 * margin)
    low_end = margin + climb + uniform(0.0, 1.0) * (height - 2 * margin - climb)
    put("rise", y, column(low_end) - column(climb) * time)
    put("fall", y, column(low_end - climb) + column(climb) * time)
    put("spin", angle, column(turn) + column(uniform(0.8, 1.2)) * 2 * math.pi * time)
    # Sizes change around a place that leaves room for the largest.
    small, large = uniform(4.5, 6.0) * unit, uniform(13.0, 16.0) * unit
    x_room = torch.lerp(1.6 * large, width - 1.6 * large, uniform(0.0, 1.0))
    y_room = torch.lerp(1.6 * large, height - 1.6 * large, uniform(0.0, 1.0))
    for name, (first, last) in {"grow": (small, large), "shrink": (large, small)}.items():
        put(name, r, column(first) + column(last - first) * time)
        put(name, x, column(x_room).expand_as(x))
        put(name, y, column(y_room).expand_as(y))
    # Two hops on the floor.
    floor = height - margin - uniform(0.0, 2.0) * unit
    hop = uniform(0.8, 1.0) * (floor - margin)
    put("bounce", y, column(floor) - column(hop) * (2 * math.pi * time).sin().abs())
    # One round, clockwise.
    orbit = torch.minimum(uniform(13.0, 17.0) * unit, height / 2 - margin)
    x_centre = torch.lerp(margin + orbit, width - margin - orbit, uniform(0.0, 1.0))
    phase = column(uniform(0.0, 2 * math.pi)) + column(uniform(0.9, 1.1)) * 2 * math.pi * time
    put("orbit", x, column(x_centre) + column(orbit) * phase.cos())
    put("orbit", y, height / 2 + column(orbit) * phase.sin())
    # Towards a wall, and back.
    wall_at = width - uniform(6.0, 12.0) * unit
    contact = wall_at - 1.25 * radius
    away = torch.minimum(uniform(0.38, 0.5) * width, contact - margin)
    back = column(away) * (1 - (2 * time - 1).abs())
    put("bump", x, column(contact - away) + back)
    put("bump", angle, column(turn) + back / column(radius))
    put("bump", wall, wall_at)

    palette = torch.tensor(list(COLOURS.values())) / 255
    tint = 0.04 * (2 * torch.rand(n, 3, generator=generator) - 1)
    colour = (palette[[scene.colour for scene in scenes]] + tint).clamp(0, 1)
    tones = torch.tensor(list(BACKGROUNDS.values()))[list(backgrounds)] + uniform(-0.03, 0.03)
    shape = torch.tensor([scene.shape for scene in scenes])
    slope = uniform(-0.04, 0.04)
    return Clips(*(t.to(device) for t in (x, y, r, angle, colour, shape, tones, slope, wall)))


def around_shapes(clips: Clips, size: WorldSize, window: WorldSize, generator: torch.Generator) -> Clips:
    """The same clips as seen through a smaller window for fewer frames, to be drawn at ``window``'s size.

    The window's centre lies up to half its size from the shape, so that few pixels show nothing but background.

    Args:
        generator: On the device of the numbers.
    """
    device, n = clips.x_NT.device, len(clips)
    first = torch.randint(size.frames - window.frames + 1, (1,), generator=generator, device=device)
    at = first + torch.arange(window.frames, device=device)
    x, y, radius, angle = (v[:, at] for v in (clips.x_NT, clips.y_NT, clips.size_NT, clips.angle_NT))
    away = torch.rand(2, n, generator=generator, device=device) - 0.5
    left = (x.mean(1) + (away[0] - 0.5) * window.width).round().clamp(0, size.width - window.width)
    top = (y.mean(1) + (away[1] - 0.5) * window.height).round().clamp(0, size.height - window.height)
    moved = {"x_NT": x - left[:, None], "y_NT": y - top[:, None], "size_NT": radius, "angle_NT": angle}
    return replace(clips, **moved, wall_N=clips.wall_N - left)


def draw(clips: Clips, size: WorldSize) -> Tensor:
    """The clips as video, [N, 3, T, H, W] in -1..1, float32 on the device of the numbers."""
    pieces = [_draw(clips[i : i + DRAWN_AT_ONCE], size) for i in range(0, len(clips), DRAWN_AT_ONCE)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _draw(clips: Clips, size: WorldSize) -> Tensor:
    device = clips.x_NT.device
    rows = torch.arange(size.height, device=device) + 0.5
    columns = torch.arange(size.width, device=device) + 0.5

    def spread(value_NT: Tensor) -> Tensor:
        return value_NT[:, :, None, None]

    dx, dy = columns - spread(clips.x_NT), rows[:, None] - spread(clips.y_NT)
    cos, sin = spread(clips.angle_NT.cos()), spread(clips.angle_NT.sin())
    u, v = dx * cos + dy * sin, dy * cos - dx * sin  # the shape's own axes
    radius = spread(clips.size_NT)
    cover = (0.5 - _distance(u, v, radius, clips.shape_N)).clamp(0, 1)
    spot = (u - SPOT_DISTANCE * radius).square() + v.square()
    cover_spot = (0.5 - (spot.sqrt() - SPOT_RADIUS * radius)).clamp(0, 1)

    tone = clips.background_N[:, None] + clips.slope_N[:, None] * torch.linspace(-1, 1, size.height, device=device)
    wall_tone = torch.where(clips.background_N < 0.7, 1.0, 0.05)[:, None, None]
    in_wall = (columns - clips.wall_N[:, None]).clamp(0, 1)[:, None]
    scene = torch.lerp(tone[:, :, None].expand(-1, -1, size.width), wall_tone, in_wall)  # [N, H, W]
    colour = clips.colour_N3[:, :, None, None, None]
    body = torch.lerp(colour, torch.full_like(colour, SPOT_BRIGHTNESS), cover_spot[:, None])
    video = torch.lerp(scene[:, None, None], body, cover[:, None])
    return video * 2 - 1


def _distance(u: Tensor, v: Tensor, radius: Tensor, shape_N: Tensor) -> Tensor:
    """Signed distance in pixels to the edge of each clip's shape, negative inside."""
    of_shape = shape_N[:, None, None, None]
    ball = (u.square() + v.square()).sqrt() - radius
    square = torch.maximum(u.abs(), v.abs()) - 0.5 * math.sqrt(math.pi) * radius
    triangle = _polygon(u, v, corners=3, inner=math.sqrt(math.pi / (3 * math.sqrt(3))) * radius)
    star = _star(u, v, radius)
    result = torch.where(of_shape == 1, square, ball)
    result = torch.where(of_shape == 2, triangle, result)
    return torch.where(of_shape == 3, star, result)


def _polygon(u: Tensor, v: Tensor, corners: int, inner: Tensor) -> Tensor:
    """A regular polygon with a corner up (at -v); ``inner`` is the distance from its centre to a side."""
    sides = [2 * math.pi * (k + 0.5) / corners - math.pi / 2 for k in range(corners)]
    distances = [u * math.cos(a) + v * math.sin(a) for a in sides]
    result = distances[0]
    for other in distances[1:]:
        result = torch.maximum(result, other)
    return result - inner


STAR_RATIO = 0.5
"""Inner over outer radius of the five-pointed star."""


def _star(u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Five points, one of them up: one side of one half point, mirrored and turned to all ten."""
    half = math.pi / 5
    outer = math.sqrt(math.pi / (5 * STAR_RATIO * math.sin(half))) * radius
    angle = torch.atan2(u, -v)
    folded = (angle - 2 * half * torch.round(angle / (2 * half))).abs()
    length = (u.square() + v.square()).sqrt()
    p, q = length * folded.cos(), length * folded.sin()  # along the point, and across
    # The side runs from the tip (outer, 0) to the inner corner.
    corner = (STAR_RATIO * math.cos(half), STAR_RATIO * math.sin(half))
    along = (corner[0] - 1.0, corner[1])
    norm = math.hypot(*along)
    normal = (along[1] / norm, -along[0] / norm)
    return (p - outer) * normal[0] + q * normal[1]
