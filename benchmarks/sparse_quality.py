"""What block-sparse attention does to a video, on a checkpoint with real weights: every policy at several densities,
with chance and a fixed neighbourhood as the controls that a good policy must beat; each also with dropped blocks that
take part by their mean key and value (``+ means``).

    python benchmarks/sparse_quality.py --checkpoint models/wan/Wan2.2-T2V-A14B-tiny --prompts prompts.txt \\
        --size 144x96 --frames 17 --block-tokens 8 --json out.json

Each run is held against the same seed and prompt with dense attention in the same precision. A clip of a small model
has few tokens: ``--block-tokens`` makes the blocks smaller than the kernels' 128, which the eager paths allow, so that
there are some to choose from; times then mean nothing. Rows carry the density and the dropped mass that the run
measured, and mean, worst and spread of each score over the videos.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import common
import torch
import typer
from dit import console
from experts import AnyVAE, condition_of, load_experts, load_its_vae
from quality import Job, Reference, Sampler, frames_of, make_jobs, references, scored
from quality_table import aggregated
from rich.table import Table

from wan_fp8 import Attention, set_attention
from wan_fp8.attention import Sparsity, sparsity_report
from wan_fp8.attention.sparse import BLOCK, Calibration, guarantee, order, presets, registry, remainder, run, selection
from wan_fp8.attention.sparse.backends import masked
from wan_fp8.attention.sparse.policies import Asked, Choice, window
from wan_fp8.attention.sparse.report import SparseReport
from wan_fp8.sampling import DEFAULTS, latent_shape

CONTROLS = ("window", "chance")


def by_chance(asked: Asked) -> Choice:
    """The control: as many blocks, other ones in every call."""
    every = asked.layout.key_blocks
    scores = torch.rand(1, 1, asked.query_blocks, every, device=asked.device)
    return Choice(scores, "count", asked.sparsity.density)


@contextmanager
def small_blocks(tokens: int) -> Iterator[None]:
    """Blocks of another size, in the eager paths."""
    if tokens == BLOCK:
        yield
        return
    with ExitStack() as stack:
        for module in (order, registry, selection, remainder, guarantee, run, masked, window):
            stack.enter_context(mock.patch.object(module, "BLOCK", tokens))
        stack.enter_context(mock.patch.object(guarantee, "ROWS", min(guarantee.ROWS, tokens)))
        stack.enter_context(mock.patch.object(run, "use_fused", lambda _: False))
        order.token_order.cache_clear()
        yield
    order.token_order.cache_clear()


def settings(densities: list[float], coverages: list[float], skip: tuple[float, float]) -> list[tuple[str, Sparsity]]:
    """The rows, by name; the table of ``calibrated`` is made on the way."""
    shared: dict[str, Any] = {
        "skip_first": skip[0],
        "skip_last": skip[1],
        "skip_first_blocks": 0,
        "skip_last_blocks": 0,
        "least": 0.01,
    }
    rows = [
        (f"{name} {share:g}", Sparsity(policy=policy, density=share, bound=None, **shared))
        for share in densities
        for name, policy in (("density", "density"), ("window", "window"), ("chance", "window"))
    ]
    rows += [(f"coverage {c:g}", Sparsity(coverage=c, bound=None, **shared)) for c in coverages]
    rows += [(name, replace(preset, **shared)) for name, preset in presets().items()]
    with_means = [(f"{name} + means", replace(sparsity, remainder=True)) for name, sparsity in rows]
    return rows + [row for row in with_means if not row[0].startswith("window")]


def measure(
    name: str, sparsity: Sparsity, sampler: Sampler, jobs: list[Job], exact: list[Reference], vae: AnyVAE
) -> tuple[dict[str, Any], list[SparseReport]]:
    """One row, and what the last video's run reports."""
    for model in sampler.models:
        set_attention(model, Attention(sparsity=sparsity))
    videos, density, dropped, reports = [], [], [], []
    with ExitStack() as stack:
        if name.startswith("chance"):
            torch.manual_seed(0)
            stack.enter_context(mock.patch.object(window, "choice", by_chance))
        for job, reference in zip(jobs, exact, strict=True):
            steps: list[dict[str, float]] = []
            latents = sampler.video(
                job, lambda step, clean, r=reference, s=steps: s.append(r.trajectory.compare(step, clean))
            ).cpu()
            videos.append(
                {"prompt": job.prompt, "seed": job.seed, **scored(reference, latents, frames_of(vae, latents), steps)}
            )
            reports = [report for model in sampler.models for report in sparsity_report(model)]
            density += [r.density for r in reports if r.density is not None]
            dropped += [mean for r in reports for mean, _ in r.dropped_by_step.values()]
    row = {
        "setting": name,
        "policy": name.split()[0],
        "bound": sparsity.bound,
        "sparsity": round(statistics.fmean(density), 4),
        "dropped": float(f"{statistics.fmean(dropped):.4g}"),
        **aggregated(videos),
        "videos": videos,
    }
    return row, reports


