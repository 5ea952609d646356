"""The VAE stages: a narrow VAE of either design learns the drawn world; its latents get the published statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_fp8.models.vae import STATISTICS, Norm, VAESpec, WanVAE, normalize_latents
from wan_fp8.models.vae22 import VAE22Spec, Wan22VAE

from .loop import Budget, Log, Trainer, batches
from .straight import straight_weights
from .straight22 import straight_weights_22
from .world import Clips, WorldSize, around_shapes, draw

AnyVAE = WanVAE | Wan22VAE
DIM = 8
"""Channels at full resolution."""
DIM_22 = 16
"""Channels of either half of the Wan2.2 VAE, at half resolution: about the same work a pixel."""
KL_WEIGHT = 2e-5
L1_WEIGHT = 0.1
COLOUR_WEIGHT = 4.0
"""Of the error in colour, the difference of each channel from their mean: backgrounds are grey, so that without it an
autoencoder learns them, and shapes in grey, long before it learns a colour."""
WINDOW = WorldSize(width=40, height=40, frames=9)
"""What it trains on: pieces of clips around their shapes. All but one layer is a convolution, and most of a whole clip
is background."""
WINDOW_22 = WorldSize(width=80, height=80, frames=9)
"""The same piece of a world that is drawn twice as large."""


STAGES = {"2.1": "vae", "2.2": "vae22"}
"""Names of the stages by design."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEOptions:
    """How the VAE is trained."""

    budget: Budget
    batch: int = 12
    rate: float = 3e-3
    warmup: int = 50
    log_every: int = 50
    graphs: bool = True
    compile: bool = False
    """Norms only: convolutions are libraries' already."""
    dtype: torch.dtype = torch.float32


def train_vae(
    clips: Clips,
    size: WorldSize,
    options: VAEOptions,
    *,
    seed: int,
    design: str = "2.1",
    start: Mapping[str, Tensor] | None = None,
    state: Path | None = None,
) -> tuple[dict[str, Tensor], Log]:
    """Train on drawn clips.

    Args:
        design: "2.1" or "2.2".
        clips: What to draw; every clip comes up once before any comes again.
        start: Weights to begin with instead of random ones.
        state: Where an interrupted training lies; it goes on there, and is left there.
    Returns:
        Weights under official names in float32, the latents of ``clips`` having the published mean and deviation.
    """
    device = clips.x_NT.device
    torch.manual_seed(seed)
    vae: AnyVAE
    if design == "2.2":
        vae, window = Wan22VAE(VAE22Spec(encoder_dim=DIM_22, decoder_dim=DIM_22)), WINDOW_22
        weights = start or straight_weights_22(vae, seed)
    else:
        vae, window = WanVAE(VAESpec(dim=DIM)), WINDOW
        weights = start or straight_weights(vae, seed)
    vae.load_state_dict({name: value.float() for name, value in weights.items()})
    vae.to(device)
    if options.compile:
        torch._dynamo.config.recompile_limit = 64  # one for each width, with and without gradients
        for module in vae.modules():
            if isinstance(module, Norm):
                module.compile(dynamic=True)
    trainer = Trainer(
        vae,
        stage=STAGES[design],
        budget=options.budget,
        rate=options.rate,
        warmup=options.warmup,
        weight_decay=0.0,
        log_every=options.log_every,
        graphs=options.graphs,
    )
    if state is not None and state.is_file():
        trainer.restore(state)
    order = iter(batches(len(clips), options.batch, seed, device))
    generator = torch.Generator(device).manual_seed(seed)
    dtype = options.dtype
    window = WorldSize(
        width=min(size.width, window.width),
        height=min(size.height, window.height),
        frames=min(size.frames, window.frames),
    )

    def loss_of(video: Tensor) -> Tensor:
        mean, log_variance = vae.moments(video.to(dtype))
        mean, log_variance = mean.float(), log_variance.float().clamp(-12, 8)
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        error = vae.decode(latents.to(dtype)).float() - video
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        colour = error - error.mean(dim=1, keepdim=True)
        loss = error.square().mean() + L1_WEIGHT * error.abs().mean() + KL_WEIGHT * kl
        return loss + COLOUR_WEIGHT * colour.square().mean()

    for step, used in trainer.steps():
        seen = around_shapes(clips[next(order)], size, window, generator)
        trainer.learn(loss_of, (draw(seen, window),), step, used)
    if state is not None:
        trainer.save(state)
    vae.load_state_dict(trainer.averaged())
    vae.requires_grad_(False).eval()
    _fold_statistics(vae, clips[: min(len(clips), 512)], size)
    return {name: value.detach().clone() for name, value in vae.state_dict().items()}, trainer.log


def encode(vae: AnyVAE, video: Tensor, dtype: torch.dtype, at_once: int = 128) -> Tensor:
    """Latents as the transformer takes them, normalised: [N, C, F, H/stride, W/stride]; ``dtype`` computes as well."""
    pieces = [normalize_latents(vae.encode(part.to(dtype)).float()).to(dtype) for part in video.split(at_once)]
    return torch.cat(pieces)


@torch.no_grad()
def _fold_statistics(vae: AnyVAE, clips: Clips, size: WorldSize) -> None:
    """Scale and shift each latent channel to the published mean and deviation, and undo it where decoding begins.

    Both ends are 1x1x1 convolutions, so that nothing but rounding changes.
    """
    mean = torch.cat([vae.encode(draw(clips[i : i + 64], size)) for i in range(0, len(clips), 64)])
    now_std, now_mean = torch.std_mean(mean.transpose(0, 1).flatten(1).double(), dim=1)
    wanted_mean, wanted_std = (now_mean.new_tensor(values) for values in STATISTICS[len(now_mean)])
    scale = wanted_std / now_std.clamp_min(1e-6)
    shift = wanted_mean - scale * now_mean
    channels = len(scale)
    weight, bias = vae.conv1.weight, vae.conv1.bias
    weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    bias[:channels] = bias[:channels] * scale + shift
    bias[channels:] += 2 * scale.log()  # the variance is one of the scaled latents
    inverse = vae.conv2.weight / scale.view(1, -1, 1, 1, 1)
    vae.conv2.bias -= (inverse.flatten(1) * shift).sum(1)
    vae.conv2.weight.copy_(inverse)


@torch.no_grad()
def measure_vae(
    vae: AnyVAE, clips: Clips, size: WorldSize, dtype: torch.dtype = torch.float32, at_once: int = 64
) -> dict[str, float]:
    """Mean PSNR of reconstructions in dB (and the worst clip's), and how far the latents' statistics are off."""
    values, latents = [], []
    for i in range(0, len(clips), at_once):
        video = draw(clips[i : i + at_once], size)
        mean = vae.encode(video.to(dtype))
        values.append(psnr(vae.decode(mean).float().clamp(-1, 1), video))
        latents.append(normalize_latents(mean.float()))
    every = torch.cat(values)
    std, mean = torch.std_mean(torch.cat(latents).transpose(0, 1).flatten(1), dim=1)
    return {
        "psnr_db": round(float(every.mean()), 2),
        "worst_clip_psnr_db": round(float(every.min()), 2),
        "latent_mean_largest": round(float(mean.abs().max()), 3),
        "latent_std_smallest": round(float(std.min()), 3),
        "latent_std_largest": round(float(std.max()), 3),
    }


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """In dB, per clip, of videos in -1..1."""
    error = F.mse_loss(a, b, reduction="none").flatten(1).mean(1).clamp_min(1e-10)
    return 10 * (math.log10(4) - error.log10())
