"""What each setting does to a video, against a reference run of the same checkpoint, seed, prompt and steps.

    python benchmarks/quality.py --checkpoint models/wan/Wan2.2-T2V-A14B --size 832x480 --frames 81 --seeds 16 \\
        --prompt "a cat jumps over a fence" --json out.json \\
        --settings none,DelayedScaling,rowwise:torch,fa3-fp8,fa3-fp8/0-0,fa3-fp8~means,E012K2R20,rowwise+E012K2R20

A setting is parts joined by ``+``:

    none                         the checkpoint in bf16, exact attention, every pass computed
    RECIPE[:BACKEND]             an FP8 recipe
    ATTENTION[/A-B[-C-D]][~means][!]   an attention backend; a low-precision one without the first A and last B steps
                                 and the first C and last D blocks (default 2-2-1-1); ~means leaves the means of K and
                                 V in; ! turns the guard off
    PRESET[:own]                 a MagCache preset with the published curve, or one measured on the first prompt; or
                                 easycache, taylor

Rows carry mean, worst and spread over the videos, and every video's own scores. On random weights only times mean
something. ``--against TABLE`` fails when a setting is worse than in a committed results file by more than the seeds
differ there; ``--break`` makes a mistake on purpose, which must then be found.
"""

from __future__ import annotations

import dataclasses
import gc
import json as jsonlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from breakages import BREAKAGES, ENDLESS, broken
from dit import console
from experts import AnyVAE, condition_of, load_experts, load_its_vae
from quality_table import HIGHER_IS_BETTER, aggregated, worse
from rich.table import Table
from torch import Tensor

from wan_fp8 import Attention, Recipe, apply_recipe, load_text_encoder, set_attention
from wan_fp8.attention import ATTENTION, Step
from wan_fp8.attention.core import register_backends
from wan_fp8.caching import (
    POLICIES,
    PRESETS,
    Conditioning,
    Curve,
    MagCache,
    Policy,
    Recording,
    RunPosition,
    apply_cache,
    cache_of,
    published_for,
)
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.specs import Task
from wan_fp8.models.vae import denormalize_latents
from wan_fp8.models.wan import WanModel
from wan_fp8.quality import Trajectory, finite, kernels_used, latent_scores, video_scores
from wan_fp8.quant import RECIPES
from wan_fp8.sampling import (
    DEFAULTS,
    NEGATIVE_PROMPT,
    latent_shape,
    make_solver,
    plan_steps,
    sigmas,
    timesteps,
)

COND, UNCOND = Conditioning("cond", 0), Conditioning("uncond", 1)
OWN = "own"


# ---- settings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One row, from its name."""

    name: str
    recipe: Recipe = dataclasses.field(default_factory=lambda: Recipe("none"))
    attention: Attention | None = None
    means: bool = False
    """FP8 attention leaves the means of K and V in."""
    cache: str | None = None
    own_curve: bool = False


def parse_setting(name: str) -> Setting:
    """See the top of this file.

    Raises:
        typer.BadParameter: a part that is none of these.
    """
    register_backends()
    given: dict[str, Any] = {"name": name}
    for part in name.split("+"):
        head, _, tail = part.partition(":")
        if part == "none":
            continue
        if head in RECIPES:
            given["recipe"] = Recipe(head, backend=tail or "auto")
        elif head in PRESETS or head in POLICIES:
            given |= {"cache": head, "own_curve": tail == OWN}
        else:
            given |= _parse_attention(part)
    return Setting(**given)


def _parse_attention(part: str) -> dict[str, Any]:
    bare = part.removesuffix("!")
    means = bare.endswith("~means")
    backend, _, window = bare.removesuffix("~means").partition("/")
    if backend not in ATTENTION.names:
        known = [*RECIPES, *ATTENTION.names, *PRESETS, *POLICIES]
        raise typer.BadParameter(f"{part!r} is no setting: none, {', '.join(known)}")
    names = ("skip_first_steps", "skip_last_steps", "skip_first_blocks", "skip_last_blocks")
    numbers = dict(zip(names, (int(n) for n in window.split("-")), strict=False)) if window else {}
    bound = {"bound": None} if part.endswith("!") else {}
    return {"attention": Attention(backend, **numbers, **bound), "means": means}


