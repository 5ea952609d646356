"""Each fused kernel in TB/s against the copy bandwidth of the same run; each attention backend in TFLOP/s and error
against fp64.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json

Shapes are those of I2V-A14B at 1280x720, 81 frames: 75,600 tokens, width 5120, 40 heads of 128.
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

from wan_fp8.attention import ATTENTION, AttentionCore
from wan_fp8.attention.core import register_backends
from wan_fp8.attention.guard import measure_error, sampled_share
from wan_fp8.kernels import attention_cast, low_rank, parts, quantize, residual_norm, rms_rope
from wan_fp8.kernels.residual_norm import NormTable
from wan_fp8.models import functional as wan

GRID = (21, 45, 80)
TOKENS, DIM, HEADS, FFN = 21 * 45 * 80, 5120, 40, 13824
HALF = torch.bfloat16
console = Console(width=140)


def random(*shape: int, seed: int, dtype: torch.dtype = HALF) -> Tensor:
    """Normal values from a generator of their own (streams of one seed would overlap)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def copy_bandwidth() -> float:
    """TB/s of a device-to-device copy, bytes read and written."""
    source = torch.empty(2**28, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(common.milliseconds(lambda: target.copy_(source), "cuda")) / 1e9


def casts() -> dict[str, quantize.Cast]:
    """Each kind of scales; the one for the tensor from before, its maximum collected on the way."""
    multiplier, amax = torch.full((1,), 50.0, device="cuda"), torch.zeros(1, device="cuda")
    tensor = quantize.Cast(quantize.Granularity.TENSOR, multiplier=multiplier, dequant=1 / multiplier, amax=amax)
    return {
        "row": quantize.Cast(quantize.Granularity.ROW),
        "tensor": tensor,
        "block": quantize.Cast(quantize.Granularity.BLOCK, power_of_2=True),
    }


def fused_kernels(bandwidth: float) -> list[dict]:
    """One row a kernel and stream type: ms, TB/s, share of the copy bandwidth, and ms of its eager reference."""
    rows = []
    one = TOKENS * DIM
    table = random(1, 6, DIM, seed=2, dtype=torch.float32)
    modulated = NormTable(table[:, 1], table[:, 0], modulated=True)

    def row(name: str, fused, eager, bytes_moved: int) -> None:
        ms = common.median_ms(fused, "cuda", repeats=20)
        rate = bytes_moved / ms / 1e9
        rows.append({
            "kernel": name, "tokens": TOKENS, "ms": round(ms, 3), "tb_per_s": round(rate, 2),
            "of_copy_bandwidth": round(rate / bandwidth, 3), "eager_ms": round(common.median_ms(eager, "cuda"), 2),
        })  # fmt: skip

    for stream in (torch.float32, HALF):
        x, branch = random(1, TOKENS, DIM, seed=0, dtype=stream), random(1, TOKENS, DIM, seed=1)
        size = x.element_size()
        kinds = {
            "LayerNorm + modulate": (None, None, modulated, size + 2),
            "gated residual": (branch, table[:, 2], None, 2 * size + 2),
            "gated residual + LayerNorm + modulate": (branch, table[:, 2], modulated, 2 * size + 4),
        }
        for name, (added, gate, norm, per_value) in kinds.items():
            arguments = (x, added, gate, norm, None)
            options = {"eps": 1e-6, "out_dtype": HALF, "in_place": True}
            row(
                f"{name}, {str(stream).removeprefix('torch.')} stream",
                lambda a=arguments, o=options: residual_norm.fused(*a, **o),
                lambda a=arguments, o=options: residual_norm.eager(*a, **o),
                per_value * one,
            )
            if norm is None or added is None:
                continue
            for kind, cast in casts().items():
                given = options | {"cast": cast}
                row(
                    f"{name} -> e4m3 by {kind}, {str(stream).removeprefix('torch.')} stream",
                    lambda a=arguments, o=given: residual_norm.fused(*a, **o),
                    lambda a=arguments, o=given: residual_norm.eager(*a, **o),
                    (per_value - 1) * one,
                )
    hidden, y = random(1, TOKENS, FFN, seed=15), random(1, TOKENS, DIM, seed=16)
    for what, values, gelu in (("attention output", y, False), ("GELU of the FFN's hidden layer", hidden, True)):
        for kind, cast in casts().items():
            row(
                f"{what} -> e4m3 by {kind}",
                lambda v=values, c=cast, g=gelu: quantize.quantize(v, c, gelu=g, fused=True),
                lambda v=values, c=cast, g=gelu: quantize.quantize(v, c, gelu=g, fused=False),
                3 * values.numel(),
            )
    del hidden, y
    q, gain = random(1, TOKENS, DIM, seed=3), random(DIM, seed=4)
    rope = tuple(t.cuda() for t in wan.rope_table(wan.grid_positions(GRID), 128, torch.float32))
    for name, turn in (("RMSNorm + RoPE", rope), ("RMSNorm", None)):
        row(
            name,
            lambda t=turn: rms_rope.fused_(q, gain, t, head_dim=128, eps=1e-6),
            lambda t=turn: rms_rope.eager(q, gain, t, head_dim=128, eps=1e-6),
            4 * one,
        )
    for name, move, given in (
        ("heads to 2 ranks", parts.cut, (q, 2)),
        ("heads back from 2 ranks", parts.join, (q.view(1, 2, TOKENS, DIM // 2),)),
    ):
        row(
            name,
            lambda m=move, g=given: m(*g, head_dim=128, fused=True),
            lambda m=move, g=given: m(*g, head_dim=128, fused=False),
            2 * one,
        )
    qkv = [random(1, TOKENS, HEADS, 128, seed=5 + i) for i in range(3)]
    row(
        "q, k, v to FP8: means, scales, casts",
        lambda: attention_cast.fused(*qkv),
        lambda: attention_cast.eager(*qkv),
        int((2 * (2 + 2 + 1) + 2 + 2 / 16 + 1) * one),
    )
    mean = random(1, HEADS, 128, seed=9, dtype=torch.float32)
    out = qkv[0]
    row(
        "mean of V added back",
        lambda: attention_cast.add_mean_(out, mean, use_triton=True),
        lambda: attention_cast.add_mean_(out, mean, use_triton=False),
        4 * one,
    )
    rank = 64
    for dim in (DIM, FFN):
        given = random(1, TOKENS, dim, seed=13)
        down, up = random(rank, dim, seed=14) / dim**0.5, random(dim, rank, seed=15) / rank**0.5
        for kind, how in casts().items():
            cast = quantize.quantize(given, how)
            row(
                f"LoRA of rank {rank}, A on e4m3 of {dim} by {kind}",
                lambda c=cast, d=down: low_rank.project(c, d, fused=True),
                lambda c=cast, d=down: low_rank.project(c, d, fused=False),
                TOKENS * (dim + 2 * rank),
            )
        hidden = low_rank.project(cast, down)
        row(
            f"LoRA of rank {rank}, B added to {dim} in place",  # its eager reference is cuBLAS, in place too
            lambda y=given, h=hidden, u=up: low_rank.add_(y, h, u, fused=True),
            lambda y=given, h=hidden, u=up: low_rank.add_(y, h, u, fused=False),
            TOKENS * (4 * dim + 2 * rank),
        )
        del given, cast, hidden
    x, weight, bias = random(TOKENS, DIM, seed=10), random(FFN, DIM, seed=11) / 70, random(FFN, seed=12)
    rows.append({
        "kernel": "FFN's first GEMM with GELU in its epilogue", "tokens": TOKENS,
        "ms": round(common.median_ms(lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True), "cuda"), 2),
        "eager_ms": round(common.median_ms(lambda: F.gelu(F.linear(x, weight, bias), approximate="tanh"), "cuda"), 2),
        "gemm_alone_ms": round(common.median_ms(lambda: F.linear(x, weight, bias), "cuda"), 2),
    })  # fmt: skip
    return rows


def guard_look() -> dict:
    """What the guard takes for a block that it looks at, waiting for the GPU included; eager, so no rate."""
    q, k, v, out = (random(1, TOKENS, HEADS, 128, seed=30 + i) for i in range(4))
    ms = common.median_ms(lambda: measure_error(out, q, k, v), "cuda", repeats=5)
    share = sampled_share(TOKENS, HEADS)
    return {"kernel": "the guard's look", "tokens": TOKENS, "ms": round(ms, 3), "of_products": round(share, 6)}


def attention_backends() -> list[dict]:
    """One row a backend: ms and TFLOP/s at full size, error against fp64 on sampled queries, with and without a mean
    in V."""
    register_backends()
    rows = []
    q, k, v = (random(1, TOKENS, HEADS, 128, seed=20 + i) for i in range(3))
    flops = 4 * TOKENS * TOKENS * DIM
    for name in ATTENTION.names[1:]:
        if name.startswith("reference"):
            continue
        backend = ATTENTION.backend(name)
        reason = backend.refuse(AttentionCore.request(q, k))
        if reason is not None:
            rows.append({"attention": name, "refused": reason})
            continue
        ms = common.median_ms(lambda run=backend.run: run(q, k, v), "cuda", repeats=3, warmup=1)
        row = {"attention": name, "tokens": TOKENS, "ms": round(ms, 1), "tflop_per_s": round(flops / ms / 1e9)}
        for label, mean in (("error", 0.0), ("error_v_mean_half", 0.5)):
            shifted = v[:, :, :2] + mean
            out = backend.run(q[:, :, :2].contiguous(), k[:, :, :2].contiguous(), shifted)[:, ::1200]
            exact = ATTENTION.backend("reference").run(
                q[:, ::1200, :2].double(), k[:, :, :2].double(), shifted.double()
            )
            row[label] = round(float((out.double() - exact).norm() / exact.norm()), 5)
        rows.append(row)
        console.print(row)
    return rows


def main(json: Annotated[str, typer.Option(help="Where to write the results file.")] = "") -> None:
    """Time every fused kernel and attention backend at 75,600 tokens."""
    with torch.inference_mode():
        bandwidth = copy_bandwidth()
        rows = [{"kernel": "copy", "tb_per_s": round(bandwidth, 2)}, *fused_kernels(bandwidth), guard_look()]
        rows += attention_backends()
    table = Table(title=f"{TOKENS:,} tokens; copy {bandwidth:.2f} TB/s")
    columns = ("name", "ms", "TB/s", "of copy", "eager ms", "TFLOP/s", "error", "refused")
    keys = ("ms", "tb_per_s", "of_copy_bandwidth", "eager_ms", "tflop_per_s", "error", "refused")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(row.get("kernel") or row["attention"], *(str(row.get(key, "")) for key in keys))
    console.print(table)
    if json:
        common.write_results(json, rows, "cuda")


if __name__ == "__main__":
    typer.run(main)
