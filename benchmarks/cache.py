"""A whole sampling run with a cache of steps, on random weights: what a skipped pass costs, and the run against its
computed passes.

    python benchmarks/cache.py --model i2v-A14B --size 1280x720 --frames 81 --layers 4 --attention fa3 \\
        --recipe DelayedScaling --cache E012K2R20,E024K2R10 --json out.json

The published schedule with guidance, UniPC, both experts of an A14B model (each of ``--layers`` blocks). ``pass_s`` is
one forward without a cache, the median of ``--repeats``. ``loop_ratio`` is the seconds of the run over (computed
passes times ``pass_s``), solver and skipped passes included: with fewer blocks than the model has, what is not in the
blocks weighs more. ``peak_gib_without`` is the peak of cond and uncond in both experts, which come first and leave in
memory what a run without a cache has there: keys and values of both prompts among it.
Kernels are compiled before, in forwards of two blocks. ``--repeats 0`` saves these forwards of a whole model:
``pass_s`` is then ``computed_pass_s``, of the run itself. Random weights say nothing about quality.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import common
import torch
import typer
from dit import MODELS, console, latent_grid, open_window, random_model, recipes
from rich.table import Table
from torch import Tensor

from wan_fp8 import Recipe, apply_recipe, set_attention
from wan_fp8.caching import (
    POLICIES,
    PRESETS,
    REUSES,
    Conditioning,
    MagCache,
    Policy,
    RunPosition,
    apply_cache,
    cache_of,
    published_for,
)
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.specs import ModelSpec, Task
from wan_fp8.models.wan import WanModel
from wan_fp8.sampling import DEFAULTS, UniPC, high_noise_steps, sigmas, timesteps

TEXT_TOKENS = 512
WARM_BLOCKS = 2
COND, UNCOND = Conditioning("cond", 0), Conditioning("uncond", 1)


def policy_of(name: str, spec: ModelSpec, reuse: str) -> Policy | None:
    """A MagCache preset, another policy by name, or ``none``."""
    if name == "none":
        return None
    if name in PRESETS:
        threshold, max_skips, retention = PRESETS[name]
        curve = published_for(spec, per_frame=spec.task is Task.TI2V)
        return MagCache(threshold, max_skips, retention, reuse, curve=curve)  # type: ignore[arg-type]
    return POLICIES[name]()


class Run:
    """A sampling run of one or two experts, and the time of every forward."""

    def __init__(self, models: list[WanModel], grid: tuple[int, int, int], steps: int, device: str, dtype: torch.dtype):
        spec = models[0].spec
        defaults = DEFAULTS[spec.task]
        self.models, self.spec, self.steps, self.device, self.dtype = models, spec, steps, device, dtype
        self.guidance = defaults.guidance  # low noise, high noise
        self.schedule = tuple(sigmas(steps, defaults.shift, "unipc").tolist())
        self.timesteps = timesteps(steps, defaults.shift, "unipc").tolist()
        self.switch = steps if len(models) == 1 else high_noise_steps(self.timesteps, defaults.boundary)
        generator = torch.Generator(device).manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype, generator=generator)

        self.noise = random(1, spec.out_dim, *grid).float()
        self.given = random(1, spec.in_dim - spec.out_dim, *grid)
        self.prompts = [random(1, TEXT_TOKENS, spec.text_dim) for _ in range(2)]

    def forward(self, model: WanModel, x: Tensor, step: int, conditioning: Conditioning, share: tuple[int, int]):
        shape = (1, x.shape[2]) if self.spec.task is Task.TI2V else (1,)
        now = torch.full(shape, float(self.timesteps[step]), device=self.device)
        if self.spec.task is Task.TI2V:
            now[:, 0] = 0
        position = RunPosition(
            sigma=self.schedule[step],
            schedule=self.schedule,
            conditionings=(conditioning,),
            share=share,
            expert=None if len(self.models) == 1 else ("high_noise" if share[0] == 0 else "low_noise"),
        )
        latents = torch.cat([x.to(self.dtype), self.given], dim=1)
        options = ForwardOptions(position=position)
        return model(latents, now, self.prompts[conditioning.kind], options=options)

    def loop(self, watch: Callable[[WanModel, Callable[[], Tensor]], Tensor]) -> tuple[Tensor, float]:
        """The run; each forward goes through ``watch``. Latents, and seconds of everything."""
        solver, x = UniPC(self.schedule), self.noise
        for model in self.models:
            model.begin_run()
        _wait(self.device)
        began = time.perf_counter()
        for step in range(self.steps):
            high = step < self.switch
            if step == self.switch and (cache := cache_of(self.models[0])) is not None:
                cache.release()  # as a host does between the experts
            model = self.models[0 if high else -1]
            share = (0, self.switch) if high else (self.switch, self.steps)
            uncond, cond = (
                watch(model, lambda m=model, c=c: self.forward(m, x, step, c, share))  # noqa: B023
                for c in (UNCOND, COND)
            )
            x = solver.step(uncond + self.guidance[high] * (cond - uncond), step, x)
        _wait(self.device)
        return x, time.perf_counter() - began


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Watch:
    """Milliseconds of computed and of skipped forwards, without waiting for the GPU in between."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.marks: list[tuple[bool, object, object]] = []

    def __call__(self, model: WanModel, forward: Callable[[], Tensor]) -> Tensor:
        cache = cache_of(model)
        before = 0 if cache is None else cache.report.skipped
        began = self._mark()
        out = forward()
        ended = self._mark()
        # a cache that begins its run has skipped nothing yet
        self.marks.append((cache is not None and cache.report.skipped > before, began, ended))
        return out

    def _mark(self) -> object:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def times(self, skipped: bool) -> list[float]:
        """Milliseconds of each."""
        if self.cuda:
            return [a.elapsed_time(b) for s, a, b in self.marks if s == skipped]  # type: ignore[attr-defined]
        return [1000 * (b - a) for s, a, b in self.marks if s == skipped]  # type: ignore[operator]


