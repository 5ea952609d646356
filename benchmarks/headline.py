"""A whole video on one or many GPUs, prompt to pixels: text encoder, VAE encode, sampling loop, VAE decode.

    torchrun --nproc-per-node 8 benchmarks/headline.py --json out.json
    torchrun --nproc-per-node 2 benchmarks/headline.py --rows fp8,E012K2R20 --steps 8 --json out.json

I2V-A14B with both experts, UMT5-XXL and the Wan2.1 VAE in their published sizes, random weights made on the machine
(they say nothing of quality), 1280x720, 81 frames, 40 steps of UniPC with guidance 3.5. Everything is warm; the clock
starts when prompts are token ids and the image is a tensor on the GPU, and stops when pixels are on every GPU. The text
encoder runs on every rank alike, the VAE over the ranks' rows (``wan_fp8/parallel/vae.py``) in bf16. A row is the
median of ``--repeats`` runs.

``--pool N``, started by ``python``, runs the transformers in a pool of N worker processes, as the node Wan2.2 Multi-GPU
does, and the text encoder and the VAE in this process on the first GPU. ``first_passes_s`` is then from nothing to the
first pass of both experts: processes, reading the files (just written: they are in memory), kernels.

``--steps N`` runs N of the 40 steps only, half of them with each expert, a skipped one among them where there is any.
``dit_s`` is then not measured but the sum of all passes of the 40 steps, each as long as the median of
its kind (computed with exact or FP8 attention, or skipped), and the solver's; ``dit_predicted`` says so.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import common
import ranks
import torch
import typer
from cache import COND, UNCOND, policy_of
from dit import MODELS, STEPS, console, kernels_used, latent_grid, random_model
from pooled import pooled_experts
from rich.table import Table
from torch import Tensor

from wan_fp8 import Attention, Recipe, apply_recipe, set_attention
from wan_fp8.attention import Step, attention_cores
from wan_fp8.caching import MagCache, Policy, RunPlan, RunPosition, apply_cache, cache_of
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.specs import ModelSpec
from wan_fp8.models.text_encoder import TextEncoder
from wan_fp8.models.umt5 import UMT5Spec, build_umt5
from wan_fp8.models.vae import AutoEncoder, VAESpec, WanVAE, denormalize_latents, normalize_latents
from wan_fp8.models.wan import WanModel
from wan_fp8.parallel import ParallelDims, parallelize
from wan_fp8.parallel.dims import build_groups
from wan_fp8.parallel.vae import SplitVAE
from wan_fp8.quant.linear import FP8Linear
from wan_fp8.sampling import DEFAULTS, UniPC, high_noise_steps, i2v_condition, i2v_mask, sigmas, timesteps


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a row turns on."""

    recipe: str = "DelayedScaling"
    fp8_attention: bool = False
    """In all steps but the first two and the last two, and all blocks but the first and the last."""
    cache: str = "none"


ROWS = {
    "bf16": Setting(recipe="none"),
    "fp8": Setting(),
    "fp8-attention": Setting(fp8_attention=True),
    "E012K2R20": Setting(cache="E012K2R20"),
    "E024K2R10": Setting(cache="E024K2R10"),
    "everything": Setting(fp8_attention=True, cache="E024K2R10"),
}
PUBLISHED = {"bf16": 195.13, "fp8": 146.55, "E012K2R20": 114.12, "E024K2R10": 89.36}
"""Seconds end to end on 8 H100 that the FP8 fork of the official code publishes; its last one with torch.compile."""

VAE = TypeVar("VAE", bound=AutoEncoder)
XXL = UMT5Spec(vocab_size=256_384, width=4096, num_heads=64, head_dim=64, ffn_dim=10_240, num_layers=24, num_buckets=32)
TEXT_TOKENS = 512
PROMPT_TOKENS = (120, 126)
"""Of the prompt and of the published negative one: the rest of the 512 are padding."""


