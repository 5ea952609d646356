"""Pixel sizes, latent shapes and token counts of each task, and the checks that users meet.

Width comes before height, as in the published size names. Source: Wan-Video/Wan2.2 ``wan/image2video.py`` (I2V-A14B),
``best_output_size`` in ``wan/utils/utils.py`` (TI2V-5B), ``resize_by_area`` in
``wan/modules/animate/preprocess/utils.py`` (Animate-14B), ``get_size_less_than_area`` in ``wan/speech2video.py``
(S2V-14B), ``vae_stride`` and ``patch_size`` in ``wan/configs``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import InputError
from ..models.specs import Task

TIME_STRIDE = 4
"""Pixel frames per latent frame, after the first frame, which has a latent frame of its own."""


_S2V_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentLayout:
    """How pixels map to latents and tokens."""

    channels: int
    """Channels of the VAE's latents."""
    stride: int
    """Pixels per latent row and column."""
    patch: int = 2
    """Latent rows and columns per token."""

    @property
    def multiple(self) -> int:
        """Widths and heights must be multiples of this many pixels."""
        return self.stride * self.patch


LAYOUTS: Mapping[Task, LatentLayout] = MappingProxyType(
    {
        Task.T2V: LatentLayout(channels=16, stride=8),
        Task.I2V: LatentLayout(channels=16, stride=8),
        Task.TI2V: LatentLayout(channels=48, stride=16),
        Task.ANIMATE: LatentLayout(channels=16, stride=8),
        Task.S2V: LatentLayout(channels=16, stride=8),
    }
)


def check_size(task: Task, width: int, height: int) -> None:
    """Raise InputError, with the nearest allowed values, unless width and height fit the task's VAE and patches."""
    multiple = LAYOUTS[task].multiple
    for name, value in (("width", width), ("height", height)):
        if value < multiple or value % multiple:
            raise InputError(
                f"{name} must be a multiple of {multiple} pixels for {task}; got {value}, "
                f"use {_nearest(value, multiple)}"
            )


def check_frames(frames: int) -> None:
    """Raise InputError, with the nearest allowed values, unless ``frames`` is 4n + 1 (1, 5, 9, …, 81, …)."""
    if frames < 1 or (frames - 1) % TIME_STRIDE:
        raise InputError(f"frames must be 4n + 1; got {frames}, use {_nearest(frames, TIME_STRIDE, offset=1)}")


def _nearest(value: int, multiple: int, offset: int = 0) -> str:
    lower = (value - offset) // multiple * multiple + offset
    smallest = offset or multiple
    return str(smallest) if lower < smallest else f"{lower} or {lower + multiple}"


def latent_frames(frames: int) -> int:
    """Latent frames of a video of ``frames`` pixel frames: (frames - 1) / 4 + 1. InputError unless 4n + 1."""
    check_frames(frames)
    return (frames - 1) // TIME_STRIDE + 1


