"""A pool of worker processes, proved and timed: start, the same numbers as one GPU, the pool's own cost, faults.

    python benchmarks/pool.py --gpus 0,1 --layers 4 --size 832x480 --json benchmarks/results/pool.json
    python benchmarks/pool.py --gpus cpu:2 --tiny

A random checkpoint of the real width is written to a temporary folder, the workers read it. Each row compares a layout
with the same model on the first GPU (relative error of the velocity), and times both (median of ``--runs`` forwards of
a guided batch). ``messages_s`` is a request with the same tensors that computes nothing.
Then a forward is cancelled, a worker is killed in a forward and another is stopped: the time until the error, what it
says, and the memory that is left on every GPU. Any failure ends the script with status 1.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from dit import latent_grid, model_inputs, random_model
from rich.console import Console
from torch import Tensor

sys.path.append(str(common.ROOT / "scripts"))

from make_tiny_checkpoint import make_tiny_checkpoint

import wan_fp8
from wan_fp8 import Recipe
from wan_fp8.errors import PoolError
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.specs import SPECS, ModelSpec
from wan_fp8.models.wan import build_model
from wan_fp8.parallel import pools
from wan_fp8.parallel.pools import PoolSpec
from wan_fp8.parallel.remote import Remote, RemoteWanModel, Topology
from wan_fp8.parallel.source import ModelSource

console = Console(width=160)
TOLERANCE = {"none": 2e-2, "rowwise": 4e-2, "DelayedScaling": 6e-2}
"""Relative error of a bf16 velocity: sums in another order, and single FP8 values that move by a step."""
Inputs = tuple[Tensor, Tensor, Tensor]
LEFT_MIB = 64
OPTIONS = ForwardOptions(text_key="the prompts")
"""Text keys and values are kept from forward to forward, as in a sampling run."""


def in_pool(
    source: ModelSource, shape: ModelSpec, spec: PoolSpec, recipe: Recipe, topology: Topology
) -> RemoteWanModel:
    with torch.device("meta"):
        model = build_model(shape, model_class=RemoteWanModel)
    model.compute_dtype_override = torch.bfloat16
    model.remote = Remote(shape, source, spec, topology, recipe)
    model.remote.say = lambda text: console.print(f"  {text}", style="dim")
    return model


def timed(run: Callable[[], Tensor], runs: int) -> tuple[Tensor, float]:
    """The first result, and the median seconds of the runs after it, host and device."""
    first, seconds = run(), []
    for _ in range(runs):
        began = time.perf_counter()
        run().cpu()
        seconds.append(time.perf_counter() - began)
    return first, statistics.median(seconds)


def free_memory(devices: tuple[str, ...]) -> list[int]:
    if devices[0] != "cpu":
        torch.cuda.empty_cache()
    return [torch.cuda.mem_get_info(name)[0] for name in devices if name != "cpu"]


class Checks:
    """What was asserted, printed as it goes."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, right: bool, what: str) -> None:
        console.print(("[green]ok[/]   " if right else "[red]WRONG[/] ") + what)
        self.failed += not right


def on_one(
    source: ModelSource, recipe: Recipe, device: str, grid: tuple[int, int, int], runs: int
) -> tuple[ModelSpec, Inputs, Tensor, float]:
    """Sizes, a guided batch, the first velocity of one GPU and its seconds; the model is gone afterwards."""
    with torch.inference_mode(False):
        model = wan_fp8.load_transformer(source.path, source.expert, device=device, recipe=recipe)
    model.compute_dtype_override = torch.bfloat16
    x, timestep, context = model_inputs(model.spec, grid, device, torch.bfloat16)
    inputs = (torch.cat([x] * 2), torch.cat([timestep] * 2), torch.cat([context, context.flip(1)]))
    velocity, seconds = timed(lambda: model(*inputs, options=OPTIONS), runs)
    return model.spec, inputs, velocity, seconds


def expect_error(model: RemoteWanModel, inputs: Inputs, act: Callable[[], None]) -> tuple[str, float]:
    """Start a forward, do something to the pool, and wait for the error and its time."""
    said: list[str] = []

    def body() -> None:
        try:
            with torch.inference_mode():
                for _ in range(200):
                    model(*inputs)
        except PoolError as error:
            said.append(str(error))

    thread = threading.Thread(target=body)
    thread.start()
    connection = model.remote.pool().connection
    while connection.busy_with != "forward":
        time.sleep(0.001)
    began = time.perf_counter()
    act()
    thread.join(60)
    return (said or ["no error"])[0], time.perf_counter() - began


