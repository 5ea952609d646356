"""Sampler nodes for T2V-A14B, I2V-A14B and TI2V-5B: inputs checked, conditioned and planned here, run by the bridge."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..wan_fp8 import sampling
from ..wan_fp8.checkpoint.naming import HIGH_NOISE, LOW_NOISE
from ..wan_fp8.errors import BackendUnavailableError, InputError
from ..wan_fp8.models.specs import Task
from . import bridge, conditions
from .choices import check_choice
from .missing import require
from .notices import extended, node_id, notice
from .sampler_inputs import (
    NOISE_CPU,
    NOISE_CUDA,
    OFFICIAL_SCHEDULE,
    low_noise_input,
    model_inputs,
    schedule_inputs,
    scheduler_names,
    size_inputs,
)
from .schema import SAMPLING, node_schema

NODE_OF_TASK = {
    Task.T2V: "Sample Wan2.2 Text to Video",
    Task.I2V: "Sample Wan2.2 Image to Video",
    Task.TI2V: "Sample Wan2.2 5B Text/Image to Video",
    Task.ANIMATE: "Sample Wan2.2 Animate",
    Task.S2V: "Sample Wan2.2 Speech to Video",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The widgets that every sampler has.

    Raises:
        InputError: a box with a list holds what is not on it.
    """

    seed: int
    steps: int
    shift: float
    guidance: float
    guidance_low: float | None = None
    boundary: float | None = None
    solver: str
    scheduler: str
    noise: str

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, bridge.sampler_names(), first=sampling.SOLVER_NAMES)
        check_choice("scheduler", self.scheduler, scheduler_names(), first=[OFFICIAL_SCHEDULE])
        check_choice("noise", self.noise, [NOISE_CPU, NOISE_CUDA])


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What the settings come to."""

    sigmas: Tensor
    """[steps + 1]"""
    timesteps: Tensor | None
    """[steps] integers of the official schedules; None for core's 1000 sigma."""
    switch: int
    """Steps of the first expert; all of them for a model with one transformer."""


