"""Memory: both A14B experts resident, loading from disk to FP8, switching experts, and cards of 24 and 16 GB.

    COMFYUI_DIR=~/ComfyUI python benchmarks/memory.py --attention fa3 --json benchmarks/results/memory_h100.json

``weights``: bytes of both experts on the GPU (bar: 31 GB), and the peak of one step at 832x480 and 1280x720, 81 frames.
``load``: a bf16 expert in one file, from disk to FP8 on the GPU, in a process of its own: peak of the GPU against the
FP8 model (bar: 1.2), and growth of anonymous host memory, mapped file pages not counted (bar: one shard, 1 GiB). Once
by ``load_transformer``, once as the nodes do it, where the FP8 weights rest in host memory.
``switch``: what the change of experts adds to the pause between two forwards when both are resident (bar: 50 ms).
``cards``: core's own memory management on a GPU that it and torch's allocator take for one of 24 or 16 GB: T2V-A14B,
832x480, 81 frames, both experts, guidance. Measured: a few steps of each expert, the load before the first and between
the two. Extrapolated: 40 steps = both loads + 40 times a steady step, against 40 times a steady step with both experts
resident on the whole GPU (bars: 1.10 and 1.25). The few steps themselves are in the row too. Streamed weights cross
this machine's bus, which may be faster than a small card's: ``streamed_gib`` / ``steady_step_s`` tells what is needed.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import common
import hosted
import load
import torch
import typer
from hosted import GIB
from rich.console import Console

from wan_fp8.models.specs import T2V_A14B

TINY = dataclasses.replace(T2V_A14B, dim=128, ffn_dim=256, num_heads=1, num_layers=4)
PARTS = ("weights", "load", "switch", "cards")
CARDS = {"24 GB": (23.5, 1.10), "16 GB": (15.5, 1.25)}
"""GiB that CUDA reports on such cards, rounded down, and the bar."""
STEPS = 40
console = Console(width=150)


# ---- runs in ComfyUI -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class Run:
    """Seconds of one sampling run."""

    load_s: float
    """Before the first step."""
    steps_s: list[float]
    switch_step: int
    """Index of the second expert's first step."""
    pauses_ms: list[float]
    """Between forwards of one expert."""
    switch_ms: float
    """Between the last forward of the first expert and the first of the second."""
    peak_gib: float | None
    """Of tensors, and ``reserved_gib`` of the segments that they lie in."""
    reserved_gib: float | None
    left: dict[str, float]
    """What of the second expert stayed in host memory."""

    @property
    def steady_step_s(self) -> float:
        """Mean of each expert's steps after its first."""
        first = (0, self.switch_step)
        return statistics.mean(s for index, s in enumerate(self.steps_s) if index not in first)

    @property
    def loads_s(self) -> float:
        """What bringing both experts took."""
        return self.load_s + max(0.0, self.steps_s[self.switch_step] - self.steady_step_s)