def layouts(world: int, heads: int) -> list[tuple[str, Topology]]:
    rows = [("auto", Topology()), ("sharded", Topology(weights="shard"))]
    if heads % world == 0:
        rows.append((f"ulysses {world}", Topology(ulysses=world)))
    rows.append((f"ring {world}", Topology(ring=world)))
    if world % 2 == 0 and heads % (world // 2) == 0:
        rows.append((f"cfg 2 x ulysses {world // 2}", Topology(cfg=2, ulysses=world // 2)))
    return rows


def main(
    gpus: Annotated[str, typer.Option(help="Numbers with commas between, or cpu:N.")] = "0,1",
    model: str = "i2v-A14B",
    layers: int = 4,
    size: str = "832x480",
    frames: int = 81,
    runs: int = 5,
    tiny: Annotated[bool, typer.Option(help="A tiny checkpoint and video, for a CPU.")] = False,
    json: Path | None = None,
) -> None:
    devices = ("cpu",) * int(gpus[4:]) if gpus.startswith("cpu:") else tuple(f"cuda:{n}" for n in gpus.split(","))
    first, check, rows = devices[0], Checks(), []
    spec = PoolSpec(devices=devices, watchdog=10.0)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        if tiny:
            source = ModelSource.of(make_tiny_checkpoint(Path(folder) / "tiny", "t2v"), "high_noise")
            grid = (3, 8, 8)
        else:
            with torch.inference_mode(False):
                random = random_model(SPECS[model], layers, first, torch.bfloat16)
                path = wan_fp8.save_checkpoint(random, Path(folder) / "random.safetensors")
            width, height = (int(n) for n in size.split("x"))
            source, grid = ModelSource.of(path), latent_grid(SPECS[model], width, height, frames)
            del random
            torch.cuda.empty_cache() if first != "cpu" else None
        began = time.perf_counter()
        pool = pools.ensure(spec)
        start_s = time.perf_counter() - began
        console.print(f"pool of {pool.world} in {start_s:.1f} s")
        many = None
        for recipe in TOLERANCE:
            setting = Recipe(recipe, backend="reference" if first == "cpu" else "auto")
            shape, inputs, theirs, one_s = on_one(source, setting, first, grid, runs)
            for name, topology in layouts(len(devices), SPECS[model].num_heads if not tiny else 2):
                many = in_pool(source, shape, spec, setting, topology)
                began = time.perf_counter()
                many(*inputs)
                load_s = time.perf_counter() - began
                many.begin_run()
                ours, many_s = timed(lambda: many(*inputs, options=OPTIONS), runs)  # noqa: B023
                error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
                gib = [entry["memory"] / 2**30 for entry in pool.connection.ranks]
                row: dict[str, Any] = {
                    "model": source.label if tiny else model,
                    "layers": layers, "size": size, "frames": frames, "recipe": recipe, "world_size": pool.world,
                    "layout": name, "topology": str(many.remote.dims), "pool_start_s": start_s, "load_s": load_s,
                    "forward_s": many_s, "one_gpu_s": one_s, "speedup": one_s / many_s, "error": error,
                    "allocated_gib": gib,
                }  # fmt: skip
                rows.append(row)
                check(
                    error < TOLERANCE[recipe],
                    f"{recipe}, {name}: {many.remote.dims}; error {error:.2e}; {1000 * many_s:.1f} ms, one GPU "
                    f"{1000 * one_s:.1f} ms, x{one_s / many_s:.2f}; loaded in {load_s:.1f} s",
                )
                rows[-1]["messages_s"] = echo_seconds(many, inputs, runs)
                console.print(f"     messages alone {1000 * rows[-1]['messages_s']:.1f} ms")
                many.remote.drop()
        assert many is not None
        faults(many, inputs, spec, check)
    if json is not None:
        common.write_results(json, rows, first)
    sys.exit(check.failed > 0)


def echo_seconds(model: RemoteWanModel, inputs: Inputs, runs: int) -> float:
    """A request that carries the same tensors there and as much as a velocity back, and computes nothing."""
    connection = model.remote.pool().connection
    tensors = dict(zip(("x", "timestep", "context"), inputs, strict=True))
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        connection.request("echo", {"channels": model.spec.out_dim}, tensors, poll=lambda: None)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def faults(model: RemoteWanModel, inputs: Inputs, spec: PoolSpec, check: Checks) -> None:
    right = model(*inputs)
    pools.stop_pools()
    time.sleep(1.0)
    before = free_memory(spec.devices)
    model(*inputs)

    def cancel() -> None:
        if model.remote.pool().connection.busy_with == "forward":
            raise KeyboardInterrupt

    model.remote.poll, began = cancel, time.perf_counter()
    try:
        for _ in range(1000):
            model(*inputs)
        check(False, "a forward could not be cancelled")
    except KeyboardInterrupt:
        check(time.perf_counter() - began < 60, "a forward is cancelled")
    model.remote.poll = lambda: None
    model.begin_run()
    check(torch.equal(model(*inputs), right), "after it, the same pool gives the same bits")
    for sign, rank in ((signal.SIGKILL, len(spec.devices) - 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)):
        pids = model.remote.pool().pids
        said, seconds = expect_error(model, inputs, lambda: os.kill(pids[rank], sign))  # noqa: B023
        console.print(f"  {said.splitlines()[0]}", style="dim")
        check(f"rank {rank} " in said and seconds < 20, f"{sign.name} of rank {rank}: named after {seconds:.1f} s")
        gone = not any(Path(f"/proc/{pid}").exists() for pid in pids)
        check(gone, "no process is left")
        settle = time.monotonic() + 10
        while time.monotonic() < settle and any(
            b - a > LEFT_MIB * 2**20 for a, b in zip(free_memory(spec.devices), before, strict=True)
        ):
            time.sleep(0.2)
        left = [round((b - a) / 2**20) for a, b in zip(free_memory(spec.devices), before, strict=True)]
        check(all(mib < LEFT_MIB for mib in left), f"GPU memory left behind: {left} MiB")
        check(torch.equal(model(*inputs), right), "the next forward starts a pool and gives the same bits")
    check(pools.stop_pools() == 1, "the pool is stopped")


if __name__ == "__main__":
    typer.run(main)
