"""What a LoRA costs in accuracy on FP8 weights: merged and cast once, or live beside them, against the exact merge.

    python benchmarks/lora.py --json benchmarks/results/lora.json

``linear`` rows: the output of one linear of A14B's width on Gaussian data, relative to fp64 products of the real input
and the exactly merged weight; ``branch_*`` is the error of the change ``B A x`` alone, by how its first product is
computed. ``latents`` rows: a small model with random weights after some UniPC steps with guidance, the same noise for
all, relative to the exactly merged weights in float64. The change is a third of the weights' size. What a live LoRA
costs in time: ``benchmarks/dit.py --lora-rank 0,64``, and kernel by kernel ``benchmarks/kernels.py``.
"""

from __future__ import annotations

import copy
import statistics
from typing import Annotated

import common
import torch
import typer
from dit import random_lora, random_model
from residual_stream import SPEC, error, in_float64, sample
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wan_fp8 import Lora, Recipe, apply_recipe, remove_lora, set_lora
from wan_fp8.kernels import low_rank
from wan_fp8.kernels.quantize import Cast, Granularity, quantize, quantize_current, quantize_weight, spread_scale
from wan_fp8.models.wan import WanModel
from wan_fp8.quant.recipe import GRANULARITIES, LINEARS

WIDTH, TOKENS = 5120, 256
console = Console(width=150)


def linear_errors(granularity: Granularity, rank: int, device: str) -> dict:
    """One row: 5120 inputs and outputs, weights and matrices in bf16 as files have them."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, size: float) -> Tensor:
        return (torch.randn(shape, device=device, generator=generator) / size**0.5).bfloat16()

    x, weight = random(1, TOKENS, WIDTH, size=1), random(WIDTH, WIDTH, size=WIDTH)
    down, up = random(rank, WIDTH, size=WIDTH), random(WIDTH, rank, size=9 * rank)
    power = granularity is Granularity.BLOCK
    made = quantize_current(x) if granularity is Granularity.TENSOR else quantize(x, Cast(granularity, power))
    given, real = x[0].double(), made.dequantized(torch.float64)[0]

    def cast(value: Tensor) -> Tensor:
        qdata, scale = quantize_weight(value, granularity, power_of_2=power)
        return qdata.double() * spread_scale(scale, value.shape).double()

    stored, change = cast(weight), up.double() @ down.double()
    truth, thin = given @ (weight.double() + change).t(), given @ change.t()
    coarse, scale = quantize_weight(down, Granularity.ROW)
    hidden = low_rank.project(made, down)
    base = (real @ stored.t()).bfloat16()[None]
    return {
        "kind": "linear",
        "scales": str(granularity),
        "rank": rank,
        "merged_from_source": error(real @ cast(weight.float() + change.float()).t(), truth),
        "merged_from_fp8": error(real @ cast((stored + change).float()).t(), truth),
        "live": error(low_rank.add_(base, hidden, up)[0], truth),
        "branch_fp8_input": error(hidden.double() @ up.double().t(), thin),
        "branch_fp8_input_and_a": error(real @ (coarse.double() * scale.double()).t() @ up.double().t(), thin),
        "branch_bf16_input": error(low_rank.project(x, down).double() @ up.double().t(), thin),
    }


def with_merge(model: WanModel, lora: Lora) -> WanModel:
    """A copy in the model's type with the change in its weights, rounded once."""
    assert isinstance(lora.source, dict)
    changed = copy.deepcopy(model)
    for name in (f"blocks.{index}.{linear}" for index in range(len(model.blocks)) for linear in LINEARS):
        down, up = (lora.source[f"diffusion_model.{name}.lora_{part}.weight"].double() for part in "AB")
        weight = changed.get_submodule(name).weight
        weight.data = (weight.double() + lora.strength * up @ down).to(weight.dtype)  # type: ignore[union-attr, operator, arg-type]
    return changed


def latent_errors(layers: int, rank: int, steps: int, seeds: int) -> list[dict]:
    """One row a recipe: merged and live, on a CPU."""
    model = random_model(SPEC, layers, "cpu", torch.bfloat16)
    lora = random_lora(model, rank)
    exact, merged = with_merge(in_float64(model), lora), with_merge(model, lora)
    truth = [sample(exact, steps, seed, None)[0] for seed in range(seeds)]

    def mean_error(net: WanModel) -> float:
        errors = []
        for seed in range(seeds):
            net.begin_run()
            errors.append(error(sample(net, steps, seed, None)[0], truth[seed]))
        return statistics.mean(errors)

    rows = []
    for name in ("none", *GRANULARITIES):
        recipe = Recipe(name, backend="reference")
        row = {"kind": "latents", "recipe": name, "rank": rank, "layers": layers, "steps": steps, "seeds": seeds}
        row["merged"] = mean_error(apply_recipe(copy.deepcopy(merged), recipe))
        net = set_lora(apply_recipe(copy.deepcopy(model), recipe), lora)
        row["live"] = mean_error(net)
        row["without"] = mean_error(remove_lora(net))
        rows.append(row)
        console.print(row)
    return rows


def main(
    rank: Annotated[str, typer.Option(help="Ranks, with commas; the last one is that of the small model.")] = "16,64",
    layers: Annotated[int, typer.Option(help="Blocks of the small model; 0 leaves its rows out.")] = 4,
    steps: Annotated[int, typer.Option(help="UniPC steps.")] = 10,
    seeds: Annotated[int, typer.Option(help="Runs whose errors are averaged.")] = 1,
    device: Annotated[str, typer.Option(help="Of the linear rows: cuda or cpu; empty picks.")] = "",
    json: Annotated[str, typer.Option(help="Where to write the results file.")] = "",
) -> None:
    """Errors of LoRAs on FP8 weights, merged and live."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        rows = [linear_errors(kind, int(number), device) for kind in Granularity for number in rank.split(",")]
        latents = latent_errors(layers, int(rank.split(",")[-1]), steps, seeds) if layers else []
    for title, found in (("one linear", rows), ("latents", latents)):
        if not found:
            continue
        table = Table(title=title)
        for column in found[0]:
            table.add_column(column)
        for row in found:
            table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
        console.print(table)
    if json:
        common.write_results(json, rows + latents, device)


if __name__ == "__main__":
    typer.run(main)
