"""Every FP8 recipe on every backend, for each GEMM shape of a Wan2.2 A14B block: time, rate and error.

    python benchmarks/linear.py --json benchmarks/results/linear.json

``cast_ms`` is the cast of a bf16 input alone, ``gemm_ms`` the product of operands that are cast already, ``ms`` both
in a row, bias included. ``error`` is relative L2 against fp64 products of the real operands on sampled rows,
``worst_token`` the largest of a row; ``error_dequantised`` against fp64 products of what the bytes stand for.
"""

from __future__ import annotations

from typing import Annotated

import common
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wan_fp8.gemm import GEMM, GemmRequest, GemmRunner, register_backends, token_multiple
from wan_fp8.hardware import device_caps
from wan_fp8.kernels.quantize import (
    Cast,
    Granularity,
    QuantizedActivation,
    collect_amax,
    current_multiplier,
    quantize,
    quantize_current,
    quantize_weight,
    spread_scale,
)
from wan_fp8.quant.recipe import GRANULARITIES

SHAPES = {"attention q, k, v, o": (5120, 5120), "ffn.0": (5120, 13824), "ffn.2": (13824, 5120)}
SAMPLED_ROWS = 512
console = Console(width=170)


def caster(name: str, run: GemmRunner, x: Tensor):
    """The cast of ``x`` under a recipe, as a linear does it; DelayedScaling with a scale that fits."""
    granularity = GRANULARITIES[name]
    if name == "DelayedScaling":
        multiplier = current_multiplier(collect_amax(x))
        cast = Cast(granularity, False, multiplier, 1 / multiplier, torch.zeros(1, device=x.device))
        return lambda: quantize(x, cast) if run.quantize is None else run.quantize(x, cast, False)
    cast = Cast(granularity, power_of_2=granularity is Granularity.BLOCK)
    if run.quantize is not None:
        return lambda: run.quantize(x, cast, False)
    return (lambda: quantize_current(x)) if granularity is Granularity.TENSOR else (lambda: quantize(x, cast))


def errors(
    made: QuantizedActivation, x: Tensor, weight: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor, y: Tensor
) -> dict[str, float]:
    """Against fp64 on rows spread over the tokens."""
    tokens = x.shape[1]
    rows = torch.linspace(0, tokens - 1, min(SAMPLED_ROWS, tokens), device=x.device).long()
    plain = y[0, rows].double() - bias.double()
    exact = x[0, rows].double() @ weight.double().t()
    scales = made.scale
    if made.granularity in (Granularity.ROW, Granularity.MX):
        scales = scales[rows]
    elif made.granularity is Granularity.BLOCK:
        scales = scales[:, rows]
    part = QuantizedActivation(made.qdata[0, rows], scales, made.granularity, made.dtype)
    real = qweight.double() * spread_scale(scale, weight.shape).double()
    dequantised = part.dequantized(torch.float64) @ real.t() + bias.double()
    return {
        "error": float((plain - exact).norm() / exact.norm()),
        "worst_token": float(((plain - exact).norm(dim=1) / exact.norm(dim=1)).max()),
        "error_dequantised": float((y[0, rows].double() - dequantised).norm() / dequantised.norm()),
    }


def measure(tokens: int, device: str) -> list[dict]:
    """One row for bf16 and for each recipe, backend and shape."""
    register_backends()
    rows = []
    for what, (k, n) in SHAPES.items():
        generators = [torch.Generator(device).manual_seed(seed) for seed in (1, 2)]
        padded = -(-tokens // 128) * 128
        x = torch.randn(1, padded, k, device=device, generator=generators[0], dtype=torch.bfloat16)
        weight = (0.02 * torch.randn(n, k, device=device, generator=generators[1])).bfloat16()
        bias = torch.randn(n, device=device, generator=generators[1]).bfloat16()
        flops = 2 * tokens * k * n

        def row(recipe: str, backend: str, flops: int = flops, what: str = what, **values: float | str) -> None:
            total = values.get("gemm_ms")
            rate = {"tflops": round(flops / total / 1e9, 1)} if isinstance(total, float) else {}
            rounded = {name: round(v, 5) if isinstance(v, float) else v for name, v in values.items()}
            rows.append({"layer": what, "tokens": tokens, "recipe": recipe, "backend": backend, **rounded, **rate})

        real = x[:, :tokens]
        row("none", "bf16", gemm_ms=common.median_ms(lambda x=real, w=weight, b=bias: F.linear(x, w, b), device))
        for name, granularity in GRANULARITIES.items():
            qweight, scale = quantize_weight(weight, granularity, power_of_2=granularity is Granularity.BLOCK)
            for backend in GEMM.names[1:]:
                if backend in ("reference", "weight-only"):  # neither multiplies in FP8
                    continue
                chosen = GEMM.backend(backend)
                reason = chosen.refuse(GemmRequest(device_caps(device), granularity, torch.bfloat16))
                if reason is not None:
                    row(name, backend, refused=reason)
                    continue
                run = chosen.run
                multiple = token_multiple(run, granularity)
                given = x[:, : -(-tokens // multiple) * multiple].contiguous()
                cast = caster(name, run, given)
                made = cast()
                y = run(made, qweight, scale, bias)
                row(
                    name,
                    backend,
                    cast_ms=common.median_ms(cast, device),
                    gemm_ms=common.median_ms(lambda r=run, m=made, w=qweight, s=scale, b=bias: r(m, w, s, b), device),
                    ms=common.median_ms(lambda r=run, c=cast, w=qweight, s=scale, b=bias: r(c(), w, s, b), device),
                    **errors(made, given, weight, qweight, scale, bias, y),
                )
    return rows


def main(
    tokens: Annotated[int, typer.Option(help="Video tokens; 75,600 is 1280x720, 81 frames.")] = 75_600,
    device: Annotated[str, typer.Option(help="cuda, or cpu to see the refusals.")] = "cuda",
    json: Annotated[str, typer.Option(help="Where to write the results file.")] = "",
) -> None:
    """Time and check FP8 linears of every recipe and backend."""
    with torch.inference_mode():
        rows = measure(tokens, device)
    table = Table(title=f"{tokens:,} tokens")
    names = ("layer", "recipe", "backend", "cast_ms", "gemm_ms", "ms", "tflops", "error", "worst_token")
    for column in (*names, "error_dequantised"):
        table.add_column(column)
    for line in rows:
        shown = [str(line.get(column, "")) for column in (*names, "error_dequantised")]
        table.add_row(*shown)
        if "refused" in line:
            console.print(f"{line['recipe']} on {line['backend']}: {line['refused']}")
    console.print(table)
    if json:
        common.write_results(json, rows, device)


if __name__ == "__main__":
    typer.run(main)