class WanFP8SampleT2V(io.ComfyNode):
    """Text to video with the two experts of T2V-A14B."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8SampleT2V",
            display_name=NODE_OF_TASK[Task.T2V],
            category=SAMPLING,
            description="Makes the latents of a video from a prompt with Wan2.2 T2V-A14B: both experts in one run, "
            "switched by noise level, with the published solver, schedule and settings. Decode the result with core's "
            "VAE Decode.",
            search_aliases=["wan2.2 t2v", "wan sampler", "text to video"],
            inputs=[
                *model_inputs(Task.T2V),
                *size_inputs(Task.T2V),
                *schedule_inputs(Task.T2V),
                low_noise_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Latents of one video, for core's VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        width: int,
        height: int,
        length: int,
        model_low: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        chosen = Settings(**settings)
        latent = conditions.empty_latent(Task.T2V, width, height, length)
        experts = prepare_models(Task.T2V, model, model_low if settings["boundary"] > 0 else None)
        return _output(run(experts, positive, negative, latent, chosen))


class WanFP8SampleI2V(io.ComfyNode):
    """Image to video with the two experts of I2V-A14B."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8SampleI2V",
            display_name=NODE_OF_TASK[Task.I2V],
            category=SAMPLING,
            description="Makes the latents of a video that starts with your picture (and, if you like, ends with "
            "another) with Wan2.2 I2V-A14B: both experts in one run, switched by noise level, with the published size "
            "rule, mask, solver, schedule and settings. Decode the result with core's VAE Decode.",
            search_aliases=["wan2.2 i2v", "wan sampler", "image to video", "first last frame"],
            inputs=[
                *model_inputs(Task.I2V),
                io.Vae.Input(
                    "vae", tooltip="Wan 2.1 VAE (16 channels), the one of this checkpoint. Encodes the picture."
                ),
                io.Image.Input(
                    "start_image", tooltip="First frame, one picture. Stretched, not cropped, to the size of the video."
                ),
                io.Combo.Input(
                    "size",
                    options=list(conditions.SIZE_RULES[Task.I2V]),
                    default=conditions.AREA_720P,
                    tooltip="How large the video is. Default 720p area: the published rule (wan/image2video.py), "
                    "which keeps the picture's aspect within 1280 x 720 pixels in total; 480p area does so within 832 "
                    "x 480, about four times as fast. 'width x height' takes the two numbers below and stretches the "
                    "picture to them.",
                ),
                *size_inputs(Task.I2V, when=f"Only for size '{conditions.AS_GIVEN}'. "),
                *schedule_inputs(Task.I2V),
                low_noise_input(),
                io.Image.Input(
                    "end_image",
                    optional=True,
                    tooltip="Last frame, one picture, stretched likewise. Not in the published code; by the mask that "
                    "the model was trained with, as core's WanFirstLastFrameToVideo does. Free.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Latents of one video, for core's VAE Decode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        vae: Any,
        start_image: Tensor,
        size: str,
        width: int,
        height: int,
        length: int,
        model_low: Any = None,
        end_image: Tensor | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        chosen = Settings(**settings)
        start = conditions.one_image(start_image, "start_image")
        end = None if end_image is None else conditions.one_image(end_image, "end_image")
        width, height = conditions.video_size(Task.I2V, start, size, width, height)
        latent = conditions.empty_latent(Task.I2V, width, height, length)
        conditions.check_vae(vae, Task.I2V)
        experts = prepare_models(Task.I2V, model, model_low if settings["boundary"] > 0 else None)
        warnings = [conditions.stretch_warning(image, width, height) for image in (start, end) if image is not None]
        lines = [f"video of {width}x{height} pixels, {length} frames", *(line for line in warnings if line)]
        shown = notice(node_id(cls), lines, level=logging.WARNING if len(lines) > 1 else logging.INFO)
        values = conditions.image_conditioning(vae, start, end, width, height, length)
        positive, negative = conditions.with_values(positive, values), conditions.with_values(negative, values)
        return _output(run(experts, positive, negative, latent, chosen), shown)


class WanFP8SampleTI2V(io.ComfyNode):
    """Text or image to video with TI2V-5B."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8SampleTI2V",
            display_name=NODE_OF_TASK[Task.TI2V],
            category=SAMPLING,
            description="Makes the latents of a video from a prompt, or from a prompt and a first picture, with "
            "Wan2.2 TI2V-5B, by the published size rule, per-frame timesteps, solver, schedule and settings. Decode "
            "the result with core's VAE Decode.",
            search_aliases=["wan2.2 5b", "ti2v", "wan sampler", "image to video", "text to video"],
            inputs=[
                *model_inputs(Task.TI2V),
                io.Combo.Input(
                    "size",
                    options=list(conditions.SIZE_RULES[Task.TI2V]),
                    default=conditions.AREA_704P,
                    tooltip="How large a video made from a picture is; without a picture, width x height count. "
                    "Default 704p area: the published rule (best_output_size in wan/utils/utils.py), which keeps the "
                    "picture's aspect within 1280 x 704 pixels in total. 'width x height' takes the two numbers "
                    "below. Either way the picture is scaled to cover the size and cropped around its centre.",
                ),
                *size_inputs(Task.TI2V, when=f"Without a picture, or for size '{conditions.AS_GIVEN}'. "),
                *schedule_inputs(Task.TI2V),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Wan 2.2 VAE (48 channels), the one of this checkpoint. Needed with a picture, which it "
                    "encodes.",
                ),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="First frame, one picture. Leave it unconnected for text to video.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Latents of one video, for core's VAE Decode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        size: str,
        width: int,
        height: int,
        length: int,
        vae: Any = None,
        start_image: Tensor | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        chosen = Settings(**settings)
        conditions.check_size_rule(Task.TI2V, size)
        if start_image is None:
            latent = conditions.empty_latent(Task.TI2V, width, height, length)
            experts = prepare_models(Task.TI2V, model, None)
            return _output(run(experts, positive, negative, latent, chosen))
        start = conditions.one_image(start_image, "start_image")
        width, height = conditions.video_size(Task.TI2V, start, size, width, height)
        sampling.check_frames(length)
        if vae is None:
            raise InputError(
                "a start_image needs the Wan 2.2 VAE to encode it; got none: connect the VAE of this "
                "checkpoint to 'vae'"
            )
        conditions.check_vae(vae, Task.TI2V)
        experts = prepare_models(Task.TI2V, model, None)
        shown = notice(node_id(cls), [f"video of {width}x{height} pixels, {length} frames"])
        latent = conditions.first_frame_latent(vae, experts[0], start, width, height, length)
        return _output(run(experts, positive, negative, latent, chosen), shown)


def _output(latent: dict[str, Tensor], shown: Any = None) -> io.NodeOutput:
    """The latents, with what the node showed before the run and what the run said at its end."""
    return io.NodeOutput(latent, ui=extended(shown, bridge.kept_words()))


def prepare_models(task: Task, model: Any, model_low: Any) -> list[Any]:
    """MODELs with this pack's transformer inside, high-noise expert first.

    Raises:
        InputError: a MODEL is not one of this task, or the two experts are known and swapped.
    """
    if model_low is not None and (bridge.expert_of(model), bridge.expert_of(model_low)) == (LOW_NOISE, HIGH_NOISE):
        raise InputError(
            "the experts are swapped: 'model' holds the low-noise expert and 'model_low' the high-noise one; connect "
            "the high-noise MODEL to 'model' and the low-noise MODEL to 'model_low'"
        )
    experts = []
    for name, given in (("model", model), ("model_low", model_low)):
        if given is None:
            continue
        expert = bridge.hosted(require(given))
        found = bridge.spec_of(expert).task
        if found is not task:
            raise InputError(
                f"'{name}' is a Wan2.2 {found.upper()} model and this node samples {task.upper()}: use the node "
                f"'{NODE_OF_TASK[found]}', or load a {task.upper()} checkpoint"
            )
        experts.append(expert)
    return experts


def plan(model: Any, settings: Settings) -> Schedule:
    """Sigmas, timesteps and expert switch of a run.

    Args:
        model: MODEL that carries the shift; core's schedulers read it.
    """
    boundary = settings.boundary
    if settings.scheduler == OFFICIAL_SCHEDULE:
        grid = settings.solver if settings.solver in sampling.SOLVER_NAMES else "euler"
        sigmas = sampling.sigmas(settings.steps, settings.shift, grid)
        timesteps = sampling.timesteps(settings.steps, settings.shift, grid)
        switch = settings.steps if boundary is None else sampling.high_noise_steps(timesteps, boundary)
        return Schedule(sigmas=sigmas, timesteps=timesteps, switch=switch)
    sigmas = bridge.core_sigmas(model, settings.scheduler, settings.steps, settings.solver)
    switch = len(sigmas) - 1 if boundary is None else int((sigmas[:-1] >= boundary).sum())
    return Schedule(sigmas=sigmas, timesteps=None, switch=switch)


def draw_noise(latent: dict[str, Tensor], settings: Settings) -> Tensor | None:
    """Noise from the GPU's generator, as the published code draws it; None for core's, from the CPU's.

    Raises:
        BackendUnavailableError: there is no NVIDIA GPU.
    """
    if settings.noise != NOISE_CUDA:
        return None
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"noise '{NOISE_CUDA}' is drawn by an NVIDIA GPU, and this machine has none that torch can use: set noise "
            "to 'cpu'"
        )
    generator = torch.Generator("cuda").manual_seed(settings.seed)
    shape = latent["samples"].shape
    return torch.randn(shape[1:], dtype=torch.float32, device="cuda", generator=generator).cpu().expand(shape)


def run(
    experts: list[Any],
    positive: Any,
    negative: Any,
    latent: dict[str, Tensor],
    settings: Settings,
    observe: Callable[[int, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Sample one video.

    Args:
        experts: One or two MODELs as ``prepare_models`` returns them; they are cloned, never changed.
        observe: See ``bridge.run_stages``.
    Returns:
        A LATENT of raw VAE means, without the mask that TI2V needed on the way.
    Raises:
        InputError: the text is another model's, or the schedule needs an expert that is not there.
    """
    for name, conditioning in (("positive", positive), ("negative", negative)):
        conditions.check_text(conditioning, bridge.spec_of(experts[0]).text_dim, name)
    shifted = [bridge.set_shift(expert, settings.shift) for expert in experts]
    schedule = plan(shifted[0], settings)
    stages = [bridge.Stage(model=shifted[0], cfg=settings.guidance)]
    steps = len(schedule.sigmas) - 1
    if settings.boundary is not None and settings.boundary > 0:
        if len(shifted) == 1 and schedule.switch < steps:
            raise InputError(
                f"steps {schedule.switch + 1} to {steps} belong to the low-noise expert and 'model_low' is not "
                "connected: connect the checkpoint's second MODEL, or set boundary to 0 to run one model throughout"
            )
        low = settings.guidance if settings.guidance_low is None else settings.guidance_low
        stages.append(bridge.Stage(model=shifted[-1], cfg=low, first_step=schedule.switch))
    output, _ = bridge.run_stages(
        stages,
        positive=positive,
        negative=negative,
        latent=latent,
        sigmas=schedule.sigmas,
        timesteps=schedule.timesteps,
        sampler=bridge.make_sampler(settings.solver),
        seed=settings.seed,
        noise=draw_noise(latent, settings),
        observe=observe,
    )
    return {"samples": output["samples"]}
