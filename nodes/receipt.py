"""The quality receipt: one seed and prompt in a reference and in the settings under test, and what came of it."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..wan_fp8 import quality, sampling
from ..wan_fp8.errors import InputError
from ..wan_fp8.models.specs import Task
from . import bridge, conditions
from .choices import check_choice
from .missing import Missing, require
from .notices import extended, node_id, notice
from .receipt_image import receipt_plot, receipt_strip
from .receipt_inputs import AS_LOADED, REFERENCES, receipt_inputs
from .samplers import Settings, prepare_models, run
from .schema import SAMPLING, node_schema

METADATA = "wan_fp8_receipt"
"""Key of the receipt in the metadata of files that core saves after this node."""
FORMAT, VERSION = "wan_fp8.receipt", 1


class WanFP8QualityReceipt(io.ComfyNode):
    """Sample twice, once without the settings, and say what they cost and saved."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8QualityReceipt",
            display_name="Wan2.2 Quality Receipt",
            category=SAMPLING,
            is_experimental=True,
            description="Samples one video twice with the same seed, prompt and steps: in a reference (no FP8 recipe, "
            "exact attention, no cache) and in the MODEL as it comes, with all its settings. Reports PSNR, SSIM, error "
            "by step, seconds, memory and the kernels used, as pictures, as JSON and in the metadata of what is saved "
            "after it.",
            search_aliases=["wan quality", "psnr", "ssim", "benchmark", "compare fp8"],
            inputs=receipt_inputs(),
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="Latents of the settings under test."),
                io.Latent.Output(display_name="latent_reference", tooltip="Latents of the reference."),
                io.Image.Output(
                    display_name="plot",
                    tooltip="Error of every step against the reference, and the steps that a cache skipped.",
                ),
                io.Image.Output(
                    display_name="strip",
                    tooltip="Frames of the reference, of the settings, and their difference; needs 'vae'.",
                ),
                io.String.Output(display_name="receipt", tooltip="All numbers, as JSON."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Tensor],
        reference_precision: str,
        vae: Any = None,
        model_low: Any = None,
        reference: Any = None,
        reference_low: Any = None,
        **boxes: Any,
    ) -> io.NodeOutput:
        check_choice("reference_precision", reference_precision, REFERENCES)
        task = bridge.spec_of(require(model)).task
        settings = with_defaults(task, boxes)
        check_latent(task, latent)
        if task is Task.TI2V and (model_low is not None or reference_low is not None):
            raise InputError("TI2V-5B has one transformer: disconnect 'model_low' and 'reference_low'")
        if vae is not None:
            conditions.check_vae(vae, task)
        low = model_low if settings.boundary else None
        tested = prepare_models(task, model, low)
        exact = reference_models(task, tested, reference, reference_low if settings.boundary else None)
        if reference_precision != AS_LOADED:
            exact = [bridge.in_float32(given) for given in exact]
        given = (positive, negative, latent, settings)
        trajectory = quality.Trajectory()
        before = Side("reference", exact, trajectory=trajectory)
        latent_reference = before.sample(*given)
        after = Side("setting", tested, trajectory=trajectory)
        result = after.sample(*given)
        facts: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            **described_run(tested[0], latent, settings),
            "reference": {
                **before.facts(),
                "made_of": "model" if reference is None else "reference",
                "precision": reference_precision,
            },
            "setting": after.facts(),
            "latent": quality.latent_scores(result["samples"], latent_reference["samples"]),
            "video": None,
            "steps": after.steps,
        }
        strip: Any = Missing(
            "the strip of Wan2.2 Quality Receipt shows frames, and no VAE is connected to decode them: connect 'vae'"
        )
        if vae is not None:
            frames, wanted = decoded(vae, result), decoded(vae, latent_reference)
            facts["video"] = quality.video_scores(frames.movedim(-1, 1), wanted.movedim(-1, 1))
            strip = receipt_strip(facts, frames, wanted)
        lines = summary(facts)
        extra = getattr(cls.hidden, "extra_pnginfo", None)
        if isinstance(extra, dict):
            extra[METADATA] = facts
        else:
            lines.append("the receipt is in no file's metadata: whoever queued this prompt sent no extra_pnginfo")
        shown = extended(notice(node_id(cls), lines), bridge.kept_words())
        text = json.dumps(facts, indent=1)
        return io.NodeOutput(result, latent_reference, receipt_plot(facts), strip, text, ui=shown)


