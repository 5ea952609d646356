"""What scripts that sample with a real checkpoint load: its experts, and a picture as image-to-video takes it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from wan_fp8 import load_transformer
from wan_fp8.models.specs import ModelSpec, Task
from wan_fp8.models.vae import WanVAE, load_vae, normalize_latents
from wan_fp8.models.vae22 import Wan22VAE, load_vae22
from wan_fp8.models.wan import WanModel
from wan_fp8.sampling import i2v_condition, i2v_mask, i2v_video, stretch_image

AnyVAE = WanVAE | Wan22VAE


def load_its_vae(checkpoint: str, spec: ModelSpec, device: str) -> AnyVAE:
    """The VAE of a checkpoint's folder, of the design that its task has, in fp32."""
    load = load_vae22 if spec.task is Task.TI2V else load_vae
    return load(checkpoint, torch.float32, device)


def load_experts(checkpoint: str, device: str, dtype: torch.dtype) -> list[WanModel]:
    """Both experts of a folder that has two, else the one model."""
    folder = Path(checkpoint)
    two = any((folder / name).is_dir() for name in ("high_noise_model", "transformer_2"))
    names = ("high_noise", "low_noise") if two else (None,)
    return [load_transformer(checkpoint, expert=name, dtype=dtype, device=device) for name in names]


def condition_of(vae: WanVAE, path: str, width: int, height: int, frames: int) -> Tensor:
    """I2V's channels [1, 20, F, H, W] for a picture."""
    pixels = torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8)
    size = Image.open(path).size
    picture = stretch_image(pixels.view(size[1], size[0], 3).permute(2, 0, 1) / 255, width, height)
    weight = next(vae.parameters())
    latents = normalize_latents(vae.encode(i2v_video(picture, frames)[None].to(weight)).float().cpu())
    return i2v_condition(i2v_mask(frames, height // 8, width // 8)[None], latents)
