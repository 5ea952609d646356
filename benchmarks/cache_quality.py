"""What skipped passes do to the latents: policies and thresholds against the uncached run, on a checkpoint with real
weights.

    python benchmarks/cache_quality.py --checkpoint models/wan/Wan2.2-T2V-A14B --prompts prompts.txt --size 832x480 \\
        --frames 81 --json out.json

The curve is measured on the first prompt, the others are scored: PSNR of the final latents against the same run with
every pass computed, peak the range of those, averaged over prompts. One line of ``--prompts`` is one prompt.
Image-to-video needs ``--image``, the first frame. PSNR at equal passes says which policy is better on this model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import common
import torch
import typer
from cache import Run, Watch
from dit import console, latent_grid
from experts import condition_of, load_experts
from rich.table import Table
from torch import Tensor

from wan_fp8 import load_text_encoder
from wan_fp8.caching import REUSES, Curve, EasyCache, MagCache, Policy, Recording, Taylor, apply_cache, cache_of
from wan_fp8.models.specs import Task
from wan_fp8.models.vae import load_vae
from wan_fp8.sampling import NEGATIVE_PROMPT

THRESHOLDS = (0.03, 0.06, 0.12, 0.24, 0.48)


def policies(curve: Curve, retention: float) -> Iterator[Policy]:
    """The settings that are compared."""
    for threshold in THRESHOLDS:
        for max_skips in (2, 4):
            for reuse in REUSES:
                yield MagCache(threshold, max_skips, retention, reuse, curve=curve)
            yield EasyCache(threshold, max_skips, retention)
            yield EasyCache(threshold, max_skips, retention, "linear")
        yield MagCache(threshold, 2, retention, phase="published", curve=curve)
    for max_skips in (1, 2, 3, 4):
        yield Taylor(max_skips=max_skips, retention=retention)
        yield Taylor(max_skips=max_skips, retention=retention, reuse="keep")


def sampled(run: Run, prompt: Tensor, noise: Tensor) -> Tensor:
    """Latents of one video."""
    run.prompts[0], run.noise = prompt, noise
    return run.loop(Watch(run.device))[0]


def measured_curve(run: Run, prompt: Tensor, noise: Tensor) -> Curve:
    """The models' own curve, from a run with every pass computed."""
    recording = Recording()
    shares = [(0, run.switch), (run.switch, run.steps)][: len(run.models)]
    for model, (first, end) in zip(run.models, shares, strict=True):
        apply_cache(model, None)
        model.stack_wrappers["recording"] = recording
        recording.begin(id(model), None, run.schedule[first : end + 1])
    sampled(run, prompt, noise)
    for model in run.models:
        del model.stack_wrappers["recording"]
    recording.end()
    return recording.curve("measured", run.spec, [("own", "own")])


def psnr(ours: Tensor, exact: Tensor) -> float:
    """Decibels; the peak is the range of ``exact``."""
    error = float((ours.double() - exact.double()).square().mean())
    return math.inf if error == 0 else 20 * math.log10(float(exact.max() - exact.min())) - 10 * math.log10(error)


def main(
    checkpoint: Annotated[str, typer.Option(help="An official or Diffusers folder.")],
    prompts: Annotated[str, typer.Option(help="A file with a prompt in each line, at least two.")],
    size: Annotated[str, typer.Option(help="Pixels, width x height.")] = "832x480",
    frames: Annotated[int, typer.Option(help="Pixel frames, 4n+1.")] = 81,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 40,
    retention: Annotated[float, typer.Option(help="Share of the steps at the start that is computed.")] = 0.2,
    image: Annotated[str, typer.Option(help="Image-to-video: the first frame.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda or cpu; empty picks.")] = "",
    json: Annotated[str, typer.Option(help="Where to write the results file.")] = "",
) -> None:
    """Quality against passes computed, for every policy."""
    lines = [line for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < 2:
        raise typer.BadParameter(f"the curve is measured on the first prompt, the others are scored; got {len(lines)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    compute = getattr(torch, dtype)
    with torch.inference_mode():
        encoder = load_text_encoder(checkpoint)
        texts = encoder.encode([*lines, NEGATIVE_PROMPT]).to(device, compute)
        del encoder
        models = load_experts(checkpoint, device, compute)
        width, height = (int(n) for n in size.split("x"))
        run = Run(models, latent_grid(models[0].spec, width, height, frames), steps, device, compute)
        run.prompts[1] = texts[-1:]
        if bool(image) != (run.spec.task is Task.I2V):
            wanted = "an --image" if run.spec.task is Task.I2V else "no --image"
            raise typer.BadParameter(f"a {run.spec.task} model takes {wanted}")
        if image:
            vae = load_vae(checkpoint, torch.float32, device)
            run.given = condition_of(vae, image, width, height, frames).to(device, compute)
            del vae
        noises = [
            torch.randn(run.noise.shape, generator=torch.Generator().manual_seed(seed)).to(device)
            for seed in range(len(lines))
        ]
        curve = measured_curve(run, texts[:1], noises[0])
        videos = range(1, len(lines))
        exact = [sampled(run, texts[i : i + 1], noises[i]) for i in videos]
        rows = []
        for policy in policies(curve, retention):
            for model in models:
                apply_cache(model, policy)
            scores, computed, total = [], 0, 0
            for i in videos:
                scores.append(psnr(sampled(run, texts[i : i + 1], noises[i]), exact[i - 1]))
                reports = [cache.finish() for cache in map(cache_of, models) if cache is not None]
                computed += sum(report.computed for report in reports)
                total += sum(report.computed + report.skipped for report in reports)
            rows.append(
                {
                    "model": Path(checkpoint).name,
                    "size": size,
                    "frames": frames,
                    "steps": steps,
                    "cache": policy.name,
                    "threshold": policy.threshold,
                    "max_skips": policy.max_skips,
                    "retention": policy.retention,
                    "reuse": policy.reuse,
                    "phase": getattr(policy, "phase", None),
                    "videos": len(scores),
                    "passes_computed": round(computed / len(scores), 2),
                    "passes": round(total / len(scores), 2),
                    "psnr_db": round(sum(scores) / len(scores), 3),
                    "psnr_db_worst": round(min(scores), 3),
                }
            )
    show(rows)
    if json:
        common.write_results(json, rows, device)


def show(rows: list[dict]) -> None:
    """The rows, fewest passes first."""
    first = rows[0]
    table = Table(title=f"{first['model']}, {first['steps']} steps, {first['videos']} videos")
    columns = ("passes_computed", "psnr_db", "psnr_db_worst", "cache", "threshold", "max_skips", "reuse", "phase")
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in sorted(rows, key=lambda row: (row["passes_computed"], -row["psnr_db"])):
        table.add_row(*(str(row[column]) for column in columns))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
