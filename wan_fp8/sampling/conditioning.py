"""What the image-to-video tasks feed the model besides noise, as pure functions of tensors.

B batch, C channels, F latent frames, H/W latent height and width. Images and videos are float, 0..1 where they come
from a user and -1..1 where they go to the VAE.

Source: Wan-Video/Wan2.2 ``wan/image2video.py`` (I2V-A14B) and ``wan/textimage2video.py`` (TI2V-5B).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .sizes import TIME_STRIDE, check_frames, latent_frames


def stretch_image(image_CHW: Tensor, width: int, height: int) -> Tensor:
    """I2V-A14B's image: stretched to width x height whatever its aspect, bicubic without antialiasing, float32 on the
    CPU.

    Args:
        image_CHW: [3, h, w], 0..1.
    Returns:
        [3, height, width] float32 on the CPU, about -1..1 (bicubic overshoots at edges; the published code does not
        clamp).
    Raises:
        InputError: not a three-channel image.
    """
    _check_image(image_CHW)
    signed = (image_CHW.detach().to("cpu", torch.float32) - 0.5) / 0.5
    return F.interpolate(signed[None], size=(height, width), mode="bicubic")[0]


def cover_crop_image(image_CHW: Tensor, width: int, height: int) -> Tensor:
    """TI2V-5B's image: scaled by Lanczos to cover width x height, then cropped around the centre.

    Pillow resizes 8-bit images, as in the published code, so the input is rounded to 1/255 first (exact for a loaded
    picture).

    Args:
        image_CHW: [3, h, w], 0..1.
    Returns:
        [3, height, width] float32 on the CPU, -1..1.
    Raises:
        InputError: not a three-channel image.
    """
    from PIL import Image

    _check_image(image_CHW)
    pixels = (image_CHW.detach().to("cpu", torch.float32).clamp(0, 1) * 255).round().to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return (data.permute(2, 0, 1).to(torch.float32) / 255 - 0.5) / 0.5


def i2v_video(image_CHW: Tensor, frames: int) -> Tensor:
    """The clip that I2V-A14B encodes: the image, then ``frames - 1`` mid-grey frames. [3, H, W] -> [3, frames, H,
    W]."""
    check_frames(frames)
    _check_image(image_CHW)
    grey = image_CHW.new_zeros(3, frames - 1, *image_CHW.shape[1:])
    return torch.cat([image_CHW[:, None], grey], dim=1)


def frame_mask(known: Tensor, lat_h: int, lat_w: int) -> Tensor:
    """Mask channels for any set of given pixel frames.

    The four channels of a latent frame are its four pixel frames; the first pixel frame, which has a latent frame of
    its own, is repeated over all four.

    Args:
        known: [frames] bool, True where a pixel frame is given; frames is 4n + 1.
    Returns:
        [4, F, lat_h, lat_w] float32 on the device of ``known``; 1 = given. (Core ComfyUI keeps the opposite polarity
        until the channels are concatenated.)
    Raises:
        InputError: frames is not 4n + 1.
    """
    count = latent_frames(known.shape[0])
    spread = torch.cat([known[:1].expand(TIME_STRIDE), known[1:]]).to(torch.float32)
    mask = spread.view(count, TIME_STRIDE).T[:, :, None, None]
    return mask.expand(TIME_STRIDE, count, lat_h, lat_w).contiguous()


def i2v_mask(frames: int, lat_h: int, lat_w: int) -> Tensor:
    """I2V-A14B's mask, [4, F, lat_h, lat_w] float32 on the CPU: 1 in latent frame 0, 0 in the others."""
    known = torch.zeros(max(frames, 0), dtype=torch.bool)
    known[:1] = True
    return frame_mask(known, lat_h, lat_w)


def i2v_condition(mask: Tensor, latents: Tensor) -> Tensor:
    """The 20 channels that follow the noisy latents on the channel axis: 4 of mask, then 16 of (normalised) latents.

    Args:
        mask: [..., 4, F, H, W].
        latents: [..., 16, F, H, W], the VAE's encoding of ``i2v_video``, (mean - shift) / scale per channel.
    Raises:
        InputError: the two do not cover the same latent frames, rows and columns.
    """
    if mask.shape[-3:] != latents.shape[-3:]:
        raise InputError(
            "mask and latents must cover the same frames, rows and columns; "
            f"got {tuple(mask.shape)} and {tuple(latents.shape)}"
        )
    return torch.cat([mask.to(latents), latents], dim=-4)


def ti2v_mask(frames: int, lat_h: int, lat_w: int) -> Tensor:
    """TI2V-5B's mask, [F, lat_h, lat_w] float32 on the CPU: 0 in latent frame 0 (given), 1 in the others
    (generated)."""
    mask = torch.ones(latent_frames(frames), lat_h, lat_w)
    mask[0] = 0
    return mask


def impose_first_frame(latents_BCFHW: Tensor, image_latents: Tensor) -> Tensor:
    """Put the clean encoding of the image into latent frame 0: before the first step, and after every one.

    Args:
        latents_BCFHW: [B, C, F, H, W].
        image_latents: [C, 1, H, W] or [B, C, 1, H, W].
    Returns:
        A new tensor; frames 1.. are unchanged.
    Raises:
        InputError: the image was encoded at another size or by another VAE.
    """
    frame = image_latents if image_latents.ndim == latents_BCFHW.ndim else image_latents[None]
    wanted = (latents_BCFHW.shape[1], 1, *latents_BCFHW.shape[3:])
    if tuple(frame.shape[1:]) != wanted or frame.shape[0] not in (1, latents_BCFHW.shape[0]):
        raise InputError(
            f"the image's latents must be {wanted} (channels, one frame, rows, columns); "
            f"got {tuple(image_latents.shape)}. "
            "Encode the image with the checkpoint's own VAE at the size of the video"
        )
    first = frame.to(latents_BCFHW).expand(latents_BCFHW.shape[0], -1, -1, -1, -1)
    return torch.cat([first, latents_BCFHW[:, :, 1:]], dim=2)


def ti2v_timesteps(timestep: Tensor, frames: int, *, first_frame_given: bool) -> Tensor:
    """TI2V-5B's timestep per latent frame.

    Args:
        timestep: [B], 0..1000.
        frames: Pixel frames, 4n + 1.
        first_frame_given: Whether latent frame 0 is an image; it then has timestep 0.
    Returns:
        [B, F] in the dtype of ``timestep``.
    """
    rows = timestep[:, None].repeat(1, latent_frames(frames))
    if first_frame_given:
        rows[:, 0] = 0
    return rows


def _check_image(image: Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise InputError(f"an image must be [3, height, width]; got {tuple(image.shape)}")