# ---- inputs --------------------------------------------------------------------------------------------------------


def with_defaults(task: Task, boxes: dict[str, Any]) -> Settings:
    """The boxes as a sampler has them: 0 (boundary: -1) becomes the published value of the task."""
    defaults = sampling.DEFAULTS[task]
    low, high = defaults.guidance
    boundary: float | None = None
    if defaults.boundary is not None:
        boundary = boxes["boundary"] if boxes["boundary"] >= 0 else defaults.boundary
    return Settings(
        **{
            **boxes,
            "steps": boxes["steps"] or defaults.steps,
            "shift": boxes["shift"] or defaults.shift,
            "guidance": boxes["guidance"] or high,
            "guidance_low": boxes["guidance_low"] or low,
            "boundary": boundary,
        }
    )


def check_latent(task: Task, latent: dict[str, Tensor]) -> None:
    """Raise InputError unless ``latent`` holds one video of the task's kind."""
    shape, channels = list(latent["samples"].shape), sampling.LAYOUTS[task].channels
    if len(shape) != 5 or shape[0] != 1 or shape[1] != channels:
        raise InputError(
            f"'latent' takes the latents of one {task.upper()} video, [1, {channels}, frames, rows, columns]; got "
            f"{shape}: use core's "
            + ("Wan22ImageToVideoLatent" if task is Task.TI2V else "EmptyHunyuanLatentVideo or WanImageToVideo")
            + " with batch size 1"
        )


