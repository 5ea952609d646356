"""Videos longer than one run: which frames each segment of Animate-14B and each clip of S2V-14B makes.

Source: Wan-Video/Wan2.2 ``wan/animate.py`` (``get_valid_len``, ``inputs_padding``, ``get_i2v_mask`` and the loop of
``generate``) and ``wan/speech2video.py`` (the loop of ``generate``, ``load_pose_cond``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .sizes import TIME_STRIDE, check_frames, latent_frames

OVERLAPS = (1, 5)
"""Frames that an Animate segment may take over from the one before it."""
MOTION_FRAMES = 73
"""Pixel frames before a clip that S2V looks back at: 19 latent frames."""
REFERENCE_FRAMES = 6
"""The last of them that show the reference picture where the video begins with it."""
DROPPED_FRAMES = 3
"""Frames that the first clip of S2V loses at its start: it is decoded after one latent frame, the reference's."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a video that one run makes."""

    index: int
    start: int
    """Frame of the (driving) video that the run's first frame stands for."""
    known: int
    """Frames at the run's start that the segment before has made."""
    kept: slice
    """Frames of the run that go into the video."""

    @property
    def frames(self) -> int:
        """How many go into the video."""
        return self.kept.stop - self.kept.start


def animate_segments(length: int, segment: int = 77, overlap: int = 1) -> list[Segment]:
    """The runs that make a video of ``length`` frames; the last one may make more than is kept.

    Args:
        length: frames of the video, 1 or more.
        segment: frames of a run, 4n + 1.
        overlap: frames that a run takes over from the one before, 1 or 5.
    Raises:
        InputError: a number that is not allowed.
    """
    check_frames(segment)
    if overlap not in OVERLAPS or (overlap >= segment and length > segment):
        raise InputError(
            f"overlap must be 1 or 5 frames and less than a segment of {segment}; got {overlap}: use 1, as published, "
            "or 5"
        )
    if length < 1:
        raise InputError(f"a video has 1 frame or more; got a length of {length}")
    step = segment - overlap
    count = 1 if length <= segment else math.ceil((length - overlap) / step)
    segments = []
    for index in range(count):
        start, known = index * step, overlap if index else 0
        segments.append(Segment(index, start, known, slice(known, min(segment, length - start))))
    return segments


def reflected(frame: int, count: int) -> int:
    """Where frame ``frame`` of a driving video of ``count`` frames is taken from: beyond its end it runs backwards,
    then forwards again. A video of one frame stands still."""
    if count < 2:
        return 0
    place = frame % (2 * count - 2)
    return place if place < count else 2 * count - 2 - place


def animate_mask(segment: int, known: int, lat_h: int, lat_w: int, background: Tensor | None = None) -> Tensor:
    """Mask channels of an Animate run: the reference's latent frame, which is given, then those of the segment.

    Args:
        segment: pixel frames of the run.
        known: frames at its start that are given.
        lat_h: latent rows.
        lat_w: latent columns.
        background: [segment, h, w], 1 where a pixel of the background is given and 0 in the character; resized by
            taking the nearest pixel. None: nothing but ``known`` is given.
    Returns:
        [4, 1 + F, lat_h, lat_w] float32, 1 = given. The four channels of a latent frame are its pixel frames, the first
        one four times.
    """
    given = torch.zeros(segment, lat_h, lat_w)
    if background is not None:
        given = F.interpolate(background[:, None].float(), size=(lat_h, lat_w), mode="nearest")[:, 0]
    given[:known] = 1
    spread = torch.cat([given[:1].expand(TIME_STRIDE, -1, -1), given[1:]])
    spread = spread.unflatten(0, (latent_frames(segment), TIME_STRIDE)).transpose(0, 1)
    return torch.cat([torch.ones(TIME_STRIDE, 1, lat_h, lat_w), spread], dim=1)


# ---- S2V -----------------------------------------------------------------------------------------------------------


def check_clip(frames: int) -> None:
    """Raise InputError unless ``frames`` is a length that an S2V clip may have: a multiple of 4."""
    if frames < TIME_STRIDE or frames % TIME_STRIDE:
        near = max(TIME_STRIDE, frames // TIME_STRIDE * TIME_STRIDE)
        raise InputError(f"an S2V clip has a multiple of 4 frames; got {frames}: use {near}, or 80 as published")


def s2v_segments(clips: int, frames: int = 80, *, length: int | None = None, drop: bool = True) -> list[Segment]:
    """The clips of an S2V video.

    Args:
        clips: how many there may be.
        frames: of a clip, a multiple of 4.
        length: frames of the video, where it is to end within a clip; clips beyond it are left out.
        drop: the first clip loses its first three frames (it does unless the video begins with the reference).
    Raises:
        InputError: a number that is not allowed.
    """
    check_clip(frames)
    if clips < 1 or (length is not None and length < 1):
        raise InputError(f"an S2V video has one clip and one frame or more; got {clips} clips, {length} frames")
    segments, made = [], 0
    for index in range(clips):
        first = DROPPED_FRAMES if drop and index == 0 else 0
        left = frames - first if length is None else min(frames - first, length - made)
        if left <= 0:
            break
        segments.append(Segment(index, index * frames, 0, slice(first, first + left)))
        made += left
    return segments


def last_frames(before: Tensor, made: Tensor) -> Tensor:
    """The frames that the next clip looks back at: the last of ``before`` and ``made``, as many as ``before`` has.

    Args:
        before: [MOTION_FRAMES, ...].
        made: [frames, ...] of the clip, those that it loses left out.
    """
    return torch.cat([before[made.shape[0] :], made[-before.shape[0] :]])


def pose_frames(total: int, source_fps: float, source_frames: int, fps: float = 16) -> Iterator[int]:
    """Which frame of a pose video each of ``total`` frames shows: by time, as published; those beyond its end are left
    out."""
    if not (math.isfinite(source_fps) and source_fps > 0):
        raise InputError(f"the frames per second of a pose video must be a number above 0; got {source_fps}")
    for frame in range(total):
        time = frame / fps
        if time >= source_frames / source_fps:
            return
        yield min(round(time * source_fps), source_frames - 1)
