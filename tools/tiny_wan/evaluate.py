"""Sample as users do (published schedule, solver, guidance, expert switch), decode, and look at what came out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_fp8.models.specs import Task
from wan_fp8.models.text_encoder import TextEncoder
from wan_fp8.models.vae import denormalize_latents
from wan_fp8.models.wan import WanModel
from wan_fp8.sampling import (
    DEFAULTS,
    NEGATIVE_PROMPT,
    i2v_condition,
    i2v_mask,
    impose_first_frame,
    latent_shape,
    make_solver,
    plan_steps,
    sigmas,
    ti2v_timesteps,
    timesteps,
)

from .autoencoder import AnyVAE, encode, psnr
from .captions import BACKGROUNDS, Scene, caption, scenes
from .classify import Verdict, classify
from .data import grey_after_first
from .text import full_rows
from .world import WorldSize, draw, make_clips


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOptions:
    """What a user could set; None takes the published default of the task."""

    steps: int = 40
    shift: float | None = None
    guidance: tuple[float, float] | None = None
    """(low noise, high noise)"""
    seed: int = 0
    at_once: int = 128
    dtype: torch.dtype = torch.float32
    """The VAE's."""


@torch.no_grad()
def sample(
    experts: Mapping[str, WanModel],
    rows: Tensor,
    negative: Tensor,
    size: WorldSize,
    options: SampleOptions,
    condition: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Normalised latents [B, C, F, H/stride, W/stride].

    Args:
        experts: ``high_noise`` and ``low_noise``; TI2V's one model stands for both.
        rows: Text rows [B, 512, 4096]; ``negative`` likewise, [1, 512, 4096].
        condition: I2V's 20 channels [B, 20, F, H/8, W/8], or None.
        first: TI2V's given frame, [B, 48, 1, H/16, W/16] normalised, or None.
    """
    model = experts["high_noise"]
    task = model.spec.task
    defaults = DEFAULTS[task]
    shift, guidance = options.shift or defaults.shift, options.guidance or defaults.guidance
    shape = (len(rows), *latent_shape(task, size.width, size.height, size.frames))
    device = rows.device
    x = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed)).to(device)
    if first is not None:
        x = impose_first_frame(x, first)
    negative = negative.expand_as(rows).contiguous()
    solver = make_solver("unipc", sigmas(options.steps, shift))
    for step in plan_steps(timesteps(options.steps, shift), boundary=defaults.boundary, guidance=guidance):
        model = experts[step.expert or "low_noise"]
        inputs = x if condition is None else torch.cat([x, condition], dim=1)
        t = torch.full((len(x),), step.timestep, device=device)
        if task is Task.TI2V:
            t = ti2v_timesteps(t, size.frames, first_frame_given=first is not None)
        velocity = model(inputs, t, context=rows).float()
        if step.guidance != 1:
            without = model(inputs, t, context=negative).float()
            velocity = without + step.guidance * (velocity - without)
        x = solver.step(velocity, step.index, x)
        if first is not None:
            x = impose_first_frame(x, first)
    for model in experts.values():
        model.clear_text_cache()
    return x


@torch.no_grad()
def decode(vae: AnyVAE, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, 3, T, H, W] float32 in -1..1."""
    at_once = 32 if latents.is_cuda else 2  # on a CPU, what fits its caches: a third faster
    parts = [vae.decode(denormalize_latents(part.float()).to(dtype)).float() for part in latents.split(at_once)]
    return torch.cat(parts).clamp(-1, 1)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Videos of some captions, and what was seen in them."""

    scenes: list[Scene]
    captions: list[str]
    video_B3THW: Tensor
    verdicts: list[Verdict]

    def scores(self) -> dict[str, Any]:
        """Shares of right answers, and the mistakes by motion."""
        seen = [(scene.words, verdict) for scene, verdict in zip(self.scenes, self.verdicts, strict=True)]
        count = len(seen)
        wrong = Counter(f"{wanted[2]} seen as {v.motion or 'nothing'}" for wanted, v in seen if v.motion != wanted[2])
        return {
            "captions": count,
            "colour_and_motion": round(
                sum(v.matches(s) for s, v in zip(self.scenes, self.verdicts, strict=True)) / count, 4
            ),
            "colour": round(sum(v.colour == wanted[0] for wanted, v in seen) / count, 4),
            "motion": round(sum(v.motion == wanted[2] for wanted, v in seen) / count, 4),
            "shape": round(sum(v.shape == wanted[1] for wanted, v in seen) / count, 4),
            "mistakes": dict(wrong.most_common(12)),
        }


def choose_scenes(count: int, *, held_out: bool, seed: int) -> list[Scene]:
    """``count`` scenes: every one once before any comes again."""
    rng, chosen = random.Random(f"evaluate/{seed}/{held_out}"), []
    while len(chosen) < count:
        every = scenes(held_out=held_out)
        rng.shuffle(every)
        chosen += every
    return chosen[:count]


def evaluate_t2v(
    experts: Mapping[str, WanModel],
    vae: AnyVAE,
    encoder: TextEncoder,
    size: WorldSize,
    options: SampleOptions,
    chosen: Sequence[Scene],
) -> Evaluation:
    """One caption a scene, half of them naming a background."""
    rng = random.Random(options.seed)
    places = [rng.choice((None, rng.randrange(len(BACKGROUNDS)))) for _ in chosen]
    captions = [caption(scene, place, rng) for scene, place in zip(chosen, places, strict=True)]
    negative = full_rows(encoder, [NEGATIVE_PROMPT])
    videos = []
    for i in range(0, len(captions), options.at_once):
        rows = full_rows(encoder, captions[i : i + options.at_once])
        videos.append(decode(vae, sample(experts, rows, negative, size, options), options.dtype))
    video = torch.cat(videos).cpu()
    return Evaluation(list(chosen), captions, video, classify(video))


def evaluate_i2v(
    experts: Mapping[str, WanModel],
    vae: AnyVAE,
    encoder: TextEncoder,
    size: WorldSize,
    options: SampleOptions,
    chosen: Sequence[Scene],
) -> tuple[Evaluation, dict[str, float]]:
    """As ``evaluate_t2v``, from the first frames of new clips; and the PSNR of the first frame against the given one.

    What the VAE alone makes of the given frame is the most that can be reached, and is reported beside it.
    """
    rng = random.Random(options.seed)
    device = encoder.device
    captions = [caption(scene, None, rng) for scene in chosen]
    backgrounds = [rng.randrange(len(BACKGROUNDS)) for _ in chosen]
    clips = make_clips(chosen, backgrounds, size, seed=10_000 + options.seed, device=device)
    given = grey_after_first(draw(clips, size))
    latents = encode(vae, given, options.dtype).float()
    mask = i2v_mask(size.frames, size.height // 8, size.width // 8).to(device)
    condition = i2v_condition(mask.expand(len(chosen), -1, -1, -1, -1), latents)
    negative = full_rows(encoder, [NEGATIVE_PROMPT])
    videos = []
    for i in range(0, len(captions), options.at_once):
        part = slice(i, i + options.at_once)
        rows = full_rows(encoder, captions[part])
        videos.append(decode(vae, sample(experts, rows, negative, size, options, condition[part]), options.dtype))
    video = torch.cat(videos)
    first = given[:, :, 0]
    limit = decode(vae, latents[:, :, :1], options.dtype)[:, :, 0]
    frames = {
        "first_frame_psnr_db": round(float(psnr(video[:, :, 0], first).mean()), 2),
        "first_frame_psnr_worst_db": round(float(psnr(video[:, :, 0], first).min()), 2),
        "vae_alone_psnr_db": round(float(psnr(limit, first).mean()), 2),
    }
    video = video.cpu()
    return Evaluation(list(chosen), captions, video, classify(video)), frames


def evaluate_ti2v(
    model: WanModel,
    vae: AnyVAE,
    encoder: TextEncoder,
    size: WorldSize,
    options: SampleOptions,
    chosen: Sequence[Scene],
    *,
    image: bool,
) -> tuple[Evaluation, dict[str, float]]:
    """As ``evaluate_t2v`` without, as ``evaluate_i2v`` with a first frame. Videos are kept, and looked at, at half
    their size, which is the one that the other tasks' are; the first frame is measured before that."""
    rng = random.Random(options.seed)
    experts = dict.fromkeys(("high_noise", "low_noise"), model)
    backgrounds = [rng.randrange(len(BACKGROUNDS)) for _ in chosen]
    captions = [
        caption(scene, None if image else rng.choice((None, place)), rng)
        for scene, place in zip(chosen, backgrounds, strict=True)
    ]
    clips = make_clips(chosen, backgrounds, size, seed=10_000 + options.seed, device=encoder.device)
    given = torch.cat([draw(clips[i : i + 32], size)[:, :, :1] for i in range(0, len(clips), 32)]) if image else None
    latents = encode(vae, given, options.dtype).float() if given is not None else None
    negative = full_rows(encoder, [NEGATIVE_PROMPT])
    videos, starts = [], []
    for i in range(0, len(captions), options.at_once):
        part = slice(i, i + options.at_once)
        rows = full_rows(encoder, captions[part])
        first = latents[part] if latents is not None else None
        video = decode(vae, sample(experts, rows, negative, size, options, first=first), options.dtype)
        starts.append(video[:, :, 0])
        videos.append(F.avg_pool3d(video, (1, 2, 2)).cpu())
    frames = {}
    if given is not None and latents is not None:
        wanted, reached = given[:, :, 0], torch.cat(starts)
        limit = decode(vae, latents, options.dtype)[:, :, 0]
        frames = {
            "first_frame_psnr_db": round(float(psnr(reached, wanted).mean()), 2),
            "first_frame_psnr_worst_db": round(float(psnr(reached, wanted).min()), 2),
            "vae_alone_psnr_db": round(float(psnr(limit, wanted).mean()), 2),
        }
    video = torch.cat(videos)
    return Evaluation(list(chosen), captions, video, classify(video)), frames


def write_first_frame(path: Path, scene: Scene, background: int, size: WorldSize, seed: int) -> None:
    """The first frame of one clip, as a picture."""
    from PIL import Image

    video = draw(make_clips([scene], [background], size, seed=seed), size)
    pixels = ((video[0, :, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(pixels.contiguous().numpy()).save(path)


def contact_sheet(evaluations: Sequence[Evaluation], path: Path, rows: int = 10, columns: int = 6) -> None:
    """Frames of the first samples of each evaluation, with their captions and what was seen, as a PNG."""
    from PIL import Image, ImageDraw

    lines = [
        (each.captions[i], each.scenes[i], each.verdicts[i], each.video_B3THW[i])
        for each in evaluations
        for i in range(min(rows, len(each.captions)))
    ]
    _, frames, height, width = lines[0][3].shape
    label = 12
    sheet = Image.new("RGB", (columns * width, len(lines) * (height + label)), (40, 40, 40))
    pen = ImageDraw.Draw(sheet)
    for line, (text, scene, verdict, video) in enumerate(lines):
        top = line * (height + label)
        good = verdict.matches(scene, shape=True)
        seen = "" if good else f"   (seen: {verdict.colour} {verdict.shape} {verdict.motion})"
        pen.text((2, top), text + seen, fill=(200, 255, 200) if good else (255, 180, 160))
        pixels = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        for column in range(columns):
            frame = round(column * (frames - 1) / max(1, columns - 1))
            image = Image.fromarray(pixels[:, frame].permute(1, 2, 0).contiguous().numpy())
            sheet.paste(image, (column * width, top + label))
    sheet.save(path)
