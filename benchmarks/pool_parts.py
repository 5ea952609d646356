"""VAE and text encoder in a pool: the same numbers as on one GPU, and what a video takes.

    python benchmarks/pool_parts.py --gpus 0,1 --json benchmarks/results/pool_parts.json
    python benchmarks/pool_parts.py --gpus cpu:2 --tiny

VAEs of both designs in the published widths with random weights are written to a temporary folder; the workers read
them. Seconds are the
median of ``--runs`` whole calls, latents and pixels on the way included (``one_gpu_s``: without a pool, result on the
host as well). ``peak_gib`` is that of the one GPU. Text rows of a tiny encoder must be the same bits on one GPU, in the
pool's first process and sharded over all. Any difference ends the script with status 1.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from headline import fill_randomly
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

sys.path.append(str(common.ROOT / "scripts"))

from make_tiny_checkpoint import make_tiny_checkpoint

from wan_fp8.models.text_encoder import load_text_encoder
from wan_fp8.models.vae import VAESpec, WanVAE
from wan_fp8.models.vae22 import DESIGNS, LOADERS, VAE22Spec, Wan22VAE
from wan_fp8.parallel import pools
from wan_fp8.parallel.parts import RemoteTextEncoder, RemoteVAE
from wan_fp8.parallel.pools import PoolSpec
from wan_fp8.parallel.source import TextSource, VAESource
from wan_fp8.parallel.vae import SplitVAE

console = Console(width=160)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Relative: kernels that sum in another order, through thirty layers, rounded to the type after each (fp32 on a GPU: to
TF32 in the convolutions, torch's default)."""


def timed(run: Callable[[], Tensor], runs: int) -> tuple[Tensor, float]:
    """The result on the host, and the median seconds of ``runs`` calls after the first."""
    result, seconds = run().cpu(), []
    for _ in range(runs):
        began = time.perf_counter()
        run().cpu()
        seconds.append(time.perf_counter() - began)
    return result, statistics.median(seconds)


def on_one(
    path: Path, version: str, dtype: torch.dtype, what: str, given: Tensor, device: str, runs: int
) -> tuple[Tensor, float, float | None]:
    """Result, seconds and peak GiB of one GPU; the VAE is gone afterwards."""
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    one = SplitVAE(LOADERS[version](path, dtype, device))
    theirs, seconds = timed(lambda: getattr(one, what)(given.to(device)), runs)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device != "cpu" else None
    return theirs, seconds, peak


def main(
    gpus: Annotated[str, typer.Option(help="Numbers with commas between, or cpu:N.")] = "0,1",
    size: str = "1280x720",
    designs: Annotated[str, typer.Option(help="Of the VAEs: 2.1, 2.2, or both with a comma.")] = "2.1,2.2",
    frames: int = 81,
    runs: int = 3,
    tiny: Annotated[bool, typer.Option(help="A narrow VAE and a small video, for a CPU.")] = False,
    json: Path | None = None,
) -> None:
    devices = ("cpu",) * int(gpus[4:]) if gpus.startswith("cpu:") else tuple(f"cuda:{n}" for n in gpus.split(","))
    first, spec, rows, failed = devices[0], PoolSpec(devices=devices), [], 0
    width, height = (64, 48) if tiny else map(int, size.split("x"))
    frames = 9 if tiny else frames
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for version in designs.split(","):
            path, design = Path(folder) / f"Wan{version}_VAE.safetensors", DESIGNS[version]
            with torch.device("meta"):
                if version == "2.1":
                    vae: WanVAE | Wan22VAE = WanVAE(VAESpec(dim=8 if tiny else 96))
                else:
                    vae = Wan22VAE(VAE22Spec(encoder_dim=8 if tiny else 160, decoder_dim=8 if tiny else 256))
            fill_randomly(vae, first, torch.float32)
            save_file({name: value.cpu().contiguous() for name, value in vae.state_dict().items()}, path)
            del vae
            shape = (1, design.channels, (frames - 1) // 4 + 1, height // design.stride, width // design.stride)
            latents = torch.randn(shape, generator=generator)
            for dtype in (torch.bfloat16, torch.float32):
                for what, given in (("decode", latents.to(dtype)), ("encode", video.to(dtype))):
                    theirs, one_s, peak = on_one(path, version, dtype, what, given, first, runs)
                    if first != "cpu":
                        torch.cuda.empty_cache()
                    many = RemoteVAE(VAESource.of(path, dtype, version), spec)
                    ours, many_s = timed(lambda: getattr(many, what)(given), runs)  # noqa: B023
                    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
                    row: dict[str, Any] = {
                        "part": f"vae {version}", "what": what, "size": f"{width}x{height}", "frames": frames,
                        "dtype": str(dtype)[6:], "world_size": len(devices), "seconds": many_s, "one_gpu_s": one_s,
                        "speedup": one_s / many_s, "peak_gib": peak, "error": error,
                        "bytes": ours.numel() * ours.element_size(),
                    }  # fmt: skip
                    rows.append(row)
                    right = error < TOLERANCE[dtype]
                    failed += not right
                    console.print(
                        f"{'ok   ' if right else 'WRONG'} {version} {what} {row['size']}x{frames} {row['dtype']}: "
                        f"{many_s:.3f} s on {len(devices)}, one GPU {one_s:.3f} s, x{one_s / many_s:.2f}; error "
                        f"{error:.1e}"
                    )
        checkpoint = make_tiny_checkpoint(Path(folder) / "tiny", "t2v")
        torch.set_num_threads(1)  # as a worker on a CPU
        here = load_text_encoder(checkpoint, device=first)
        for sharded in (False, True):
            there = RemoteTextEncoder(TextSource.of(checkpoint), spec, sharded=sharded)
            lines, _ = there.encode_prompt("a fox in the snow")
            same = torch.equal(lines, here.encode_prompt("a fox in the snow").cpu())
            failed += not same
            where = "sharded" if sharded else "on the first rank"
            console.print(f"{'ok   ' if same else 'WRONG'} text rows, {where}: the same bits")
            rows.append({"part": f"text encoder, {where}", "world_size": len(devices), "same_bits": same})
    pools.stop_pools()
    if json is not None:
        common.write_results(json, rows, first)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    typer.run(main)