def policy_of(setting: Setting, models: Sequence[WanModel], own: Curve | None, mistake: str) -> Policy | None:
    """The cache of a setting, for these models."""
    if setting.cache is None:
        return None
    if setting.cache in PRESETS:
        threshold, max_skips, retention = PRESETS[setting.cache]
        curve = own if setting.own_curve else published_for(models[0].spec)
        policy: Policy = MagCache(threshold, max_skips, retention, curve=curve)
    else:
        policy = POLICIES[setting.cache]()
    endless = {"threshold": float(ENDLESS), "max_skips": ENDLESS, "retention": 0.0}
    return dataclasses.replace(policy, **endless) if mistake == "cache" else policy


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One video to sample."""

    prompt: int
    seed: int
    text: Tensor
    """[1, 512, width] on the CPU, as the negative prompt."""
    negative: Tensor
    noise: Tensor
    """[1, C, F, H, W] float32 on the CPU."""


@dataclass(kw_only=True, slots=True)
class Sampler:
    """The published run of one or two experts."""

    models: list[WanModel]
    steps: int
    device: str
    dtype: torch.dtype
    given: Tensor | None = None
    """I2V's 20 channels [1, 20, F, H, W]."""

    def shares(self) -> list[tuple[int, int]]:
        """Steps of each model."""
        switch = sum(step.expert == "high_noise" for step in self._plan())
        return [(0, self.steps)] if len(self.models) == 1 else [(0, switch), (switch, self.steps)]

    @property
    def schedule(self) -> tuple[float, ...]:
        """[steps + 1]"""
        return tuple(sigmas(self.steps, DEFAULTS[self.models[0].spec.task].shift, "unipc").tolist())

    def _plan(self) -> Any:
        defaults = DEFAULTS[self.models[0].spec.task]
        told = timesteps(self.steps, defaults.shift, "unipc")
        boundary = defaults.boundary if len(self.models) == 2 else None
        return plan_steps(told, boundary=boundary, guidance=defaults.guidance)

    def video(self, job: Job, observe: Any = None) -> Tensor:
        """Normalised latents; ``observe(step, clean)`` sees each step's clean estimate."""
        schedule, shares = self.schedule, self.shares()
        solver, x = make_solver("unipc", schedule), job.noise.to(self.device)
        texts = [text.to(self.device, self.dtype) for text in (job.text, job.negative)]
        for model in self.models:
            model.begin_run()
        for step in self._plan():
            index = int(step.expert == "low_noise")
            model, share = self.models[index], shares[index]
            cond, uncond = (
                self._forward(model, x, step, share, kind, text)
                for kind, text in zip((COND, UNCOND), texts, strict=True)
            )
            velocity = uncond + step.guidance * (cond - uncond)
            if observe is not None:
                observe(step.index, x - schedule[step.index] * velocity)
            x = solver.step(velocity, step.index, x)
        return x

    def _forward(
        self, model: WanModel, x: Tensor, step: Any, share: tuple[int, int], kind: Conditioning, text: Tensor
    ) -> Tensor:
        position = RunPosition(
            sigma=self.schedule[step.index],
            schedule=self.schedule,
            conditionings=(kind,),
            share=share,
            expert=step.expert,
        )
        latents = x.to(self.dtype) if self.given is None else torch.cat([x.to(self.dtype), self.given], dim=1)
        options = ForwardOptions(position=position, step=Step(step.index, self.steps))
        now = torch.full((1,), float(step.timestep), device=self.device)
        return model(latents, now, text, options=options).float()


def own_curve(sampler: Sampler, job: Job) -> Curve:
    """Measured in one run with every pass computed."""
    recording = Recording()
    experts = ("only",) if len(sampler.models) == 1 else ("high_noise", "low_noise")
    for model, (first, end) in zip(sampler.models, sampler.shares(), strict=True):
        set_attention(apply_cache(model, None), None)
        model.stack_wrappers["recording"] = recording
        recording.begin(id(model), None, sampler.schedule[first : end + 1])
    sampler.video(job)
    for model in sampler.models:
        del model.stack_wrappers["recording"]
    recording.end()
    return recording.curve("own", sampler.models[0].spec, [(expert, OWN) for expert in experts])


@dataclass(slots=True)
class Reference:
    """What one video is held against."""

    latents: Tensor
    frames: Tensor | None
    trajectory: Trajectory


def frames_of(vae: AnyVAE, latents: Tensor) -> Tensor:
    """[T, 3, H, W] in 0..1 on the CPU."""
    weight = next(vae.parameters())
    video = vae.decode(denormalize_latents(latents.float()).to(weight)).float()
    return ((video[0] + 1) / 2).clamp(0, 1).transpose(0, 1).cpu()


