"""Run a sampler over one or two experts.

As the sampler nodes use it::

    stages = [Stage(model=high, cfg=3.5), Stage(model=low, cfg=3.5, first_step=15)]
    output, denoised = run_stages(
        stages, positive=positive, negative=negative, latent=latent, seed=seed, sampler=make_sampler("unipc"),
        sigmas=wan_fp8.sampling.sigmas(40, 5.0, "unipc"), timesteps=wan_fp8.sampling.timesteps(40, 5.0, "unipc"),
    )

Each stage is a complete, ordinary run of core's ``CFGGuider`` on its own model: every wrapper, callback and hook on
that MODEL is honoured, and at guidance 1 core skips the negative pass. The sampler itself is *not* restarted between
stages (see ``coroutine``): its history and the exact latents carry across the switch, and there is one progress bar.
Core's own two-``KSamplerAdvanced`` recipe restarts it, and divides the latents by ``1 - sigma`` in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...wan_fp8.errors import InputError
from .coroutine import Call, Coroutine, Finished
from .hosted_model import SCHEDULE, SHARE, STEP
from .sampling import with_timesteps
from .status import RunStatus


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One model's share of a run."""

    model: Any
    """Core MODEL (a ModelPatcher)."""
    cfg: float
    """Guidance; 1 skips the negative pass."""
    first_step: int = 0
    """Index of the first step that this model serves; 0 for the first stage."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One run's place on a bar that counts several."""

    done: int
    """Steps of the runs before it."""
    steps: int
    """Of all of them."""
    hidden: int = 0
    """Latent frames at the start that a preview leaves out: not part of the video."""


