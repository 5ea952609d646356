"""What the transformer trains on: a pool of clips as latents, the first frame's conditioning, and their captions."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from wan_fp8.models.text_encoder import TextEncoder
from wan_fp8.sampling import i2v_condition, i2v_mask

from .autoencoder import AnyVAE, encode
from .captions import BACKGROUNDS, Scene, phrasings, scenes
from .text import UNCONDITIONAL, CaptionTable, make_table
from .world import Clips, WorldSize, draw, make_clips

PHRASINGS = 6
"""Captions per scene and background, and as many that do not name the background."""
PLACES = len(BACKGROUNDS) + 1


@dataclass(frozen=True, slots=True)
class Pool:
    """Clips of the world and what each shows."""

    clips: Clips
    scenes: list[Scene]
    """Those that occur, each once."""
    scene_N: Tensor
    """Index into ``scenes``."""
    background_N: Tensor


def make_pool(count: int, size: WorldSize, *, seed: int, held_out: bool, device: torch.device) -> Pool:
    """``count`` random clips of training's scenes, or of those held out."""
    choices = scenes(held_out=held_out)
    rng = random.Random(f"{seed}/{held_out}")
    picked = [rng.choice(choices) for _ in range(count)]
    backgrounds = [rng.randrange(len(BACKGROUNDS)) for _ in range(count)]
    clips = make_clips(picked, backgrounds, size, seed=seed, device=device)
    place = {scene: index for index, scene in enumerate(dict.fromkeys(picked))}
    indices = torch.tensor([place[scene] for scene in picked], device=device)
    return Pool(clips, list(place), indices, torch.tensor(backgrounds, device=device))


@dataclass(frozen=True, slots=True)
class LatentPool:
    """The same clips as the transformer sees them; everything on the device that trains."""

    latents_NCFHW: Tensor
    """Normalised."""
    image_NCFHW: Tensor | None
    """Normalised latents of the first frame followed by grey, as I2V is given them; None if nothing learns I2V."""
    mask_4FHW: Tensor
    scene_N: Tensor
    background_N: Tensor
    table: CaptionTable
    unconditional: int
    """Row of the table at which the unconditional texts begin."""

    def __len__(self) -> int:
        return len(self.latents_NCFHW)

    def condition(self, index_B: Tensor, given: Tensor | None = None) -> Tensor:
        """I2V's 20 channels; zeros in the clips where ``given`` is False (they learn text to video)."""
        if self.image_NCFHW is None:
            assert given is not None and not given.any()
            return torch.zeros(len(index_B), 20, *self.latents_NCFHW.shape[2:], device=index_B.device)
        image = self.image_NCFHW[index_B].float()
        condition = i2v_condition(self.mask_4FHW.expand(len(image), -1, -1, -1, -1), image)
        return condition if given is None else condition * given.view(-1, 1, 1, 1, 1)

    def captions(self, index_B: Tensor, dropped: float, generator: torch.Generator) -> Tensor:
        """Rows of the table: one phrasing of each clip, or, with probability ``dropped``, an unconditional text."""
        device, count = index_B.device, len(index_B)

        def draw_int(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator, device=device)

        named = draw_int(2).bool()
        place = torch.where(named, self.background_N[index_B], PLACES - 1)
        rows = (self.scene_N[index_B] * PLACES + place) * PHRASINGS + draw_int(PHRASINGS)
        without = torch.rand(count, generator=generator, device=device) < dropped
        return torch.where(without, self.unconditional + draw_int(len(UNCONDITIONAL)), rows)


def _scene_captions(scene: Scene) -> list[str]:
    return [text for place in (*range(len(BACKGROUNDS)), None) for text in phrasings(scene, place, PHRASINGS)]


@torch.no_grad()
def encode_pool(
    pool: Pool,
    size: WorldSize,
    vae: AnyVAE,
    encoder: TextEncoder,
    *,
    dtype: torch.dtype = torch.float32,
    images: bool = True,
    at_once: int = 256,
) -> LatentPool:
    """Draw and encode everything once; the transformer's training then touches neither pixels nor the VAE.

    Args:
        dtype: Computes and keeps the latents.
        images: Whether the conditioning of I2V is wanted as well.
    """
    device = pool.scene_N.device
    latents, given = [], []
    for i in range(0, len(pool.clips), at_once):
        video = draw(pool.clips[i : i + at_once], size)
        latents.append(encode(vae, video, dtype))
        if images:
            given.append(encode(vae, grey_after_first(video), dtype))
    texts = [text for scene in pool.scenes for text in _scene_captions(scene)]
    table = make_table(encoder, [*texts, *UNCONDITIONAL])
    every = torch.cat(latents)
    mask = i2v_mask(size.frames, *every.shape[-2:]).to(device)
    first = torch.cat(given) if images else None
    return LatentPool(every, first, mask, pool.scene_N, pool.background_N, table, len(texts))


def keep_latents(path: Path, key: str, pool: LatentPool) -> None:
    """Write a pool, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {f.name: getattr(pool, f.name) for f in fields(pool) if f.name != "table"}
    table = {f.name: getattr(pool.table, f.name) for f in fields(pool.table)}
    partial = path.with_suffix(".partial")
    torch.save({"key": key, "pool": kept, "table": table}, partial)
    partial.rename(path)


def read_latents(path: Path, key: str, device: torch.device) -> LatentPool | None:
    """What ``keep_latents`` wrote under the same key; None if there is nothing, or something else."""
    if not path.is_file():
        return None
    kept = torch.load(path, map_location=device, weights_only=True)
    return LatentPool(**kept["pool"], table=CaptionTable(**kept["table"])) if kept["key"] == key else None


def grey_after_first(video_N3THW: Tensor) -> Tensor:
    """The clip that I2V encodes: the first frame, then mid-grey."""
    result = torch.zeros_like(video_N3THW)
    result[:, :, 0] = video_N3THW[:, :, 0]
    return result