def references(sampler: Sampler, jobs: Sequence[Job], vae: AnyVAE) -> list[Reference]:
    """One run for each video."""
    found = []
    for job in jobs:
        trajectory = Trajectory()
        latents = sampler.video(job, trajectory.record).cpu()
        found.append(Reference(latents, frames_of(vae, latents), trajectory))
    return found


def scored(reference: Reference, latents: Tensor, frames: Tensor | None, steps: list[dict]) -> dict[str, Any]:
    """Scores of one video, by the names of the table."""
    found = latent_scores(latents, reference.latents)
    scores = {
        "latent_psnr_db": found["psnr_db"],
        "latent_cosine": found["cosine"],
        "latent_error": found["relative_error"],
        "worst_step_error": finite(max(entry["relative_error"] for entry in steps)),
        "step_errors": [float(f"{entry['relative_error']:.4g}") for entry in steps],
    }
    if frames is not None and reference.frames is not None:
        video = video_scores(frames, reference.frames)
        scores |= {name: video[name] for name in ("psnr_db", "ssim", "lpips")}
    return scores


def measure(
    setting: Setting,
    sampler: Sampler,
    jobs: Sequence[Job],
    exact: Sequence[Reference],
    vae: AnyVAE,
    curve: Curve | None,
    mistake: str,
) -> dict[str, Any]:
    """One row. The models carry the setting's recipe already."""
    policy = policy_of(setting, sampler.models, curve, mistake)
    for model in sampler.models:
        set_attention(model, setting.attention)
        apply_cache(model, policy)
    cuda = sampler.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    videos, seconds, results, passes = [], [], [], [0, 0]
    for job, reference in zip(jobs, exact, strict=True):
        steps: list[dict[str, float]] = []
        began = time.perf_counter()
        latents = sampler.video(
            job, lambda step, clean, r=reference, s=steps: s.append(r.trajectory.compare(step, clean))
        ).cpu()
        seconds.append(time.perf_counter() - began)
        results.append((job, reference, latents, steps))
        for cache in filter(None, map(cache_of, sampler.models)):
            report = cache.finish()
            passes = [passes[0] + report.computed, passes[1] + report.computed + report.skipped]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    kernels = [kernels_used(model, setting.attention) for model in sampler.models]
    for job, reference, latents, steps in results:
        scores = scored(reference, latents, frames_of(vae, latents), steps)
        videos.append({"prompt": job.prompt, "seed": job.seed, **scores})
    whole = 2 * sampler.steps
    return {
        "setting": setting.name,
        "recipe": setting.recipe.name,
        "backend": ",".join(kernels[0]["gemm"]) or None,
        "attention": "auto" if setting.attention is None else setting.attention.backend,
        "cache": setting.cache or "none",
        "passes_computed": whole if policy is None else round(passes[0] / len(jobs), 2),
        "passes": whole,
        "seconds": round(statistics.median(seconds), 4),
        "peak_gib": peak and round(peak, 3),
        "kernels": kernels,
        **aggregated(videos),
        "videos": videos,
    }


# ---- command line --------------------------------------------------------------------------------------------------


def make_jobs(checkpoint: str, prompts: Sequence[str], seeds: Sequence[int], shape: tuple[int, ...]) -> list[Job]:
    """Every prompt with every seed."""
    texts = load_text_encoder(checkpoint).encode([*prompts, NEGATIVE_PROMPT]).cpu()
    return [
        Job(
            prompt=index,
            seed=seed,
            text=texts[index : index + 1],
            negative=texts[-1:],
            noise=torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)),
        )
        for index in range(len(prompts))
        for seed in seeds
    ]


def grouped(settings: Sequence[Setting]) -> Iterator[list[Setting]]:
    """Settings of one recipe after the other: each is loaded once, and is alone on the GPU."""
    recipes = list(dict.fromkeys(setting.recipe for setting in settings))
    for recipe in recipes:
        yield [setting for setting in settings if setting.recipe == recipe]


