"""What the type of the residual stream does to the latents: float32 and bfloat16 against float64, on a small model.

    python benchmarks/residual_stream.py --layers 8,24 --json benchmarks/results/residual_stream.json

Random bf16 weights, 20 UniPC steps with guidance, the same noise for all; products and attention in bf16 in both cases,
so that the first column is what bf16 products cost by themselves. What it does to the time of a block:
``benchmarks/dit.py --stream float32,bfloat16``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Annotated

import common
import torch
import typer
from dit import random_model
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.specs import SPECS
from wan_fp8.models.wan import WanModel, build_model
from wan_fp8.sampling import UniPC, sigmas, timesteps

SPEC = dataclasses.replace(SPECS["t2v-A14B"], dim=512, ffn_dim=1408, num_heads=4, text_dim=512)
"""A quarter of A14B's heads' width and its ratio of FFN to width; head width 128 as in all Wan models."""
GRID = (3, 8, 10)
"""Latent frames, rows, columns: 60 tokens."""
TEXT_TOKENS = 32
SHIFT = 5.0
GUIDANCE = 3.5
console = Console(width=120)


def in_float64(model: WanModel) -> WanModel:
    """The same weights, computed in float64 throughout."""
    with torch.device("meta"):
        exact = build_model(model.spec)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()}, assign=True)
    return exact


def sample(model: WanModel, steps: int, seed: int, stream: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The latents after ``steps`` UniPC steps with guidance, and the first step's guided velocity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, SPEC.in_dim, *GRID, generator=generator).to(model.high_dtype)
    prompts = torch.randn(2, 1, TEXT_TOKENS, SPEC.text_dim, generator=generator).to(model.compute_dtype)
    options = ForwardOptions(stream_dtype=stream)
    solver, first = UniPC(sigmas(steps, SHIFT, "unipc")), None
    for index, timestep in enumerate(timesteps(steps, SHIFT, "unipc")):
        given = x.to(model.compute_dtype)
        cond, uncond = (model(given, timestep[None].float(), prompt, options=options) for prompt in prompts)
        velocity = uncond + GUIDANCE * (cond - uncond)
        first = velocity if first is None else first
        x = solver.step(velocity, index, x)
    assert first is not None
    return x, first


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative L2 error."""
    return float((ours.double() - exact).norm() / exact.norm())


def measure(layers: int, steps: int, seeds: int, log: Callable[[str], None]) -> list[dict]:
    """Rows for both types at one depth."""
    model = random_model(dataclasses.replace(SPEC, num_layers=layers), layers, "cpu", torch.bfloat16)
    exact = in_float64(model)
    found: dict[str, list[tuple[float, float]]] = {"float32": [], "bfloat16": []}
    for seed in range(seeds):
        began = time.perf_counter()
        latents, velocity = sample(exact, steps, seed, None)
        for name, errors in found.items():
            ours = sample(model, steps, seed, getattr(torch, name))
            errors.append((error(ours[0], latents), error(ours[1], velocity)))
        log(f"{layers} blocks, seed {seed}: {time.perf_counter() - began:.0f} s")
    return [
        {
            "stream": name,
            "layers": layers,
            "dim": SPEC.dim,
            "tokens": GRID[0] * GRID[1] * GRID[2] // 4,
            "steps": steps,
            "solver": "unipc",
            "guidance": GUIDANCE,
            "seeds": seeds,
            "velocity_error_first_step": round(sum(e[1] for e in errors) / seeds, 6),
            "latent_error": round(sum(e[0] for e in errors) / seeds, 6),
            "latent_error_worst": round(max(e[0] for e in errors), 6),
        }
        for name, errors in found.items()
    ]


def main(
    layers: Annotated[str, typer.Option(help="Numbers of blocks, with commas.")] = "8",
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    seeds: Annotated[int, typer.Option(help="Runs with other noise and prompts, averaged.")] = 2,
    json: Annotated[str, typer.Option(help="Where to write the results file.")] = "",
) -> None:
    """Error of the latents with a float32 and with a bfloat16 residual stream."""
    rows = []
    with torch.inference_mode():
        for count in layers.split(","):
            rows += measure(int(count), steps, seeds, console.print)
    table = Table(title=f"residual stream, {steps} UniPC steps, guidance {GUIDANCE:g}, against float64")
    for column in ("blocks", "stream", "velocity, first step", "latents", "latents, worst seed"):
        table.add_column(column)
    for row in rows:
        values = (row["velocity_error_first_step"], row["latent_error"], row["latent_error_worst"])
        table.add_row(str(row["layers"]), row["stream"], *(f"{value:.4f}" for value in values))
    console.print(table)
    if json:
        common.write_results(json, rows)


if __name__ == "__main__":
    typer.run(main)
