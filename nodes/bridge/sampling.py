"""Samplers, schedules, and what a run sees of a MODEL: shift and timesteps.

Timesteps: core hands the model ``1000 * sigma`` as a float; the official solvers hand it the integer below, computed
in float64. ``with_timesteps`` object-patches ``model_sampling`` on a clone of the MODEL with one that looks the
schedule's timesteps up by sigma, so that everything else (shift, previews, percent ranges, wrappers) stays core's. A
sigma that is not on the schedule (a sampler with intermediate evaluations) keeps core's float.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import trange

from ...wan_fp8.attention import Step
from ...wan_fp8.sampling import SOLVER_NAMES, make_solver
from ..choices import check_choice
from .hosted_model import STEP

PURE_NOISE = 0.999
"""From this sigma on, a run starts from the noise itself. The official UniPC schedule begins at S(0.999), which is
0.999 or more for every shift of 1 or more, and its first latents are unscaled noise; core would scale them by
sigma."""


# ---- samplers and schedules ----------------------------------------------------------------------------------------


def sampler_names() -> list[str]:
    """Names that ``make_sampler`` takes: the official solvers first, then core's samplers that are not among them."""
    return [*SOLVER_NAMES, *(name for name in comfy.samplers.SAMPLER_NAMES if name not in SOLVER_NAMES)]


def make_sampler(name: str) -> Any:
    """A core SAMPLER: an official solver ("unipc", "dpm++", "euler") or any of core's samplers by name.

    Raises:
        InputError: there is no sampler of that name.
    """
    check_choice("solver", name, sampler_names(), first=SOLVER_NAMES)
    if name in SOLVER_NAMES:
        return comfy.samplers.KSAMPLER(_sample_with_solver, extra_options={"solver": name})
    return comfy.samplers.sampler_object(name)


def scheduler_names() -> list[str]:
    """Core's schedulers."""
    return list(comfy.samplers.SCHEDULER_NAMES)


def core_sigmas(model: Any, scheduler: str, steps: int, sampler: str | None = None) -> Tensor:
    """Core's own schedule [steps + 1] for the shift that ``model`` carries (float32, CPU).

    Args:
        sampler: Name of the sampler that will run it; core takes one more step for some (uni_pc, dpm_2) and drops
            the last but one.
    """
    drop = sampler in comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps + drop).cpu()
    return torch.cat([sigmas[:-2], sigmas[-1:]]) if drop else sigmas


@torch.no_grad()
def _sample_with_solver(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    solver: str,
) -> Tensor:
    """A k-diffusion style sampler function around one of the official solvers.

    ``model(x, sigma)`` returns the clean estimate; with a noise mask (TI2V's first frame) core has already put the
    given latents into both its input and its output.
    """
    extra_args = extra_args or {}
    run = make_solver(solver, sigmas)
    x = _first_latents(model, x, sigmas)
    ones = x.new_ones([x.shape[0]])
    for index in trange(run.steps, disable=disable):
        denoised = model(x, sigmas[index] * ones, **_told_step(extra_args, Step(index, run.steps)))
        if callback is not None:
            callback({"x": x, "i": index, "sigma": sigmas[index], "sigma_hat": sigmas[index], "denoised": denoised})
        x = run.step((x - denoised) / sigmas[index], index, x)
    return x


def _told_step(extra_args: dict[str, Any], step: Step) -> dict[str, Any]:
    """The arguments of a model call, with its step for settings that hold in some steps only."""
    options = dict(extra_args.get("model_options") or {})
    options["transformer_options"] = {**options.get("transformer_options", {}), STEP: step}
    return {**extra_args, "model_options": options}


def _first_latents(model: Any, scaled: Tensor, sigmas: Tensor) -> Tensor:
    """The noise itself where a run starts at (almost) pure noise, else core's mixture of noise and latents."""
    noise = getattr(model, "noise", None)
    if noise is None or float(sigmas[0]) < PURE_NOISE or torch.count_nonzero(noise) == 0:
        return scaled
    return noise.to(scaled, copy=True)


def raw_latents(model: Any, normalised: Tensor) -> Tensor:
    """From what the transformer of MODEL works on to what a LATENT holds: VAE means."""
    return model.get_model_object("latent_format").process_out(normalised)


def where_it_computes(model: Any, value: Tensor) -> Tensor:
    """A tensor in the type and on the device that MODEL computes in, so that it crosses the bus once and not with
    every step."""
    base = model.model
    return value.to(model.load_device, base.manual_cast_dtype or base.get_dtype())


# ---- what a run sees of a model ------------------------------------------------------------------------------------


def set_shift(model: Any, shift: float) -> Any:
    """A clone of MODEL with flow sampling of this shift (what core's ModelSamplingSD3 does)."""

    class ModelSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    sampling = ModelSampling(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    patched = model.clone()
    patched.add_object_patch("model_sampling", sampling)
    return patched


def with_timesteps(model: Any, sigmas: Tensor, timesteps: Tensor) -> Any:
    """A clone of MODEL whose DiT gets ``timesteps[i]`` at ``sigmas[i]`` instead of ``1000 * sigmas[i]``.

    Args:
        sigmas: [steps + 1] or [steps], as given to the sampler.
        timesteps: [steps], 0..1000.
    """
    current = model.get_model_object("model_sampling")
    base: Any = getattr(current, "unscheduled", type(current))

    class ScheduledTimesteps(base):
        unscheduled = base

        def timestep(self, sigma: Tensor) -> Tensor:
            value = torch.as_tensor(sigma)
            if value.device not in self.schedules:  # once: a copy from the host's memory waits for the GPU
                self.schedules[value.device] = self.schedules[torch.device("cpu")].to(value.device)
            known, told = self.schedules[value.device]
            on_schedule = value.float()[..., None] == known
            scheduled = (on_schedule * told).sum(-1)
            return torch.where(on_schedule.any(-1), scheduled, super().timestep(value))

    sampling = copy.deepcopy(current)
    sampling.__class__ = ScheduledTimesteps
    schedule = torch.stack([t.to("cpu", torch.float32) for t in (sigmas[: len(timesteps)], timesteps)])
    sampling.schedules = {schedule.device: schedule}
    patched = model.clone()
    patched.add_object_patch("model_sampling", sampling)
    return patched
