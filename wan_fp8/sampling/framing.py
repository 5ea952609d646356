"""How pictures and driving videos come to the size of the video: Animate's letter-box, S2V's resize and centre crop.

Images are float [..., 3, h, w]; 0..1 where they come from a user, -1..1 where they go to the VAE.
Source: Wan-Video/Wan2.2 ``padding_resize`` in ``wan/animate.py`` and ``wan/modules/animate/preprocess/utils.py``;
``wan/speech2video.py`` (``Resize(min(H, W))``, ``CenterCrop``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

FACE_SIZE = 512
"""Rows and columns of the face video."""


def inner_size(columns: int, rows: int, width: int, height: int) -> tuple[int, int]:
    """(width, height) of a picture of columns x rows pixels inside its letter-box of width x height."""
    if rows / columns > height / width:
        return int(height / rows * columns), height
    return width, int(width / columns * rows)


def letterbox(video: Tensor, width: int, height: int, *, mode: str | None = None, fill: float = 0.0) -> Tensor:
    """Scale to fit inside width x height and centre it on ``fill``.

    Args:
        video: [N, C, h, w].
        mode: ``nearest`` for masks; None: the mean of the pixels that fall into one where it shrinks, else bilinear,
            as the published preprocessing does. ``bilinear``: without antialiasing in any case, as the published
            pipeline does with the reference picture.
    Returns:
        [N, C, height, width] in the type of ``video``; the same tensor where it has that size.
    Raises:
        InputError: so narrow a picture that nothing would be left of it.
    """
    rows, columns = video.shape[-2:]
    if (rows, columns) == (height, width):
        return video
    inner_width, inner_height = inner_size(columns, rows, width, height)
    if not inner_width or not inner_height:
        raise InputError(f"a picture of {columns}x{rows} pixels does not fit into {width}x{height}: crop it before")
    if mode is None:
        mode = "area" if inner_width * inner_height < rows * columns else "bilinear"
    scaled = F.interpolate(video, size=(inner_height, inner_width), mode=mode)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    sides = (left, width - inner_width - left, top, height - inner_height - top)
    return F.pad(scaled, sides, value=fill)


def face_crops(video: Tensor) -> Tensor:
    """A face video as the motion encoder takes it: cropped to a square around its centre, 512 x 512, -1..1.

    Args:
        video: [N, 3, h, w], 0..1.
    """
    rows, columns = video.shape[-2:]
    side = min(rows, columns)
    top, left = (rows - side) // 2, (columns - side) // 2
    square = video[..., top : top + side, left : left + side]
    if side != FACE_SIZE:
        square = F.interpolate(square, size=(FACE_SIZE, FACE_SIZE), mode="area" if side > FACE_SIZE else "bilinear")
    return square * 2 - 1


def s2v_reference(image_CHW: Tensor, width: int, height: int) -> Tensor:
    """S2V's reference picture: its shorter side becomes the video's, by Pillow's bilinear filter on 8 bits as
    published, then it is cropped around the centre, or filled up with black where it is too short.

    Args:
        image_CHW: [3, h, w], 0..1.
    Returns:
        [3, height, width] float32 on the CPU, -1..1.
    """
    from PIL import Image

    pixels = (image_CHW.detach().to("cpu", torch.float32).clamp(0, 1) * 255).round().to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image = image.resize(_shorter_side(image.width, image.height, min(width, height)), Image.Resampling.BILINEAR)
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return centre_crop(data.permute(2, 0, 1).to(torch.float32) / 255, width, height) * 2 - 1


def s2v_pose(video: Tensor, width: int, height: int) -> Tensor:
    """S2V's pose video, framed like the reference; what has to be filled up becomes grey, as published.

    Args:
        video: [N, 3, h, w], 0..1.
    Returns:
        [N, 3, height, width], -1..1.
    """
    columns, rows = _shorter_side(video.shape[-1], video.shape[-2], min(width, height))
    signed = video.float() * 2 - 1
    if (rows, columns) != tuple(video.shape[-2:]):
        signed = F.interpolate(signed, size=(rows, columns), mode="bilinear", antialias=True)
    return centre_crop(signed, width, height)


def centre_crop(image: Tensor, width: int, height: int) -> Tensor:
    """The middle width x height of [..., h, w]; zeros where it has less (torchvision's ``CenterCrop``)."""
    rows, columns = image.shape[-2:]
    left, top = max(0, width - columns) // 2, max(0, height - rows) // 2
    right, bottom = (max(0, width - columns) + 1) // 2, (max(0, height - rows) + 1) // 2
    image = F.pad(image, (left, right, top, bottom))
    rows, columns = image.shape[-2:]
    top, left = round((rows - height) / 2.0), round((columns - width) / 2.0)
    return image[..., top : top + height, left : left + width]


def _shorter_side(columns: int, rows: int, side: int) -> tuple[int, int]:
    """(width, height) after torchvision's ``Resize(side)``."""
    if columns <= rows:
        return side, int(side * rows / columns)
    return int(side * columns / rows), side