def run_stages(
    stages: Sequence[Stage],
    *,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    sigmas: Tensor,
    sampler: Any,
    seed: int,
    add_noise: bool = True,
    noise: Tensor | None = None,
    timesteps: Tensor | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sample ``latent`` over ``sigmas``; each model call goes to the stage that its sigma belongs to.

    Args:
        stages: At least one; ``first_step`` 0 first, then not decreasing. A stage without a step of its own is never
            loaded.
        positive: Core CONDITIONING.
        negative: Core CONDITIONING.
        latent: Core LATENT: ``samples`` [B, C, F, H, W] in VAE space, optionally ``noise_mask`` (1 = generate; its
            zeros stay as given) and ``batch_index``.
        sigmas: [steps + 1], decreasing; used in float32.
        sampler: Core SAMPLER, from ``make_sampler`` or any node.
        seed: Of the noise, drawn on the CPU as core does, and of the samplers that add noise on the way.
        add_noise: False when ``latent`` already carries the noise of ``sigmas[0]``.
        noise: Noise from elsewhere, in the shape of the latents; None to draw it from ``seed``.
        timesteps: [steps] what the model is told at each step; None for core's ``1000 * sigma``.
        observe: Told each step, counted from 0, and its clean estimate, normalised, on the model's device.
        progress: Where this run stands among others that one bar counts; None: it has a bar of its own.
    Returns:
        The LATENT and its last clean estimate, both raw VAE latents on core's intermediate device.
    Raises:
        InputError: the stages or the schedule are not usable.
        comfy.model_management.InterruptProcessingException: the user cancelled; nothing is left running.
    """
    # Imported here: it reads ComfyUI's folders, which the rest of this module does not need.
    import latent_preview

    _check_run(stages, sigmas)
    sigmas = sigmas.to("cpu", torch.float32)
    if timesteps is not None:
        stages = [dataclasses.replace(s, model=with_timesteps(s.model, sigmas, timesteps)) for s in stages]
    ends = [*(stage.first_step for stage in stages[1:]), len(sigmas) - 1]
    stages = [
        dataclasses.replace(stage, model=_told_of(stage.model, sigmas, (stage.first_step, end)))
        for stage, end in zip(stages, ends, strict=True)
    ]
    first = stages[0].model
    samples = comfy.sample.fix_empty_latent_channels(first, latent["samples"])
    if not add_noise:
        noise = torch.zeros_like(samples, device="cpu")
    elif noise is None:
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    elif noise.shape != samples.shape:
        raise InputError(f"noise must have the shape of the latents, {list(samples.shape)}; got {list(noise.shape)}")
    last_clean: dict[str, Tensor] = {}
    bar = progress or Progress(0, len(sigmas) - 1)
    starts = [stage.first_step for stage in stages]
    status = RunStatus([stage.model for stage in stages], starts, bar.steps, bar.done)
    show = latent_preview.prepare_callback(first, bar.steps)

    def callback(step: int, clean: Tensor, x: Tensor, steps: int) -> None:
        del steps
        last_clean["x0"] = clean
        show(bar.done + step, clean[:, :, bar.hidden :] if bar.hidden else clean, x, bar.steps)
        status.step(step)
        if observe is not None:
            observe(step, clean)

    arguments: dict[str, Any] = {
        "denoise_mask": latent.get("noise_mask"),
        "callback": callback,
        "disable_pbar": not comfy.utils.PROGRESS_BAR_ENABLED,
        "seed": seed,
    }
    conditioning = (positive, negative)
    used = [stage for stage, end in zip(stages, ends, strict=True) if stage.first_step < min(end, len(sigmas) - 1)]
    if len(used) == 1:
        result = _guider(used[0], conditioning).sample(noise, samples, sampler, sigmas, **arguments)
    else:
        result = _run_relayed(used, conditioning, noise, samples, sampler, sigmas, arguments)
    output = {**latent, "samples": result.to(comfy.model_management.intermediate_device())}
    if "x0" not in last_clean:
        return output, output
    clean = first.model.process_latent_out(last_clean["x0"].cpu())
    return output, {**latent, "samples": clean.to(comfy.model_management.intermediate_device())}


def _check_run(stages: Sequence[Stage], sigmas: Tensor) -> None:
    if not stages or stages[0].first_step != 0:
        raise InputError("a run needs at least one model, and the first one starts at step 0")
    starts = [stage.first_step for stage in stages]
    if starts != sorted(starts):
        raise InputError(f"the models of a run take their steps in order; got the first steps {starts}")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise InputError(f"a run needs at least two sigmas, before and after one step; got {list(sigmas.shape)}")


def _told_of(model: Any, sigmas: Tensor, share: tuple[int, int]) -> Any:
    """A clone of MODEL that knows the schedule of the whole run, and which steps of it are its own; core tells it of
    its own steps only."""
    told = model.clone()
    told.model_options.setdefault("transformer_options", {}).update({SCHEDULE: tuple(sigmas.tolist()), SHARE: share})
    return told


def _guider(stage: Stage, conditioning: tuple[Any, Any]) -> Any:
    guider = comfy.samplers.CFGGuider(stage.model)
    guider.set_conds(*conditioning)
    guider.set_cfg(stage.cfg)
    return guider


def _run_relayed(
    stages: Sequence[Stage],
    conditioning: tuple[Any, Any],
    noise: Tensor,
    samples: Tensor,
    sampler: Any,
    sigmas: Tensor,
    arguments: dict[str, Any],
) -> Tensor:
    relay = _Relay(sampler, sigmas, [stage.first_step for stage in stages])
    result = samples
    try:
        while not relay.finished:
            index = relay.stage
            end = stages[index + 1].first_step if index + 1 < len(stages) else len(sigmas) - 1
            share = sigmas[stages[index].first_step : end + 1]
            result = _guider(stages[index], conditioning).sample(noise, samples, relay, share, **arguments)
    finally:
        relay.close()
    return result


class _Relay(comfy.samplers.Sampler):
    """The SAMPLER that each stage's guider is given: it drives the one real sampler as long as that asks for this
    stage's sigmas."""

    def __init__(self, sampler: Any, sigmas: Tensor, first_steps: Sequence[int]) -> None:
        self.stage = 0
        self.finished = False
        self.guider: Any = None
        self._sampler, self._sigmas = sampler, sigmas
        self._first_steps = list(first_steps[1:])
        self._limits = [float(sigmas[step]) for step in self._first_steps]
        self._coroutine: Coroutine | None = None
        self._pending: Call | None = None
        self._first_options: dict[str, Any] = {}

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
        **more: Any,
    ) -> Tensor:
        """Core's contract of a SAMPLER; what a later core adds to it (``more``) goes to the real one. Returns the
        finished latents, or those that the next stage goes on from."""
        self.guider = model_wrap
        if self._coroutine is None:
            self._first_options = extra_args["model_options"]
            stand_in, everything = _GuiderStandIn(self), self._sigmas.to(sigmas.device)

            def body() -> Tensor:
                positional = (extra_args, self._report, noise, latent_image, denoise_mask, disable_pbar)
                return self._sampler.sample(stand_in, everything, *positional, **more)

            self._coroutine = Coroutine(body, name="wan-fp8-sampler")
            message = self._coroutine.start()
        else:
            assert self._pending is not None
            message = self._answer(self._pending, extra_args["model_options"], callback)
        while isinstance(message, Call):
            if message.kind == "model" and (stage := self._stage_of(message)) != self.stage:
                self.stage, self._pending = stage, message
                return message.args[0]
            message = self._answer(message, extra_args["model_options"], callback)
        self.finished = True
        return message.value

    def close(self) -> None:
        """End the sampler if it still runs (an interrupt, an error in another place), and let go of its tensors."""
        if self._coroutine is not None:
            self._coroutine.close()
        self._coroutine = self._pending = self.guider = None
        self._first_options = {}

    def ask_model(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any], seed: int | None) -> Tensor:
        """Called inside the coroutine, in place of the guider."""
        assert self._coroutine is not None
        return self._coroutine.ask("model", x, sigma, model_options, seed)

    def _report(self, *args: Any) -> None:
        assert self._coroutine is not None
        self._coroutine.ask("callback", *args)

    def _answer(self, call: Call, model_options: dict[str, Any], callback: Any) -> Call | Finished:
        assert self._coroutine is not None
        try:
            if call.kind == "callback":
                answer = None if callback is None else callback(*call.args)
            else:
                x, sigma, asked_with, seed = call.args
                options = _rebased_options(self._first_options, asked_with, model_options)
                answer = self.guider(x, sigma, model_options=options, seed=seed)
        except BaseException as error:
            return self._coroutine.throw(error)
        return self._coroutine.resume(answer)

    def _stage_of(self, call: Call) -> int:
        """By the step, where the sampler says it; else by the sigma, for which the host waits."""
        _, sigma, options, _ = call.args
        step = options.get("transformer_options", {}).get(STEP)
        if step is not None:
            return sum(step.index >= first for first in self._first_steps)
        value = float(sigma.flatten()[0])
        return sum(value <= limit for limit in self._limits)


class _GuiderStandIn:
    """What the sampler function takes for its guider; attributes are those of the guider in charge."""

    def __init__(self, relay: _Relay) -> None:
        self._relay = relay

    def __call__(
        self, x: Tensor, sigma: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        return self._relay.ask_model(x, sigma, model_options or {}, seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._relay.guider, name)


def _rebased_options(first: dict[str, Any], asked_with: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """What the sampler changed in the options that it was started with, applied to those of the stage in charge.

    Samplers append functions (``sampler_post_cfg_function``) or set keys; they do so on a copy of the first stage's
    options.
    """
    if asked_with is first or current is first:
        return asked_with if current is first else current
    rebased = dict(current)
    for key, value in asked_with.items():
        before = first.get(key)
        if value is before or key == "transformer_options":
            continue
        if isinstance(value, list):
            added = value[len(before) :] if isinstance(before, list) else value
            rebased[key] = [*current.get(key, []), *added]
        else:
            rebased[key] = value
    step = asked_with.get("transformer_options", {}).get(STEP)
    if step is not None:
        rebased["transformer_options"] = {**current.get("transformer_options", {}), STEP: step}
    return rebased