def sample(models: list[Any], size: str, frames: int, steps_each: int, cfg: float, device: str) -> Run:
    """One run over both experts, ``steps_each`` steps of each."""
    import comfy.samplers

    bridge = hosted.module("nodes.bridge")
    width, height = (int(n) // 8 for n in size.split("x"))
    generator = torch.Generator().manual_seed(1)
    marks: list[float] = []
    forwards: list[tuple[int, float, float]] = []
    left: dict[str, float] = {}

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def euler(model: Any, x: Any, sigmas: Any, extra_args: Any = None, **_: Any) -> Any:
        marks.append(now())
        for index in range(len(sigmas) - 1):
            clean = model(x, sigmas[index] * x.new_ones([x.shape[0]]), **(extra_args or {}))
            x = x + (x - clean) / sigmas[index] * (sigmas[index + 1] - sigmas[index])
            marks.append(now())
        left.update(hosted.offloaded(models[1]))
        return x

    hooks = []
    for index, model in enumerate(models):
        net = model.model.diffusion_model
        hooks.append(net.register_forward_pre_hook(lambda *_, i=index: forwards.append((i, now(), 0.0))))
        hooks.append(net.register_forward_hook(lambda *_: forwards.append((*forwards.pop()[:2], now()))))
    rows = [torch.randn(1, 512, 4096, generator=generator) for _ in range(2)]
    latent = {"samples": torch.zeros(1, 16, (frames - 1) // 4 + 1, height, width)}
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    began = now()
    try:
        bridge.run_stages(
            [bridge.Stage(model=models[0], cfg=cfg), bridge.Stage(model=models[1], cfg=cfg, first_step=steps_each)],
            positive=[[rows[0], {}]],
            negative=[[rows[1], {}]],
            latent=latent,
            sigmas=torch.linspace(1, 0, 2 * steps_each + 1),
            sampler=comfy.samplers.KSAMPLER(euler),
            seed=7,
        )
    finally:
        for hook in hooks:
            hook.remove()
    pairs = list(itertools.pairwise(forwards))
    return Run(
        load_s=marks[0] - began,
        steps_s=[later - earlier for earlier, later in itertools.pairwise(marks)],
        switch_step=steps_each,
        pauses_ms=[1000 * (b[1] - a[2]) for a, b in pairs if a[0] == b[0]],
        switch_ms=next(1000 * (b[1] - a[2]) for a, b in pairs if a[0] != b[0]),
        peak_gib=allocator_gib(device).get("peak_gib"),
        reserved_gib=allocator_gib(device).get("reserved_gib"),
        left=left,
    )


def unload(device: str) -> None:
    """Let core evict everything."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def hosted_rows(
    parts: list[str], device: str, tiny: bool, attention: str, recipe_name: str
) -> Iterator[dict[str, Any]]:
    """Everything that runs both experts inside ComfyUI, each row when it is measured."""
    hosted.import_core(device)
    quant, bridge = hosted.module("wan_fp8.quant"), hosted.module("nodes.bridge")
    specs = hosted.module("wan_fp8.models.specs")
    source = TINY if tiny else T2V_A14B
    spec = specs.ModelSpec(
        **{f.name: getattr(source, f.name) for f in dataclasses.fields(source)} | {"task": specs.Task.T2V}
    )
    recipe = quant.Recipe(recipe_name, backend="reference" if device == "cpu" else "auto")
    began = time.perf_counter()
    experts = ("high_noise", "low_noise")
    models = [hosted.random_expert(spec, recipe, expert, seed) for seed, expert in enumerate(experts)]
    chosen = hosted.module("wan_fp8.attention").Attention(attention)
    models = [bridge.with_settings(model, attention=chosen) for model in models]
    console.print(f"two experts made in {time.perf_counter() - began:.1f} s")
    traffic = hosted.Traffic(models)
    size, frames, steps = ("64x64", 5, 2) if tiny else ("832x480", 81, 2)
    common_row = {"model": "t2v-A14B", "frames": frames, "recipe": recipe_name, "attention": attention}
    sample(models, size, frames, 1, 3.5, device)  # kernels are compiled here
    resident = sample(models, size, frames, steps, 3.5, device)
    yield weights_row(models, device, size, resident, common_row)
    if "weights" in parts and not tiny:
        large = sample(models, "1280x720", frames, 1, 1.0, device)
        yield weights_row(models, device, "1280x720", large, common_row)
    if "switch" in parts:
        yield switch_row(resident, size, common_row)
    if "cards" in parts:
        for name, (gib, bar) in CARDS.items():
            unload(device)
            traffic.loaded = traffic.copied_back = 0
            asked = {"part": "cards", **common_row, "size": size, "card": name, "limit_gib": gib, "bar": bar}
            try:
                with hosted.card(gib, device, models):
                    run = sample(models, size, frames, steps, 3.5, device)
                    moved = {
                        "moved_to_gpu_gib": round(traffic.loaded / GIB, 3),
                        "copied_back_gib": round(traffic.copied_back / GIB, 3),
                    }
                    # a run that finds the GPU as the first one left it: what a user's second prompt does
                    second = sample(models, size, frames, steps, 3.5, device)
            except Exception as error:  # it becomes a row, and the script's status; the other cards still run
                console.print_exception()
                failure = f"{type(error).__name__}: {error}", error.__cause__ and f"{error.__cause__}"
                yield {**asked, "failed": failure[0], "because": failure[1], **allocator_gib(device), "within": False}
                continue
            yield card_row(asked, run, second, resident, moved)
    unload(device)


def allocator_gib(device: str) -> dict[str, float]:
    """The most that PyTorch's allocator had out, and held, since the last run began."""
    if device == "cpu":
        return {}
    kinds = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    return {name: round(value / GIB, 2) for name, value in kinds.items()}


def weights_row(models: list[Any], device: str, size: str, run: Run, more: dict[str, Any]) -> dict[str, Any]:
    """Bytes of both experts, and the peak of a run with both resident."""
    parameters = [p for model in models for p in model.model.diffusion_model.parameters()]
    weights = sum(p.nbytes for p in parameters)
    there = all(p.device.type == torch.device(device).type for p in parameters)
    return {
        "part": "weights",
        **more,
        "size": size,
        "weights_gb": round(weights / 1e9, 3),
        "weights_gib": round(weights / GIB, 3),
        "both_resident": there,
        "peak_gib": run.peak_gib,
        "step_s": round(run.steady_step_s, 3) if len(run.steps_s) > 2 else None,
        "bar_gb": 31,
        "within": there and weights <= 31e9,
    }


def switch_row(run: Run, size: str, more: dict[str, Any]) -> dict[str, Any]:
    """What the change of experts costs when both are resident."""
    usual = statistics.median(run.pauses_ms)
    added = run.switch_ms - usual
    return {
        "part": "switch",
        **more,
        "size": size,
        "pause_ms": round(usual, 2),
        "pause_at_the_switch_ms": round(run.switch_ms, 2),
        "switch_ms": round(added, 2),
        "bar_ms": 50,
        "within": added < 50,
    }


def card_row(asked: dict[str, Any], run: Run, second: Run, resident: Run, moved: dict[str, float]) -> dict[str, Any]:
    """An emulated card against the whole one; the worse of two runs counts."""
    ratios = [(r.loads_s + STEPS * r.steady_step_s) / (STEPS * resident.steady_step_s) for r in (run, second)]
    gib, bar = asked["limit_gib"], asked["bar"]
    return {
        **asked,
        "peak_gib": run.peak_gib,
        "reserved_gib": run.reserved_gib,
        "load_s": round(run.load_s, 3),
        "steps_s": [round(s, 3) for s in run.steps_s],
        "steady_step_s": round(run.steady_step_s, 3),
        "resident_step_s": round(resident.steady_step_s, 3),
        "loads_s": round(run.loads_s, 3),
        **moved,
        **run.left,
        "second_run": {
            "load_s": round(second.load_s, 3),
            "steps_s": [round(s, 3) for s in second.steps_s],
            "loads_s": round(second.loads_s, 3),
            **second.left,
        },
        "measured_ratio": round((run.load_s + sum(run.steps_s)) / sum(resident.steps_s), 4),
        "ratio_40_steps": round(ratios[0], 4),
        "ratio_40_steps_second_run": round(ratios[1], 4),
        "within": max(ratios) <= bar and (run.peak_gib is None or run.peak_gib <= gib),
    }


# ---- from disk to FP8 ----------------------------------------------------------------------------------------------


class Anonymous:
    """Watches this process's anonymous memory: what it has beside mapped files."""

    def __init__(self) -> None:
        self.peak = self.start = self.now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise SystemExit("anonymous memory is read from /proc/self/status, which this system has not")

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> Anonymous:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())


def measure_load(source: Path, route: str, device: str, recipe_name: str) -> dict[str, Any]:
    """Load one file in this process, by the engine or as the nodes do."""
    cuda = device != "cpu"
    backend = "auto" if cuda else "reference"
    if route == "nodes":
        hosted.import_core(device)
        loader, bridge = hosted.module("wan_fp8.checkpoint.load"), hosted.module("nodes.bridge")
        recipe: Any = hosted.module("wan_fp8.quant").Recipe(recipe_name, backend=backend)
    else:
        from wan_fp8 import Recipe, load_transformer

        recipe = Recipe(recipe_name, backend=backend)
    if cuda:
        torch.ones(1 << 20, device=device).to(torch.float8_e4m3fn)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated() if cuda else 0
    began = time.perf_counter()
    with Anonymous() as memory, torch.inference_mode():
        if route == "nodes":
            opened, what = loader.open_transformer(source)
            with opened:
                net = loader.build_from(opened, what, dtype=torch.bfloat16, keep_fp8=True)
            model = bridge.with_recipe(bridge.build_model_patcher(net), recipe)[0].model.diffusion_model
        else:
            model = load_transformer(source, device=device, recipe=recipe)
        if cuda:
            torch.cuda.synchronize()
    parameters = [p for p in model.parameters() if p.device.type == torch.device(device).type or route == "nodes"]
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "fp8_gib": sum(p.nbytes for p in parameters) / GIB,
        "gpu_peak_gib": (torch.cuda.max_memory_allocated() - resting) / GIB if cuda else None,
        "host_growth_gib": (memory.peak - memory.start) / GIB,
    }


def load_rows(device: str, tiny: bool, load_gb: float, folder: Path | None, recipe_name: str) -> list[dict[str, Any]]:
    """Disk to FP8, each route in a process of its own."""
    if tiny:
        load.T2V_A14B = TINY
    case = load.Case(layout="comfy", stored="bf16", loaded="bf16")
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = load.write_checkpoint(case, Path(scratch), load_gb * 1e9)
        for route in ("load_transformer", "nodes"):
            command = [sys.executable, __file__, "--measure", route, "--source", str(source)]
            command += ["--device", device, "--recipe", recipe_name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"a measurement failed:\n{done.stderr}")
            found = json.loads(done.stdout.splitlines()[-1])
            # through the nodes the FP8 weights rest in host memory, and the GPU only casts them
            host = found["host_growth_gib"] - (found["fp8_gib"] if route == "nodes" or device == "cpu" else 0)
            held = 0 if route == "nodes" else found["fp8_gib"]
            peak = found["gpu_peak_gib"]
            ratio = None if peak is None else peak / found["fp8_gib"]
            rows.append(
                {
                    "part": "load",
                    "model": "t2v-A14B",
                    "recipe": recipe_name,
                    "route": route,
                    "file_gb": round(source.stat().st_size / 1e9, 2),
                    **{key: value and round(value, 3) for key, value in found.items()},
                    "gpu_peak_over_fp8": ratio and round(ratio, 3),
                    "host_beside_the_model_gib": round(host, 3),
                    "bar_gpu": 1.2 if held else 0.2,
                    "bar_host_gib": 1.0,
                    "within": host <= 1.0 and (ratio is None or ratio <= (1.2 if held else 0.2)),
                }
            )
    return rows


def main(
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}; with commas between.")] = ",".join(PARTS),
    attention: Annotated[str, typer.Option(help="Attention backend of the runs.")] = "auto",
    recipe: Annotated[str, typer.Option(help="FP8 recipe.")] = "rowwise",
    device: Annotated[str, typer.Option(help="cuda or cpu; empty picks.")] = "",
    load_gb: Annotated[float, typer.Option(help="Size of the bf16 file of the part 'load'; 28.6 is the whole.")] = 28.6,
    folder: Annotated[Path | None, typer.Option(help="Where that file is written.")] = None,
    tiny: Annotated[bool, typer.Option(help="Tiny models: a rehearsal, on a CPU too.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results file.")] = None,
    measure: Annotated[str | None, typer.Option(hidden=True)] = None,
    source: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure memory; exit 1 if a row misses its bar."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if measure is not None and source is not None:
        print(json.dumps(measure_load(source, measure, device, recipe)))
        return
    wanted = parts.split(",")
    if not set(wanted) <= set(PARTS):
        raise typer.BadParameter(f"parts are {', '.join(PARTS)}; got {parts!r}")
    rows: list[dict[str, Any]] = []

    def measured() -> Iterator[dict[str, Any]]:
        if "load" in wanted:
            yield from load_rows(device, tiny, 0.01 if tiny else load_gb, folder, recipe)
        if set(wanted) - {"load"}:
            with torch.inference_mode():
                yield from hosted_rows(wanted, device, tiny, attention, recipe)

    for row in measured():
        rows.append(row)
        console.print(row, style="" if row["within"] else "red")
        if json_path is not None:  # after each: what fails later takes nothing away
            common.write_results(json_path, rows, device)
    if not all(row["within"] for row in rows):
        console.print("[red]a row misses its bar" + (" (a rehearsal has no bars)" if tiny else ""))
        raise typer.Exit(0 if tiny and not any("failed" in row for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