def random_encoder(width: int, device: str) -> TextEncoder:
    """UMT5-XXL, or a small one of another width."""
    spec = XXL if width == XXL.width else UMT5Spec(
        vocab_size=1000, width=width, num_heads=4, head_dim=16, ffn_dim=64, num_layers=2, num_buckets=32
    )  # fmt: skip
    inner = spec.num_heads * spec.head_dim
    shapes = {"encoder.embed_tokens.weight": (spec.vocab_size, width), "encoder.final_layer_norm.weight": (width,)}
    for index in range(spec.num_layers):
        layer = f"encoder.block.{index}.layer"
        shapes |= {f"{layer}.0.SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
        shapes |= {
            f"{layer}.0.SelfAttention.o.weight": (width, inner),
            f"{layer}.0.SelfAttention.relative_attention_bias.weight": (spec.num_buckets, spec.num_heads),
            f"{layer}.0.layer_norm.weight": (width,),
            f"{layer}.1.layer_norm.weight": (width,),
            f"{layer}.1.DenseReluDense.wi_0.weight": (spec.ffn_dim, width),
            f"{layer}.1.DenseReluDense.wi_1.weight": (spec.ffn_dim, width),
            f"{layer}.1.DenseReluDense.wo.weight": (width, spec.ffn_dim),
        }
    generator = torch.Generator(device).manual_seed(3)
    tensors = {
        name: torch.ones(shape, device=device, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) * shape[1] ** -0.5
        for name, shape in shapes.items()
    }
    model = build_umt5(
        tensors, spec, storage_dtype=torch.bfloat16, compute_dtype=torch.bfloat16, device=torch.device(device)
    )
    return TextEncoder(model, storage_dtype=torch.bfloat16)


def random_vae(dim: int, device: str, dtype: torch.dtype) -> WanVAE:
    """The Wan2.1 VAE (``dim`` 96), weights of unit gain."""
    with torch.device("meta"):
        vae = WanVAE(VAESpec(dim=dim))
    return fill_randomly(vae, device, dtype)


def fill_randomly(vae: VAE, device: str, dtype: torch.dtype) -> VAE:
    """Weights of unit gain for a VAE of either design, made without a device."""
    generator = torch.Generator(device).manual_seed(4)
    state = {}
    for name, meta in vae.state_dict().items():
        value = torch.randn(meta.shape, device=device, generator=generator)
        if name.endswith("gamma"):
            value = 1 + 0.1 * value
        state[name] = (value / meta[0].numel() ** 0.5 if meta.ndim > 1 and "gamma" not in name else value).to(dtype)
    vae.load_state_dict(state, assign=True)
    vae.requires_grad_(False).eval()
    return vae


def random_experts(spec: ModelSpec, layers: int, recipe: Recipe, dims: ParallelDims, device: str) -> list[WanModel]:
    """High and low noise, in bf16 or converted; the weights that a recipe is made of are let go."""
    models = []
    for seed in range(2):
        model = random_model(spec, layers, device, torch.bfloat16, seed)
        if not recipe.is_none:
            apply_recipe(model, recipe)
            for module in model.modules():
                if isinstance(module, FP8Linear):
                    module.original = module.source = None
        models.append(parallelize(model, dims) if dims.world > 1 else model)
    return models


class Loop:
    """The sampling loop of one setting, and the time of each of its passes."""

    def __init__(
        self,
        models: list[WanModel],
        setting: Setting,
        dims: ParallelDims,
        phase: str,
        steps: int,
        exact: str,
        fp8: str,
        device: str,
        pooled: bool = False,
    ):
        """``pooled``: the forwards run in other processes and are waited for."""
        spec = models[0].spec
        defaults = DEFAULTS[spec.task]
        self.models, self.spec, self.setting, self.dims = models, spec, setting, dims
        self.local = not pooled
        self.events = device.startswith("cuda") and not pooled
        self.attention = Attention(fp8, exact=exact) if setting.fp8_attention else Attention(exact)
        self.guidance = defaults.guidance
        self.schedule = tuple(sigmas(STEPS, defaults.shift, "unipc").tolist())
        self.timesteps = timesteps(STEPS, defaults.shift, "unipc").tolist()
        self.switch = high_noise_steps(self.timesteps, defaults.boundary)
        self.policy = _policy(setting, spec, phase)
        self.skips = self._skips()
        self.steps = self._chosen(steps)
        for model in models:
            set_attention(model, self.attention)
            apply_cache(model, self.policy)
        self.marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        """By kind of pass: where it began and ended."""
        self.solver_marks: list[tuple[Any, Any]] = []

    def run(self, noise: Tensor, given: Tensor, prompts: Tensor) -> Tensor:
        """Latents [1, 16, F, H, W], from noise, conditioning channels and text rows [2, L, D] (cond, uncond)."""
        self.marks.clear()
        self.solver_marks.clear()
        for model in self.models:
            model.begin_run()
        x, solver = noise, UniPC(self.schedule)
        self.prompts = prompts, prompts[:1], prompts[1:]
        for step in self.steps:
            if step == self.switch and (cache := cache_of(self.models[0])) is not None:
                cache.release()  # as a host does between the experts
            cond, uncond = self.velocities(x, given, step)
            began = self._mark()
            guided = uncond + self.guidance[step < self.switch] * (cond - uncond)
            x = solver.step(guided, step, x) if len(self.steps) == STEPS else x + 0.01 * guided.to(x)
            self.solver_marks.append((began, self._mark()))
        return x

    def velocities(self, x: Tensor, given: Tensor, step: int, *, both: bool = True) -> tuple[Tensor, Tensor]:
        """Cond and uncond: one forward with both where ranks share them, else one each; not ``both``: one forward."""
        latents = torch.cat([x.to(given), given], dim=1)
        if self.dims.cfg == 2:
            cond, uncond = self._forward(latents.expand(2, -1, -1, -1, -1), self.prompts[0], step, COND, UNCOND).chunk(
                2
            )
            return cond, uncond
        cond = self._forward(latents, self.prompts[1], step, COND)
        return cond, self._forward(latents, self.prompts[2], step, UNCOND) if both else cond

    def _forward(self, latents: Tensor, prompts: Tensor, step: int, *parts) -> Tensor:
        high = step < self.switch
        model = self.models[0 if high else 1]
        options = ForwardOptions(
            text_key=tuple(part.key for part in parts),
            attention=self.attention,
            step=Step(step, STEPS),
            position=RunPosition(
                sigma=self.schedule[step],
                schedule=self.schedule,
                conditionings=parts,
                share=(0, self.switch) if high else (self.switch, STEPS),
                expert="high_noise" if high else "low_noise",
            ),
        )
        now = torch.full((len(parts),), float(self.timesteps[step]), device=latents.device)
        cache = cache_of(model)
        before, began = 0 if cache is None else cache.report.skipped, self._mark()
        out = model(latents, now, prompts, options=options)
        skipped = cache is not None and cache.report.skipped > before
        self.marks["skipped" if skipped else self._computed_kind(step)].append((began, self._mark()))
        return out

    def _computed_kind(self, step: int) -> str:
        return "fp8-attention" if self.setting.fp8_attention and 2 <= step < STEPS - 2 else "exact"

    def _mark(self) -> Any:
        if not self.events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, marks: list[tuple[Any, Any]]) -> float:
        return statistics.median(a.elapsed_time(b) if self.events else 1000 * (b - a) for a, b in marks)

    def pass_ms(self) -> dict[str, float]:
        """Median of each kind of pass in the last run; with cfg 2 a pass is cond and uncond together."""
        return {kind: round(self._ms(marks), 3) for kind, marks in self.marks.items()}

    def _skips(self) -> list[tuple[bool, bool]]:
        """Whether cond and uncond of each step are skipped."""
        found: list[tuple[bool, bool]] = []
        for first, end, expert in ((0, self.switch, "high_noise"), (self.switch, STEPS, "low_noise")):
            if self.policy is None:
                found += [(False, False)] * (end - first)
                continue
            plan = RunPlan(spec=self.spec, schedule=self.schedule, first=first, end=end, expert=expert, per_frame=False)
            tracker, nothing, kinds = self.policy.start(plan), torch.empty(0), frozenset({0, 1})
            for step in range(first, end):
                cond, uncond = (tracker.decide(step, kind, None, nothing, kinds).skip for kind in (0, 1))
                found.append((cond, uncond))
        return found

    def _chosen(self, count: int) -> list[int]:
        """All steps, or as many in a row from each expert: such as begin with a computed step and a skipped one where
        there are any, else the middle ones."""
        if count >= STEPS:
            return list(range(STEPS))
        found: list[int] = []
        for begin, end, number in ((0, self.switch, count // 2), (self.switch, STEPS, count - count // 2)):
            last = max(begin, end - number)
            pairs = (at for at in range(begin, last) if not any(self.skips[at]) and all(self.skips[at + 1]))
            start = next(pairs, (begin + last) // 2)
            found += range(start, min(start + number, end))
        return found

    def passes(self) -> dict[str, int]:
        """How many passes of each kind 40 steps have; with cfg 2 a step has one, skipped if both its halves are."""
        found: dict[str, int] = defaultdict(int)
        for step, skips in enumerate(self.skips):
            for skip in [all(skips)] if self.dims.cfg == 2 else skips:
                found["skipped" if skip else self._computed_kind(step)] += 1
        return dict(found)

    def predicted_seconds(self, missing: Callable[[str], float]) -> float:
        """Of all 40 steps, from the last run; ``missing`` times a kind of pass that was not among its steps."""
        ms = self.pass_ms()
        passes = sum(count * (ms.get(kind) or missing(kind)) for kind, count in self.passes().items())
        return (passes + STEPS * self._ms(self.solver_marks)) / 1000


def _policy(setting: Setting, spec: ModelSpec, phase: str) -> Policy | None:
    policy = policy_of(setting.cache, spec, "keep")
    if isinstance(policy, MagCache):
        policy = MagCache(policy.threshold, policy.max_skips, policy.retention, curve=policy.curve, phase=phase)  # type: ignore[arg-type]
    return policy


class Pipeline:
    """Prompt and image to pixels."""

    def __init__(
        self, spec: ModelSpec, size: tuple[int, int], frames: int, dims: ParallelDims, vae_dim: int, device: str
    ):
        width, height = size
        self.device, self.frames = device, frames
        self.grid = latent_grid(spec, width, height, frames)
        self.encoder = random_encoder(spec.text_dim, device)
        group = build_groups(dims, torch.device(device).type).everyone if dims.world > 1 else None
        self.vae = SplitVAE(random_vae(vae_dim, device, torch.bfloat16), group)
        generator = torch.Generator(device).manual_seed(5)
        self.ids = torch.randint(1, 1000, (2, TEXT_TOKENS), device=device, generator=generator)
        counts = torch.tensor(PROMPT_TOKENS, device=device)[:, None]
        self.mask = (torch.arange(TEXT_TOKENS, device=device) < counts).long()
        self.image = torch.rand(3, height, width, device=device, generator=generator) * 2 - 1
        self.noise = torch.randn(1, spec.out_dim, *self.grid, device=device, generator=generator)

    def __call__(self, loop: Loop) -> dict[str, float]:
        """Seconds of each part, as the slowest rank has them."""
        seconds: dict[str, float] = {}

        def timed(name: str, function: Callable[[], Tensor]) -> Tensor:
            ranks.barrier()
            began = time.perf_counter()
            value = function()
            ranks.barrier()
            seconds[name] = time.perf_counter() - began
            return value

        prompts = timed("t5_s", self._text)
        given = timed("vae_encode_s", self._condition)
        latents = timed("dit_s", lambda: loop.run(self.noise, given, prompts))
        pixels = timed("vae_decode_s", lambda: self._pixels(latents))
        assert pixels.shape[2] == self.frames and torch.isfinite(latents).all()
        values = ranks.slowest(list(seconds.values()), self.device)
        return dict(zip(seconds, values, strict=True))

    def _text(self) -> Tensor:
        return self.encoder.encode_ids(self.ids, self.mask) * self.mask[..., None]

    def _condition(self) -> Tensor:
        video = torch.zeros(1, 3, self.frames, *self.image.shape[1:], device=self.device, dtype=torch.bfloat16)
        video[:, :, 0] = self.image
        latents = normalize_latents(self.vae.encode(video))
        return i2v_condition(i2v_mask(self.frames, *self.grid[1:]).to(latents)[None], latents)

    def _pixels(self, latents: Tensor) -> Tensor:
        pixels = self.vae.decode(denormalize_latents(latents).to(torch.bfloat16))
        return ((pixels.clamp_(-1, 1) + 1) * 127.5).to(torch.uint8)


def measure(name: str, loop: Loop, pipeline: Pipeline, repeats: int, warm: bool, device: str) -> dict[str, Any]:
    """One row of results. ``warm``: nothing of its kind has run before."""
    cuda = device.startswith("cuda")
    given = pipeline._condition()
    loop.prompts = (prompts := pipeline._text()), prompts[:1], prompts[1:]
    for model in loop.models:
        model.begin_run()
    first_s = None
    if warm:  # scales and kernels of both experts; the VAE decodes what no later step needs
        pipeline._pixels(pipeline.noise)
        ranks.barrier()
        began = time.perf_counter()
        for step in (10, STEPS - 10):
            loop.velocities(pipeline.noise, given, step, both=False)
        ranks.barrier()
        first_s = round(time.perf_counter() - began, 2)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    runs = [pipeline(loop) for _ in range(repeats)]
    seconds = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    pass_ms, predicted = loop.pass_ms(), len(loop.steps) < STEPS
    answered = _answered(loop.models)

    def missing(kind: str) -> float:
        """A pass of a kind that the chosen steps have not."""
        if kind == "skipped":
            raise typer.BadParameter("no pass was skipped in so few steps: raise --steps")
        loop.marks.clear()
        loop.velocities(pipeline.noise, given, 0)
        pass_ms[kind] = loop.pass_ms()[kind]
        return pass_ms[kind]

    passes = loop.passes()
    if predicted:
        measured = {key: list(value) for key, value in loop.marks.items()}
        seconds["dit_s"] = loop.predicted_seconds(missing)
        loop.marks.update(measured)
    for model in loop.models:
        model.begin_run()
    used = kernels_used(lambda: loop.velocities(pipeline.noise, given, 10, both=False), device) if loop.local else {}
    dims, setting, tokens = loop.dims, loop.setting, pipeline.grid[0] * pipeline.grid[1] * pipeline.grid[2] // 4
    return {
        "row": name,
        "model": "i2v-A14B",
        "tokens": tokens,
        "recipe": setting.recipe,
        "backend": None if loop.models[0].quantization is None else loop.models[0].quantization.backends,  # type: ignore[attr-defined]
        "attention": "exact, FP8 in its window" if setting.fp8_attention else "exact",
        "attention_calls": answered,
        "sparsity": None,
        "cache": setting.cache,
        "phase": getattr(loop.policy, "phase", None),
        "world_size": dims.world,
        "topology": ranks.name_of(dims),
        "steps": STEPS,
        "steps_run": len(loop.steps),
        "repeats": repeats,
        **{part: round(value, 3) for part, value in seconds.items()},
        "total_s": round(sum(seconds.values()), 3),
        "pool": not loop.local,
        "first_passes_s": first_s,
        "dit_predicted": predicted,
        "dit_spread_s": None if predicted else [round(run["dit_s"], 3) for run in runs],
        "pass_ms": pass_ms,
        "passes": passes,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "published_s_8_h100": PUBLISHED.get(name),
        "kernels": used,
    }


def _answered(models: list[WanModel]) -> dict[str, int]:
    """Calls of low-precision attention settings in the last run, by the backend that answered; on this rank."""
    found: dict[str, int] = defaultdict(int)
    for model in models:
        for core in attention_cores(model):
            for counts in core.answered.values():
                for backend, count in counts.items():
                    found[backend] += count
    return dict(found)


def show(rows: list[dict]) -> None:
    """All rows so far."""
    first = rows[0]
    title = f"{first['world_size']} x GPU, {first['topology'] or 'no split'}, {first['tokens']:,} tokens"
    table = Table(title=f"{title}; * DiT loop summed up from {first['steps_run']} steps")
    for column in ("row", "T5", "VAE encode", "DiT loop", "VAE decode", "total", "ms a pass", "passes", "peak GiB"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["row"],
            *(f"{row[part]:.2f}" for part in ("t5_s", "vae_encode_s")),
            f"{row['dit_s']:.2f}{'*' if row['dit_predicted'] else ''}",
            f"{row['vae_decode_s']:.2f}",
            f"{row['total_s']:.2f}",
            str(row["pass_ms"]),
            str(row["passes"]),
            str(row["peak_gib"]),
        )
    console.print(table)


def usual_topology(world: int, heads: int) -> ParallelDims:
    """Halves of guidance first, then heads."""
    cfg = 2 if world % 2 == 0 else 1
    sequence = world // cfg
    ulysses = max(n for n in range(1, sequence + 1) if sequence % n == 0 and heads % n == 0)
    return ParallelDims(cfg=cfg, ulysses=ulysses, ring=sequence // ulysses)


def main(
    rows: Annotated[str, typer.Option(help=f"With commas, of {', '.join(ROWS)}.")] = ",".join(ROWS),
    steps: Annotated[
        int, typer.Option(help="How many of the 40 steps to run; fewer: the loop's time is summed up.")
    ] = STEPS,
    repeats: Annotated[int, typer.Option(help="Runs of each row, the median counts.")] = 1,
    topology: Annotated[
        str, typer.Option(help="As cfg2+ulysses4+fsdp; empty: cfg2 where the ranks are even, the rest Ulysses.")
    ] = "",
    phase: Annotated[str, typer.Option(help="MagCache: in_phase, or published.")] = "in_phase",
    exact: Annotated[str, typer.Option(help="Exact attention backend.")] = "auto",
    fp8_attention: Annotated[str, typer.Option(help="FP8 attention backend.")] = "fa3-fp8",
    backend: Annotated[str, typer.Option(help="Who multiplies in FP8.")] = "auto",
    model: Annotated[str, typer.Option(help="i2v-A14B, or tiny-i2v for a rehearsal.")] = "i2v-A14B",
    layers: Annotated[int, typer.Option(help="Blocks of each expert; 0 for all of them.")] = 0,
    size: Annotated[str, typer.Option(help="Pixels, width x height.")] = "1280x720",
    frames: Annotated[int, typer.Option(help="Pixel frames, 4n+1.")] = 81,
    device: Annotated[str, typer.Option(help="cuda or cpu; empty picks.")] = "",
    pool: Annotated[int, typer.Option(help="Without torchrun: a pool of so many worker processes.")] = 0,
    folder: Annotated[Path, typer.Option(help="With --pool: where the experts' files are written, or lie.")] = Path(
        "/dev/shm"
    ),
    json: Annotated[str, typer.Option(help="Where to write the results file.")] = "",
) -> None:
    """Time whole videos, prompt to pixels."""
    names = rows.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no row: {', '.join(ROWS)}")
    device = ranks.start(device)
    console.quiet = not ranks.is_first()
    spec = MODELS[model]
    dims = ranks.topology(topology) if topology else usual_topology(pool or ranks.world(), spec.num_heads)
    dims.check(spec)
    if dims.world != (pool or ranks.world()) or (pool and ranks.world() > 1):
        raise typer.BadParameter(f"{dims} takes {dims.world} ranks; torchrun started {ranks.world()}")
    if dims.cfg == 2 and phase == "published" and steps < STEPS:
        raise typer.BadParameter("--phase published skips the halves of cfg2 apart: run all 40 steps, or no cfg2")
    width, height = (int(n) for n in size.split("x"))
    found: list[dict] = []
    warmed: set[tuple[str, bool]] = set()
    with torch.inference_mode():
        here = ParallelDims() if pool else dims
        pipeline = Pipeline(spec, (width, height), frames, here, 96 if model == "i2v-A14B" else 8, device)
        for recipe in dict.fromkeys(ROWS[name].recipe for name in names):
            mine = [name for name in names if ROWS[name].recipe == recipe]
            made, count = Recipe(recipe, backend=backend), layers or spec.num_layers
            if pool:
                models = pooled_experts(spec, count, made, dims, pool, folder, device)
            else:
                models = random_experts(spec, count, made, dims, device)
            for name in mine:
                loop = Loop(models, ROWS[name], dims, phase, steps, exact, fp8_attention, device, bool(pool))
                kernels = recipe, ROWS[name].fp8_attention
                found.append(measure(name, loop, pipeline, repeats, kernels not in warmed, device))
                warmed.add(kernels)
                show(found)
                if json and ranks.is_first():
                    common.write_results(json, found, device)
            del models, loop
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
    ranks.stop()


if __name__ == "__main__":
    typer.run(main)
