"""From what users connect (IMAGE, VAE, sizes) to what core's samplers take (LATENT, CONDITIONING), by the published
rules.

IMAGE is core's [batch, height, width, channels] in 0..1; LATENT holds raw VAE means [B, C, F, H, W] before
normalisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..wan_fp8 import sampling
from ..wan_fp8.errors import InputError
from ..wan_fp8.models.specs import Task
from . import bridge
from .choices import check_choice
from .missing import require

AREA_720P = "720p area"
AREA_480P = "480p area"
AREA_704P = "704p area"
AS_GIVEN = "width x height"
AREAS = {AREA_720P: 1280 * 720, AREA_480P: 832 * 480, AREA_704P: 1280 * 704}
"""Pixels, at most, of the published sizes that a video made from an image may have."""
SIZE_RULES = {Task.I2V: (AREA_720P, AREA_480P, AS_GIVEN), Task.TI2V: (AREA_704P, AS_GIVEN)}
"""Choices of the box 'size'."""

VISIBLE_STRETCH = 0.03
"""Change of aspect from which a stretched picture looks wrong; the published size rule stays below it for all usual
images."""


def one_image(image: Tensor, name: str) -> Tensor:
    """The picture of an IMAGE input: [1, h, w, 3 or 4] -> [3, h, w], 0..1, transparency dropped.

    Raises:
        InputError: more than one picture, or not a colour picture.
    """
    if image.ndim != 4 or image.shape[0] != 1 or image.shape[3] not in (3, 4):
        raise InputError(
            f"{name} takes one RGB picture, [1, height, width, 3]; got {list(image.shape)}: "
            "take one frame of a batch with core's 'ImageFromBatch'"
        )
    return image[0, :, :, :3].movedim(-1, 0).float()


def empty_latent(task: Task, width: int, height: int, length: int) -> dict[str, Tensor]:
    """The LATENT of zeros that a text-to-video run starts from. InputError for a size or length that is not allowed."""
    return {"samples": torch.zeros(1, *sampling.latent_shape(task, width, height, length))}


def video_size(task: Task, image: Tensor, size: str, width: int, height: int) -> tuple[int, int]:
    """Width and height in pixels of a video made from ``image`` [3, h, w].

    Raises:
        InputError: an unknown rule, or a size that is not allowed.
    """
    check_size_rule(task, size)
    if size == AS_GIVEN:
        sampling.check_size(task, width, height)
        return width, height
    rule = sampling.i2v_size if task is Task.I2V else sampling.ti2v_size
    return rule(image.shape[2], image.shape[1], AREAS[size])


def check_size_rule(task: Task, size: str) -> None:
    """Raise InputError unless ``size`` is a choice of that box of the task's sampler."""
    check_choice("size", size, SIZE_RULES[task])


def stretch_warning(image: Tensor, width: int, height: int) -> str | None:
    """What to tell a user whose picture is visibly stretched to width x height; None if it is not."""
    rows, columns = image.shape[1:]
    change = (width / height) / (columns / rows)
    if abs(change - 1) < VISIBLE_STRETCH:
        return None
    return (
        f"the image of {columns}x{rows} pixels is stretched to {width}x{height}, which makes it {change:.2f} times as "
        f"wide for its height: crop it before, or set size to '{AREA_720P}' or '{AREA_480P}' to keep its aspect"
    )


def check_vae(vae: Any, task: Task) -> None:
    """Raise InputError if ``vae`` makes latents of another kind than the task's model takes."""
    wanted, got = sampling.LAYOUTS[task].channels, int(getattr(require(vae), "latent_channels", 0))
    if got != wanted:
        names = {16: "Wan 2.1 VAE", 48: "Wan 2.2 VAE"}
        raise InputError(
            f"{task} takes the {names[wanted]} ({wanted} latent channels); got the "
            f"{names.get(got, 'VAE of another model')} ({got} channels): connect the VAE of this checkpoint"
        )


def image_conditioning(
    vae: Any, start: Tensor, end: Tensor | None, width: int, height: int, length: int
) -> dict[str, Tensor]:
    """I2V-A14B's conditioning, in the form that core's Wan models take.

    Args:
        vae: Core VAE of 16 channels.
        start: [3, h, w], 0..1; stretched to width x height.
        end: The last frame, likewise, or None.
    Returns:
        ``concat_latent_image`` [1, 16, F, H, W], raw VAE means of [start, grey ..., grey or end], and ``concat_mask``
        [1, 4, F, H, W] in core's polarity (0 = given, one channel per pixel frame of a latent frame).
    """
    video = sampling.i2v_video(sampling.stretch_image(start, width, height), length)
    known = torch.zeros(length, dtype=torch.bool)
    known[0] = True
    if end is not None:
        if length == 1:
            raise InputError(
                "an end_image needs a length of 5 frames or more; got 1: disconnect it, or ask for a longer video"
            )
        video[:, -1] = sampling.stretch_image(end, width, height)
        known[-1] = True
    latents = encode(vae, video)
    mask = sampling.frame_mask(known, latents.shape[3], latents.shape[4])
    return {"concat_latent_image": latents, "concat_mask": 1 - mask[None]}


def first_frame_latent(vae: Any, model: Any, start: Tensor, width: int, height: int, length: int) -> dict[str, Tensor]:
    """TI2V-5B's LATENT for an image: its encoding in latent frame 0 and a ``noise_mask`` that keeps it there.

    Args:
        vae: Core VAE of 48 channels.
        model: Core MODEL, for the normalisation of its latents.
        start: [3, h, w], 0..1; scaled to cover width x height and cropped.
    """
    image = encode(vae, sampling.cover_crop_image(start, width, height)[:, None])
    channels, frames, rows, columns = sampling.latent_shape(Task.TI2V, width, height, length)
    # Zero after normalisation, so that the other frames start from noise alone.
    samples = bridge.raw_latents(model, torch.zeros(1, channels, frames, rows, columns))
    samples[:, :, :1] = image.to(samples)
    return {"samples": samples, "noise_mask": sampling.ti2v_mask(length, rows, columns)[None, None]}


def encode(vae: Any, video: Tensor) -> Tensor:
    """[3, frames, H, W] in -1..1 -> raw VAE means [1, C, F, h, w]. Core's VAE takes pictures in 0..1, channels last."""
    return vae.encode(((video + 1) / 2).movedim(0, -1))


def with_values(conditioning: Any, values: dict[str, Any]) -> list[Any]:
    """A copy of a CONDITIONING with more values in every entry (what core's ``conditioning_set_values`` does)."""
    return [[rows, {**extras, **values}] for rows, extras in conditioning]


def check_text(conditioning: Any, text_dim: int, name: str) -> None:
    """Raise InputError unless every entry holds text rows of the model's width."""
    for rows, _ in conditioning:
        if rows.shape[-1] != text_dim:
            raise InputError(
                f"'{name}' holds text rows of width {rows.shape[-1]}, from the text encoder of another model; this one "
                f"takes width {text_dim}: encode the prompt with Encode Wan2.2 Prompt, or with UMT5-XXL in core's CLIP "
                "loader (type wan)"
            )