def latent_shape(task: Task, width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    """(C, F, H, W) of the latents of one video. InputError for a size or count that is not allowed."""
    check_size(task, width, height)
    layout = LAYOUTS[task]
    return layout.channels, latent_frames(frames), height // layout.stride, width // layout.stride


def token_count(task: Task, width: int, height: int, frames: int) -> int:
    """Video tokens of one forward. InputError for a size or count that is not allowed."""
    _, latent_count, rows, columns = latent_shape(task, width, height, frames)
    patch = LAYOUTS[task].patch
    return latent_count * (rows // patch) * (columns // patch)


def i2v_size(image_width: int, image_height: int, max_area: int) -> tuple[int, int]:
    """Output (width, height) in pixels that I2V-A14B uses for an image: its aspect, rounded down to multiples of 16.

    The image is then stretched to it. A 16:9 image gives 1280 x 720 for that area, but 832 x 464 for 832 x 480.

    Args:
        image_width: Pixels of the input image.
        image_height: Likewise.
        max_area: Pixels of the output, at most (published: 1280 * 720 or 832 * 480).
    Raises:
        InputError: the area is too small, or the image too narrow, for a single token.
    """
    layout = LAYOUTS[Task.I2V]
    aspect = _aspect(image_height, image_width)
    rows = _floor_even(math.sqrt(max_area * aspect) // layout.stride, layout.patch)
    columns = _floor_even(math.sqrt(max_area / aspect) // layout.stride, layout.patch)
    if not rows or not columns:
        raise _too_thin(image_width, image_height, max_area)
    return columns * layout.stride, rows * layout.stride


def ti2v_size(image_width: int, image_height: int, max_area: int) -> tuple[int, int]:
    """Output (width, height) in pixels that TI2V-5B uses for an image: two candidates, the one nearer to its aspect.

    Candidate A fits the width to 32 pixels first and B the height; a tie takes B. The image is then scaled to cover
    it and cropped around the centre. A 16:9 image gives 1248 x 704 for the area 1280 x 704.

    Args and Raises: as ``i2v_size``.
    """
    multiple = LAYOUTS[Task.TI2V].multiple
    aspect = _aspect(image_width, image_height)
    ideal_width = (max_area * aspect) ** 0.5
    ideal_height = max_area / ideal_width
    width_a, height_b = int(ideal_width // multiple * multiple), int(ideal_height // multiple * multiple)
    if not width_a or not height_b:
        raise _too_thin(image_width, image_height, max_area)
    height_a = int(max_area / width_a // multiple * multiple)
    width_b = int(max_area / height_b // multiple * multiple)

    def mismatch(width: int, height: int) -> float:
        return max(aspect / (width / height), width / height / aspect)

    if mismatch(width_a, height_a) < mismatch(width_b, height_b):
        return width_a, height_a
    return width_b, height_b


def animate_size(video_width: int, video_height: int, max_area: int) -> tuple[int, int]:
    """Output (width, height) in pixels that Animate's preprocessing makes of a driving video: its aspect at this area,
    rounded down to multiples of 16; the video is then letter-boxed. A 16:9 video gives 1280 x 720 for that area.

    (The published code means to look for a better fit and always comes here: the search calls a function with one
    argument too many, and the error is caught.)

    Args and Raises: as ``i2v_size``.
    """
    multiple = LAYOUTS[Task.ANIMATE].multiple
    ideal_height = math.sqrt(max_area / _aspect(video_width, video_height))
    width, height = (int(side // multiple * multiple) for side in (max_area / ideal_height, ideal_height))
    if not width or not height:
        raise _too_thin(video_width, video_height, max_area)
    return width, height


def s2v_size(image_width: int, image_height: int, max_area: int) -> tuple[int, int]:
    """Output (width, height) in pixels that S2V-14B uses for an image: the largest of a hundred scales at which both
    sides, rounded up to multiples of 64, stay within the area; never larger than the image, but for that rounding. A
    16:9 image of 1080 rows gives 1280 x 704 for the area 1280 x 720, 832 x 448 for 832 x 480.

    Args and Raises: as ``i2v_size``.
    """
    _aspect(image_width, image_height)
    pixels = image_width * image_height
    smallest, largest = 0.1, 1.0
    if pixels > max_area:
        most = _S2V_MULTIPLE - 1  # pixels that rounding may add to a side
        linear = most * (image_height + image_width)
        smallest = (-linear + math.sqrt(linear**2 - 2 * pixels * (most**2 - max_area))) / (2 * pixels)
        largest = math.sqrt(max_area / pixels)
    for index in range(100):
        scale = largest - (largest - smallest) * index / 100
        height, width = (-(-int(side * scale) // _S2V_MULTIPLE) * _S2V_MULTIPLE for side in (image_height, image_width))
        if 0 < height * width <= max_area:
            return width, height
    aspect = image_width / image_height
    width = int((max_area * aspect) ** 0.5 // _S2V_MULTIPLE * _S2V_MULTIPLE)
    height = int((max_area / aspect) ** 0.5 // _S2V_MULTIPLE * _S2V_MULTIPLE)
    if width >= image_width or height >= image_height:
        width, height = (side // _S2V_MULTIPLE * _S2V_MULTIPLE for side in (image_width, image_height))
    if not width or not height:
        raise _too_thin(image_width, image_height, max_area)
    return width, height


def _aspect(numerator: int, denominator: int) -> float:
    if numerator < 1 or denominator < 1:
        raise InputError(f"an image needs at least one pixel each way; got {numerator} and {denominator}")
    return numerator / denominator


def _floor_even(count: float, patch: int) -> int:
    return int(count // patch * patch)


def _too_thin(width: int, height: int, max_area: int) -> InputError:
    return InputError(
        f"an image of {width}x{height} pixels has no output size within {max_area} pixels; "
        "give a larger area or a less narrow image"
    )