def peak_gib(device: str, call: Callable[[], object]) -> float | None:
    """Most memory that is allocated while ``call`` runs."""
    if not device.startswith("cuda"):
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    _wait(device)
    return torch.cuda.max_memory_allocated() / 2**30


def measure(
    model_name: str,
    size: str,
    frames: int,
    layers: int,
    steps: int,
    caches: list[str],
    reuse: str,
    attention: str,
    recipe: Recipe | None,
    dtype: torch.dtype,
    device: str,
    repeats: int,
) -> list[dict]:
    """One row for each cache."""
    spec = MODELS[model_name]
    width, height = (int(n) for n in size.split("x"))
    grid = latent_grid(spec, width, height, frames)
    tokens = grid[0] * grid[1] * grid[2] // 4
    experts = 1 if DEFAULTS[spec.task].boundary is None else 2
    models = []
    for seed in range(experts):
        model = random_model(spec, layers, device, dtype, seed)
        set_attention(model, open_window(attention))
        models.append(model if recipe is None else apply_recipe(model, recipe))
    run = Run(models, grid, steps or DEFAULTS[spec.task].steps, device, dtype)

    for model in models:
        blocks, model.blocks = model.blocks, model.blocks[:WARM_BLOCKS]
        run.forward(model, run.noise, 0, COND, (0, run.switch))
        model.blocks = blocks
        model.begin_run()

    def each_once() -> None:
        for model in models:
            for conditioning in (UNCOND, COND):
                run.forward(model, run.noise, 0, conditioning, (0, run.switch))

    without, alone = None, []
    if repeats:
        without = peak_gib(device, each_once)
        alone = common.milliseconds(
            lambda: run.forward(models[0], run.noise, 0, COND, (0, run.switch)), device, repeats=repeats, warmup=0
        )
    activation = tokens * spec.dim * torch.empty((), dtype=dtype).element_size()
    rows = []
    for name in caches:
        for model in models:
            apply_cache(model, policy_of(name, spec, reuse))
        watch = Watch(device)
        held: dict[str, float] = {}

        def sampled(watch: Watch = watch, held: dict[str, float] = held) -> None:
            latents, held["seconds"] = run.loop(watch)
            assert torch.isfinite(latents).all()

        peak = peak_gib(device, sampled)
        reports = [cache.finish() for cache in map(cache_of, models) if cache is not None]
        computed, skipped = watch.times(False), watch.times(True)
        pass_ms = statistics.median(alone or computed)
        assert sum(r.computed for r in reports) in (0, len(computed)) and sum(r.skipped for r in reports) == len(
            skipped
        )
        kept = max((report.most_bytes for report in reports), default=0)
        rows.append(
            {
                "model": model_name,
                "size": size,
                "frames": frames,
                "tokens": tokens,
                "recipe": "none" if recipe is None else recipe.name,
                "backend": str(dtype).removeprefix("torch.")
                if recipe is None
                else models[0].quantization.resolve(torch.device(device), dtype).backend.name,  # type: ignore[union-attr]
                "attention": attention,
                "sparsity": None,
                "cache": name,
                "reuse": None if name == "none" else cache_of(models[0]).policy.reuse,  # type: ignore[union-attr]
                "world_size": 1,
                "topology": None,
                "layers": layers,
                "steps": run.steps,
                "passes_computed": len(computed),
                "passes_skipped": len(skipped),
                "skipped_by_expert": [report.skipped for report in reports],
                "repeats": repeats,
                "pass_s": round(pass_ms / 1000, 5),
                "computed_pass_s": round(statistics.median(computed) / 1000, 5),
                "skipped_pass_ms": round(statistics.median(skipped), 3) if skipped else None,
                "skipped_pass_worst_ms": round(max(skipped), 3) if skipped else None,
                "loop_s": round(held["seconds"], 3),
                "loop_ratio": round(held["seconds"] / (len(computed) * pass_ms / 1000), 4),
                "cache_gib": round(kept / 2**30, 3),
                "activations_per_conditioning": round(kept / 2 / activation, 3),
                "peak_gib": peak and round(peak, 2),
                "peak_gib_without": without and round(without, 2),
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    """Print rows as a person wants to read them."""
    first = rows[0]
    what = f"{first['model']} {first['size']} x {first['frames']} frames"
    table = Table(title=f"{what}, {first['layers']} blocks, {first['steps']} steps")
    columns = ("cache", "passes_computed", "passes_skipped", "pass_s", "computed_pass_s", "skipped_pass_ms", "loop_s")
    columns += ("loop_ratio", "cache_gib", "activations_per_conditioning", "peak_gib")
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    console.print(table)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "i2v-A14B",
    size: Annotated[str, typer.Option(help="Pixels, width x height.")] = "1280x720",
    frames: Annotated[int, typer.Option(help="Pixel frames, 4n+1.")] = 81,
    layers: Annotated[int, typer.Option(help="Blocks of each expert; 0 for all of them.")] = 4,
    steps: Annotated[int, typer.Option(help="Sampling steps; 0 for the published number.")] = 0,
    cache: Annotated[
        str, typer.Option(help=f"Of none, {', '.join(PRESETS)}, {', '.join(list(POLICIES)[1:])}; or several.")
    ] = "E012K2R20",
    reuse: Annotated[str, typer.Option(help=f"With a preset: {', '.join(REUSES)}.")] = "keep",
    attention: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    recipe: Annotated[str, typer.Option(help="FP8 recipe; or several.")] = "none",
    backend: Annotated[str, typer.Option(help="Who multiplies in FP8.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda or cpu; empty picks.")] = "",
    repeats: Annotated[int, typer.Option(help="Passes timed without a cache; 0: the run's own are taken.")] = 5,
    json: Annotated[str, typer.Option(help="Where to write the results file.")] = "",
) -> None:
    """Time a whole sampling run with a cache of steps on random weights."""
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is not one of {', '.join(MODELS)}")
    if (frames - 1) % 4:
        raise typer.BadParameter(f"frames must be 4n+1; got {frames}")
    names = cache.split(",")
    unknown = [name for name in names if name not in ("none", *PRESETS, *list(POLICIES)[1:])]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no cache: none, {', '.join([*PRESETS, *list(POLICIES)[1:]])}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    count = layers or MODELS[model].num_layers
    rows = []
    for scaling in recipes(recipe, backend, device, dtype):
        with torch.inference_mode():
            rows += measure(
                model,
                size,
                frames,
                count,
                steps,
                names,
                reuse,
                attention,
                scaling,
                getattr(torch, dtype),
                device,
                repeats,
            )
        show(rows)
        if json:
            common.write_results(json, rows, device)


if __name__ == "__main__":
    typer.run(main)