def table_of(reports: list[SparseReport], steps: int) -> Calibration:
    """Both experts' densities in one table: their steps do not overlap."""
    return Calibration(steps, tuple(sorted(row for report in reports for row in report.table)))


def show(rows: list[dict[str, Any]]) -> None:
    """Fewest blocks first."""
    table = Table(title=f"{rows[0]['model']}, {rows[0]['size']} x {rows[0]['frames']}, {len(rows[0]['videos'])} videos")
    names = ("latent_psnr_db", "latent_error", "psnr_db", "ssim")
    for column in ("setting", "sparsity", "dropped", *names):
        table.add_column(column.replace("_", " "))
    for row in sorted(rows, key=lambda row: row["sparsity"]):
        scores = ("-" if row[n]["mean"] is None else f"{row[n]['mean']:.4g} ({row[n]['worst']:.4g})" for n in names)
        table.add_row(row["setting"], str(row["sparsity"]), str(row["dropped"]), *scores)
    console.print(table)


def beaten(rows: list[dict[str, Any]]) -> list[str]:
    """Densities at which a control is as good as choosing by estimated mass: there should be none."""
    by_name = {row["setting"]: row["latent_psnr_db"]["mean"] for row in rows}
    return [
        f"{control} {share}"
        for name in by_name
        if name.startswith("density ")
        for share in (name.removeprefix("density "),)
        for control in CONTROLS
        if (by_name.get(f"{control} {share}", -1e9) or 1e9) >= (by_name[name] or 1e9)
    ]


def main(
    checkpoint: Annotated[str, typer.Option(help="An official or Diffusers folder.")],
    prompt: Annotated[str, typer.Option(help="One prompt.")] = "",
    prompts: Annotated[str, typer.Option(help="A file with a prompt in each line.")] = "",
    seeds: Annotated[int, typer.Option(help="Seeds 0 to N-1, each with every prompt.")] = 4,
    size: Annotated[str, typer.Option(help="Pixels, width x height.")] = "832x480",
    frames: Annotated[int, typer.Option(help="Pixel frames, 4n+1.")] = 81,
    steps: Annotated[int, typer.Option(help="Sampling steps; 0 for the published number.")] = 0,
    densities: Annotated[str, typer.Option(help="Shares of the blocks.")] = "0.15,0.25,0.45,0.7",
    coverages: Annotated[str, typer.Option(help="Shares of the estimated mass.")] = "0.6,0.8,0.9,0.97",
    skip: Annotated[str, typer.Option(help="Shares of dense steps at the start and the end.")] = "0.2,0.05",
    block_tokens: Annotated[int, typer.Option(help="Tokens of a block; other than 128 for small clips only.")] = BLOCK,
    image: Annotated[str, typer.Option(help="Image-to-video: the first frame.")] = "",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16, of every run.")] = "float32",
    device: Annotated[str, typer.Option(help="cuda or cpu; empty picks.")] = "",
    json: Annotated[str, typer.Option(help="Where to write the results file.")] = "",
) -> None:
    """Quality against density, for every policy and two controls."""
    lines = [prompt] if prompt else []
    if prompts:
        lines += [line for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or seeds < 1 or block_tokens < 1:
        raise typer.BadParameter("at least one --prompt or --prompts, one seed and one token a block")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    width, height = (int(n) for n in size.split("x"))
    dtype = getattr(torch, precision)
    first, last = (float(n) for n in skip.split(","))
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False), small_blocks(block_tokens):
        sampler = Sampler(models=load_experts(checkpoint, device, dtype), steps=steps, device=device, dtype=dtype)
        spec = sampler.models[0].spec
        sampler.steps = steps or DEFAULTS[spec.task].steps
        vae = load_its_vae(checkpoint, spec, device)
        if image:
            sampler.given = condition_of(vae, image, width, height, frames).to(device, dtype)
        shape = latent_shape(spec.task, width, height, frames)
        jobs = make_jobs(checkpoint, lines, range(seeds), shape)
        exact = references(sampler, jobs, vae)
        shared = {"model": Path(checkpoint).name, "size": size, "frames": frames, "steps": sampler.steps}
        shared |= {"block_tokens": block_tokens, "tokens": shape[1] * shape[2] * shape[3] // 4, "reference": precision}
        rows, balanced = [], []
        shares, masses = ([float(n) for n in s.split(",")] for s in (densities, coverages))
        for name, sparsity in settings(shares, masses, (first, last)):
            row, reports = measure(name, sparsity, sampler, jobs, exact, vae)
            rows.append(shared | row)
            balanced = reports if name == "balanced" else balanced
        table = table_of(balanced, sampler.steps)
        window_ = {"skip_first": first, "skip_last": last, "skip_first_blocks": 0, "skip_last_blocks": 0, "least": 0.01}
        sparsity = Sparsity(policy="calibrated", calibration=table, bound=None, **window_)
        rows.append(shared | measure("calibrated", sparsity, sampler, jobs, exact, vae)[0])
    show(rows)
    if json:
        common.write_results(json, rows, device)
    for name in beaten(rows):
        console.print(f"{name} is no worse than choosing by estimated mass at that density")


if __name__ == "__main__":
    typer.run(main)