def main(
    checkpoint: Annotated[str, typer.Option(help="An official or Diffusers folder.")],
    prompt: Annotated[str, typer.Option(help="One prompt.")] = "",
    prompts: Annotated[str, typer.Option(help="A file with a prompt in each line.")] = "",
    seeds: Annotated[int, typer.Option(help="Seeds 0 to N-1, each with every prompt.")] = 16,
    settings: Annotated[str, typer.Option(help="With commas; see the top of this script.")] = "none",
    size: Annotated[str, typer.Option(help="Pixels, width x height.")] = "832x480",
    frames: Annotated[int, typer.Option(help="Pixel frames, 4n+1.")] = 81,
    steps: Annotated[int, typer.Option(help="Sampling steps; 0 for the published number.")] = 0,
    image: Annotated[str, typer.Option(help="Image-to-video: the first frame.")] = "",
    reference: Annotated[str, typer.Option(help="float32 (without TF32) or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cuda or cpu; empty picks.")] = "",
    against: Annotated[str, typer.Option(help="A results file of this script; fail where a setting is worse.")] = "",
    mistake: Annotated[str, typer.Option("--break", help=f"On purpose: {', '.join(BREAKAGES)}.")] = "",
    json: Annotated[str, typer.Option(help="Where to write the results file.")] = "",
) -> None:
    """Quality of every setting against the reference."""
    chosen = [parse_setting(name) for name in settings.split(",")]
    lines = [prompt] if prompt else []
    if prompts:
        lines += [line for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or seeds < 1 or mistake not in ("", *BREAKAGES) or reference not in ("float32", "bfloat16"):
        raise typer.BadParameter(
            "at least one --prompt or --prompts and one seed; --break and --reference as --help lists them"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        rows = measured_rows(
            checkpoint, lines, range(seeds), chosen, size, frames, steps, image, reference, device, mistake
        )
    show(rows)
    if json:
        common.write_results(json, rows, device)
    if against:
        table = jsonlib.loads(Path(against).read_text(encoding="utf-8"))["rows"]
        sentences = worse(rows, table)
        for sentence in sentences:
            console.print(f"worse: {sentence}")
        if sentences:
            raise typer.Exit(1)
        console.print(f"{len(rows)} settings are no worse than in {Path(against).name}")


def measured_rows(
    checkpoint: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Sequence[Setting],
    size: str,
    frames: int,
    steps: int,
    image: str,
    reference: str,
    device: str,
    mistake: str = "",
) -> list[dict[str, Any]]:
    """A row for each setting, in the order asked."""
    width, height = (int(n) for n in size.split("x"))
    precision = getattr(torch, reference)
    sampler = Sampler(models=load_experts(checkpoint, device, precision), steps=0, device=device, dtype=precision)
    spec = sampler.models[0].spec
    sampler.steps = steps or DEFAULTS[spec.task].steps
    vae = load_its_vae(checkpoint, spec, device)
    if (spec.task is Task.I2V) != bool(image):
        raise typer.BadParameter(f"a {spec.task} model takes {'an --image' if spec.task is Task.I2V else 'no --image'}")
    condition = condition_of(vae, image, width, height, frames) if image else None
    jobs = make_jobs(checkpoint, prompts, seeds, latent_shape(spec.task, width, height, frames))
    sampler.given = None if condition is None else condition.to(device, precision)
    exact = references(sampler, jobs, vae)
    rows: dict[str, dict[str, Any]] = {}
    curve: Curve | None = None
    for group in grouped(settings):
        sampler.models = []
        gc.collect()
        with broken(mistake):
            models = load_experts(checkpoint, device, torch.bfloat16)
            sampler.models = [apply_recipe(model, group[0].recipe, keep_sources=False) for model in models]
            del models
            sampler.dtype = torch.bfloat16
            sampler.given = None if condition is None else condition.to(device, torch.bfloat16)
            for setting in group:
                if setting.own_curve and curve is None:
                    curve = own_curve(sampler, jobs[0])
                with broken("means" if setting.means else ""):
                    row = measure(setting, sampler, jobs, exact, vae, curve, mistake)
                shared = {"model": Path(checkpoint).name, "size": size, "frames": frames, "steps": sampler.steps}
                rows[setting.name] = {**shared, "reference": reference, **row}
    return [rows[setting.name] for setting in settings]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Mean (worst) of every score."""
    first = rows[0]
    title = f"{first['model']}, {first['size']} x {first['frames']}, {first['steps']} steps"
    table = Table(title=f"{title}, {len(first['videos'])} videos, against {first['reference']}")
    names = [name for name in HIGHER_IS_BETTER if name not in ("latent_cosine", "lpips")]
    for column in ("setting", *names, "passes_computed", "seconds", "peak_gib"):
        table.add_column(column.replace("_", " "))
    for row in rows:
        scores = [_mean_and_worst(row[name]) for name in names]
        table.add_row(row["setting"], *scores, *(str(row[n]) for n in ("passes_computed", "seconds", "peak_gib")))
    console.print(table)


def _mean_and_worst(score: dict[str, float | None]) -> str:
    return "-" if score["mean"] is None else f"{score['mean']:.4g} ({score['worst']:.4g})"


if __name__ == "__main__":
    typer.run(main)