def reference_models(task: Task, tested: list[Any], reference: Any, reference_low: Any) -> list[Any]:
    """The MODELs that were connected as reference, as they come; else those under test without our settings.

    Raises:
        InputError: one of the two experts of a reference is missing.
    """
    if reference is None and reference_low is None:
        return [bridge.plain(given) for given in tested]
    if reference is None or (reference_low is None and len(tested) == 2):
        raise InputError(
            "a reference replaces every MODEL under test, and one of its two experts is missing: connect 'reference' "
            "and 'reference_low', or neither, and the reference is made of the MODELs under test"
        )
    return prepare_models(task, reference, reference_low)


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Side:
    """One of the two runs."""

    name: str
    experts: list[Any]
    trajectory: quality.Trajectory
    steps: list[dict[str, float]] = field(default_factory=list)
    """Each step against the reference; empty for the reference itself."""
    cost: bridge.Measured = field(default_factory=bridge.Measured)
    kernels: dict[int, dict[str, Any]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    sparsity: list[dict[str, Any]] = field(default_factory=list)
    """What sparse attention did, an entry for each expert."""
    caches: list[dict[str, Any]] = field(default_factory=list)
    """Which steps a cache skipped, an entry for each expert."""
    marks: list[float] = field(default_factory=list)

    def sample(self, positive: Any, negative: Any, latent: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
        """The run; it loads its models first."""
        heard = len(bridge.kept_words())
        pooled = any(bridge.is_remote(expert) for expert in self.experts)  # its memory is not this process's to measure
        nets = [expert.model.diffusion_model for expert in self.experts]
        for net in nets:  # an expert that no step belongs to would tell of an earlier run
            net.cache_facts = net.sparse_facts = ()
        with bridge.measured(torch.device("cpu" if pooled else self.experts[0].load_device)) as self.cost:
            result = run(self.experts, positive, negative, latent, settings, self._observe)
        self.said = bridge.kept_words()[heard:]
        self.sparsity = [facts for net in nets for facts in getattr(net, "sparse_facts", ())]
        self.caches = [facts for net in nets for facts in getattr(net, "cache_facts", ())]
        return result

    def _observe(self, step: int, clean: Tensor) -> None:
        if self.name == "reference":
            self.trajectory.record(step, clean)
        else:
            self.steps.append(self.trajectory.compare(step, clean))
        self.marks.append(time.perf_counter())  # after the copy, for which the host waited
        for index, expert in enumerate(self.experts):
            used = quality.kernels_used(expert.model.diffusion_model, bridge.settings_of(expert).attention)
            if used["attention"] or index not in self.kernels:  # the end of an expert's run forgets what it used
                self.kernels[index] = used

    def facts(self) -> dict[str, Any]:
        """What was chosen, what it cost and who computed."""
        chosen = [described_model(expert) for expert in self.experts]
        later = len(self.marks) - 1
        return {
            "models": chosen,
            "seconds": round(self.cost.seconds, 4),
            "seconds_of_a_step": round((self.marks[-1] - self.marks[0]) / later, 4) if later > 0 else None,
            "peak_gib": None if self.cost.peak_gib is None else round(self.cost.peak_gib, 3),
            "kernels": [used for _, used in sorted(self.kernels.items())],
            "sparsity": self.sparsity,
            "caches": self.caches,
            "said": [line for text in self.said for line in text.splitlines()],
        }


def described_run(model: Any, latent: dict[str, Tensor], settings: Settings) -> dict[str, Any]:
    """What both runs share."""
    return {
        "task": str(bridge.spec_of(model).task),
        "latent_shape": list(latent["samples"].shape),
        "settings": dataclasses.asdict(settings),
        "device": bridge.device_of(model).name,
        "torch": torch.__version__,
    }


def described_model(model: Any) -> dict[str, Any]:
    """The settings that a MODEL carries, in words."""
    settings, recipe = bridge.settings_of(model), bridge.recipe_of(model)
    lora = settings.lora
    return {
        "expert": bridge.expert_of(model),
        "recipe": "none" if recipe is None else recipe.name,
        "backend": None if recipe is None else recipe.backend,
        "attention": "auto" if settings.attention is None else dataclasses.asdict(settings.attention),
        "cache": "none" if settings.cache is None else settings.cache.describe(),
        "compile": None if settings.compile is None else dataclasses.asdict(settings.compile),
        "residual_stream": str(settings.stream_dtype or torch.float32).removeprefix("torch."),
        "loras": 0 if lora is None else len(lora.terms),
        "patches": len(model.patches),
    }


def decoded(vae: Any, latent: dict[str, Tensor]) -> Tensor:
    """Frames [N, H, W, 3] in 0..1."""
    frames = vae.decode(latent["samples"])
    return frames.reshape(-1, *frames.shape[-3:])[..., :3].float().clamp(0, 1).cpu()


def summary(facts: dict[str, Any]) -> list[str]:
    """The receipt in two or three lines."""
    latent, video = facts["latent"], facts["video"]
    lines = []
    if latent["identical"]:
        lines.append("latents equal to the reference, to the bit")
    else:
        lines.append(
            f"latents: PSNR {latent['psnr_db']:.2f} dB, cosine {latent['cosine']:.5f}, relative error "
            f"{latent['relative_error']:.4f}"
        )
    if video is not None:
        decibels = "infinite" if video["psnr_db"] is None else f"{video['psnr_db']:.2f} dB"
        lpips = f"{video['lpips']:.4f}" if isinstance(video["lpips"], float) else video["lpips"]
        lines.append(f"frames: PSNR {decibels}, SSIM {video['ssim']:.4f}, LPIPS {lpips}")
    before, after = facts["reference"], facts["setting"]
    cost = f"{before['seconds']:.3g} s in the reference, {after['seconds']:.3g} s in the settings, loading included"
    if after["peak_gib"] is not None and before["peak_gib"] is not None:
        cost += f"; at most {before['peak_gib']:.2f} and {after['peak_gib']:.2f} GiB of GPU memory"
    return [*lines, cost]
