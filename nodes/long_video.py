"""Videos that several runs make one after the other: one schedule for all of them, one store for their frames, and a
file of what there is when the user cancels."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import folder_paths
import torch
from comfy_api.latest import InputImpl, Types
from torch import Tensor

from ..wan_fp8.caching import sum_line
from ..wan_fp8.errors import BackendUnavailableError, InputError
from ..wan_fp8.models.specs import Task
from . import bridge, conditions
from .sampler_inputs import NOISE_CUDA
from .samplers import Settings, plan, prepare_models

PARTS = "wan_fp8_unfinished/{name}"
"""Below ComfyUI's output folder: what a cancelled run had made."""
SPARE_BYTES = 2 << 30
"""Host memory to leave for everything else."""


class Frames:
    """The frames of a video in the order in which they are made: one allocation, [N, H, W, 3] as IMAGE holds them.

    Raises:
        InputError: they would need more host memory than is free.
    """

    def __init__(self, count: int, width: int, height: int, *, working_frames: int) -> None:
        """``working_frames``: of driving videos and decoded segments that are held beside them at the same time."""
        size = 4 * 3 * width * height
        needed, free = size * (count + working_frames) + SPARE_BYTES, bridge.free_host_bytes()
        if needed > free:
            fits = max(0, (free - SPARE_BYTES) // size - working_frames)
            raise InputError(
                f"{count} frames of {width}x{height} pixels need {needed / 2**30:.0f} GiB of host memory, and "
                f"{free / 2**30:.0f} GiB are free: make {fits} frames or fewer at once, or a smaller video"
            )
        self._images = torch.empty(count, height, width, 3)
        self.made = 0

    def add(self, images_NHWC: Tensor) -> None:
        """Append some."""
        self._images[self.made : self.made + images_NHWC.shape[0]] = images_NHWC
        self.made += images_NHWC.shape[0]

    @property
    def images(self) -> Tensor:
        """What there is so far, a view."""
        return self._images[: self.made]

    @contextlib.contextmanager
    def kept_if_cut_short(self, name: str, fps: float, audio: Any = None) -> Iterator[None]:
        """Whatever ends the block early, a cancelled run too: write what there is to a file, and say where."""
        try:
            yield
        except BaseException:
            if self.made:
                try:
                    path = self._write(name, fps, audio)
                except Exception as error:  # the reason why the run ended matters more
                    bridge.say(f"the frames made so far could not be written: {error}", level=logging.ERROR, keep=True)
                else:
                    bridge.say(f"the run ended early: its first {self.made} frames are in {path}", keep=True)
            raise

    def _write(self, name: str, fps: float, audio: Any) -> str:
        rows, columns = (side // 2 * 2 for side in self._images.shape[1:3])  # H.264 halves the colours both ways
        folder, stem, number, *_ = folder_paths.get_save_image_path(
            PARTS.format(name=name), folder_paths.get_output_directory(), columns, rows
        )
        path = os.path.join(folder, f"{stem}_{number:05}_.mp4")
        parts = Types.VideoComponents(
            images=self.images[:, :rows, :columns], audio=audio, frame_rate=Fraction(fps).limit_denominator(1000)
        )
        InputImpl.VideoFromComponents(parts).save_to(path)
        return path


class SegmentSampler:
    """Runs one prepared model over the same schedule again and again, each time from other noise.

    Args:
        task: Animate or S2V.
        model: MODEL, ours or core's.
        settings: The sampler's widgets.
        noise_dtype: What the GPU's generator draws in.
    Raises:
        InputError: the MODEL or the text is another task's.
        BackendUnavailableError: noise from a GPU that is not there.
    """

    def __init__(
        self,
        task: Task,
        model: Any,
        positive: Any,
        negative: Any,
        settings: Settings,
        noise_dtype: torch.dtype = torch.float32,
    ) -> None:
        (expert,) = prepare_models(task, model, None)
        bridge.refuse_context_windows(expert)
        for name, conditioning in (("positive", positive), ("negative", negative)):
            conditions.check_text(conditioning, bridge.spec_of(expert).text_dim, name)
        if settings.noise == NOISE_CUDA and not torch.cuda.is_available():
            raise BackendUnavailableError(
                f"noise '{NOISE_CUDA}' is drawn by an NVIDIA GPU, and this machine has none that torch can use: set "
                "noise to 'cpu'"
            )
        self.model = bridge.set_shift(expert, settings.shift)
        self.settings = settings
        self._texts = (positive, negative)
        self._schedule = plan(self.model, settings)
        self._device = "cuda" if settings.noise == NOISE_CUDA else "cpu"
        self._noise_dtype = noise_dtype if self._device == "cuda" else torch.float32
        self._generator = torch.Generator(self._device)
        self._cache_facts: list[dict[str, Any]] = []
        self.reseed(settings.seed)

    @property
    def guided(self) -> bool:
        """Whether the negative side is evaluated."""
        return self.settings.guidance != 1

    def reseed(self, seed: int) -> None:
        """Start the noise over from ``seed``; otherwise each run draws on."""
        self._generator.manual_seed(seed % (1 << 64))

    def run(
        self,
        shape: tuple[int, ...],
        values: dict[str, Any],
        negative_values: dict[str, Any],
        index: int,
        count: int,
        hidden: int = 0,
    ) -> Tensor:
        """Sample one segment.

        Args:
            shape: [1, C, F, H, W] of its latents.
            values: What the conditioning holds besides text, on both sides.
            negative_values: What differs on the negative side.
            index: Of the segment, from 0.
            count: Of segments.
            hidden: Latent frames at its start that are not part of the video.
        Returns:
            Raw VAE latents.
        """
        bridge.stop_if_cancelled()
        if count > 1:
            bridge.say(f"segment {index + 1} of {count}")
        noise = torch.randn(shape[1:], dtype=self._noise_dtype, device=self._device, generator=self._generator)[
            None
        ].to("cpu", torch.float32)
        steps = len(self._schedule.sigmas) - 1
        positive, negative = self._texts
        output, _ = bridge.run_stages(
            [bridge.Stage(model=self.model, cfg=self.settings.guidance)],
            positive=conditions.with_values(positive, values),
            negative=conditions.with_values(negative, {**values, **negative_values}),
            latent={"samples": torch.zeros(shape)},
            sigmas=self._schedule.sigmas,
            timesteps=self._schedule.timesteps,
            sampler=bridge.make_sampler(self.settings.solver),
            seed=(self.settings.seed + index) % (1 << 64),
            noise=noise,
            progress=bridge.Progress(index * steps, count * steps, hidden),
        )
        self._cache_facts += self.model.model.diffusion_model.cache_facts
        if 1 < count == index + 1 and self._cache_facts:
            bridge.say(sum_line(self._cache_facts, f"{count} segments"), keep=True)
        return output["samples"]


def picked(video_NHWC: Tensor, frames: list[int]) -> Tensor:
    """Frames of an IMAGE as [N, 3, h, w] float32, transparency dropped."""
    return video_NHWC[frames, :, :, :3].movedim(-1, 1).to(torch.float32)


def check_video(video: Tensor, name: str, *, frames: int | None = None, of: str = "") -> None:
    """Raise InputError unless ``video`` is an IMAGE of one frame or more; of ``frames`` frames, where that is given.

    Args:
        of: What has so many frames.
    """
    if video.ndim != 4 or video.shape[3] not in (3, 4) or 0 in video.shape:
        raise InputError(
            f"{name} takes the frames of a video, [frames, height, width, 3]; got {list(video.shape)}: connect "
            "'images' of core's Get Video Components"
        )
    if frames is not None and video.shape[0] != frames:
        raise InputError(
            f"{name} has {video.shape[0]} frames and {of} has {frames}: they belong together frame by frame; make both "
            "from the same driving video, or cut the longer one with core's 'ImageFromBatch'"
        )


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """[1, C, F, H, W] -> IMAGE [frames, h, w, 3], 0..1, float32 on the CPU."""
    images = vae.decode(latents)
    return images.reshape(-1, *images.shape[-3:]).to("cpu", torch.float32)
