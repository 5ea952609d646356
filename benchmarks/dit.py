"""Time one Wan2.2 transformer on random weights: per block, outside the blocks, against the floor of its own kernels.

    python benchmarks/dit.py --model i2v-A14B --size 1280x720 --frames 81 --layers 3,6 --attention fa3 \\
        --recipe rowwise,DelayedScaling --backend torch,transformer_engine --json out.json

With ``--sparsity 0.5`` every block attends to that share of the key blocks: choosing and measuring included, the bound
off, since random weights attend to everything alike.

Time per block is the difference between two layer counts, run in turn. ``floor_ms`` is the sum, for one block, of every
GEMM and attention call by itself, the fastest of two times five runs, plus the bytes that fused passes must move over
the copy bandwidth of the same run; every term is printed. Each term is measured right after a forward: a GPU that has
rested runs above the clock that its power limit leaves it in a video's forwards, and a floor from it is one that no
sum of its kernels reaches.
The error is that of the velocity against the same weights in fp32, on a clip of at most 4,096 tokens.

Over several GPUs the same runs under ``torchrun``, a single GPU first:

    torchrun --nproc-per-node 2 benchmarks/dit.py --attention fa3 --recipe DelayedScaling \\
        --topologies one,cfg2,ulysses2,ring2,ulysses2+fsdp --json out.json

(or ``--ulysses N --ring N --cfg-parallel --fsdp`` for one topology). Times are those of the slowest rank. With
``cfg2`` a forward is both passes of a step, elsewhere one. ``exchange_ms`` is what collectives add to a block: its time
without them (the copies around them stay) taken from its time; ``exchange_alone`` are the same collectives by
themselves. ``efficiency`` is the single GPU's time for 40 steps over the ranks' times their number. The kernels are
those of the first rank, and those of NCCL include waiting for other ranks.

Each phase says on stderr when it began, and each row at its end how long its phases took (of the first rank).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Annotated

import common
import ranks
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wan_fp8 import Attention, Lora, Recipe, apply_recipe, compile_blocks, remove_lora, set_attention, set_lora
from wan_fp8.attention import AttentionCore, attention_cores
from wan_fp8.attention.backends import flash3
from wan_fp8.attention.sparse import Sparsity
from wan_fp8.attention.sparse.run import SparseRun
from wan_fp8.compile import MODES
from wan_fp8.errors import BackendUnavailableError
from wan_fp8.gemm import token_multiple
from wan_fp8.kernels import attention_cast
from wan_fp8.kernels.quantize import QuantizedActivation
from wan_fp8.models.specs import SPECS, ModelSpec, Task
from wan_fp8.models.wan import WanModel, build_model
from wan_fp8.parallel import ParallelDims, parallelize
from wan_fp8.parallel.ulysses import NAME as ULYSSES
from wan_fp8.parallel.ulysses import SequenceParallel
from wan_fp8.quant import RECIPES, recipe_of
from wan_fp8.quant.linear import FP8Linear, Quantization
from wan_fp8.quant.recipe import LINEARS

TEXT_TOKENS = 512
STEPS = 40
TINY = {
    f"tiny-{name}": dataclasses.replace(SPECS[full], dim=256, ffn_dim=512, num_heads=2, num_layers=4, text_dim=512)
    for name, full in (("t2v", "t2v-A14B"), ("i2v", "i2v-A14B"), ("ti2v", "ti2v-5B"))
}
MODELS = {name: spec for name, spec in SPECS.items() if spec.task in (Task.T2V, Task.I2V, Task.TI2V)} | TINY
EXTENDED = ("animate-14B", "s2v-14B", "tiny-animate", "tiny-s2v")
"""Models that ``dit_extended.py`` measures."""
console = Console(width=150)


def random_model(spec: ModelSpec, layers: int, device: str, dtype: torch.dtype, seed: int = 0) -> WanModel:
    """A model of ``layers`` blocks with weights of the size that training leaves: unit gain through every matrix."""
    with torch.device("meta"):
        model = build_model(dataclasses.replace(spec, num_layers=layers))
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, meta in model.state_dict().items():
        value = torch.randn(meta.shape, device=device, dtype=torch.float32, generator=generator)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
            value = 1 + 0.1 * value
        elif meta.ndim > 1 and "modulation" not in name:
            value = value / math.sqrt(meta[0].numel())
        else:
            value = 0.1 * value
        state[name] = value.to(dtype)
    model.load_state_dict(state, assign=True)
    return model


def random_lora(model: WanModel, rank: int) -> Lora:
    """A LoRA on the ten linears of every block, its changes a third of the weights' size."""
    generator = torch.Generator().manual_seed(2)
    state = {}
    for name in (f"blocks.{index}.{linear}" for index in range(len(model.blocks)) for linear in LINEARS):
        linear = model.get_submodule(name)
        for part, shape, size in (
            ("A", (rank, linear.in_features), linear.in_features),
            ("B", (linear.out_features, rank), 9 * rank),
        ):
            value = torch.randn(shape, generator=generator) / math.sqrt(size)
            state[f"diffusion_model.{name}.lora_{part}.weight"] = value.bfloat16()
    return Lora(state)


def latent_grid(spec: ModelSpec, width: int, height: int, frames: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a clip: VAE stride 4/8/8, or 4/16/16 for TI2V."""
    stride = 16 if spec.task == Task.TI2V else 8
    return (frames - 1) // 4 + 1, height // stride, width // stride


def model_inputs(
    spec: ModelSpec, grid: tuple[int, int, int], device: str, dtype: torch.dtype, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timestep and text of one sample, or more. TI2V gets a timestep per frame, zero on the first, as in
    image-to-video."""
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(batch, spec.in_dim, *grid, device=device, dtype=dtype, generator=generator)
    context = torch.randn(batch, TEXT_TOKENS, spec.text_dim, device=device, dtype=dtype, generator=generator)
    timestep = torch.full((batch, grid[0]) if spec.task == Task.TI2V else (batch,), 900.0, device=device)
    if spec.task == Task.TI2V:
        timestep[:, 0] = 0
    return x, timestep, context


def open_window(attention: str, density: float | None = None, means: bool = False) -> Attention:
    """The setting of a backend by name; a low-precision one in every step and block, its guard on. With a density,
    block-sparse in every block; ``means``: dropped blocks take part by theirs."""
    none = {"skip_first_blocks": 0, "skip_last_blocks": 0}
    sparsity = None
    if density is not None:
        sparsity = Sparsity(
            policy="density", density=density, bound=None, skip_first=0.0, skip_last=0.0, remainder=means, **none
        )
    return Attention(attention, skip_first_steps=0, skip_last_steps=0, **none, sparsity=sparsity)


def attention_alone(core: AttentionCore, q: Tensor, k: Tensor, v: Tensor):
    """The kernel by itself: for FP8, on operands that are cast already; block-sparse, on blocks that are chosen."""
    if core.setting.sparsity is not None and not core.always_exact:
        backend, selection = SparseRun(core.setting.sparsity, 0, 1).selected(q, k, v, None, None)
        return lambda: backend.run(q, k, v, selection)
    if core.setting.is_exact or core.always_exact:
        return lambda: core(q, k, v)
    cast = attention_cast.fused(q, k, v)
    scales = {"q_descale": cast.q_scale, "k_descale": cast.k_scale, "v_descale": cast.v_scale}
    return lambda: flash3._call(cast.q, cast.k, cast.v, **scales)


def floor_terms(
    model: WanModel, tokens: int, device: str, dtype: torch.dtype, stream_bytes: int, warm: Callable[[], object]
) -> dict[str, float]:
    """Milliseconds that one block cannot go below, term by term, measured now on this device; ``warm`` is called before
    each."""
    spec = model.spec
    dim, ffn = spec.dim, spec.ffn_dim
    block = model.blocks[0]
    recipe = recipe_of(model)
    rows = tokens
    if isinstance(model.quantization, Quantization):
        assert recipe is not None
        rows += -tokens % token_multiple(model.quantization.runner(torch.device(device), dtype), recipe.granularity)
    x = torch.randn(1, rows, dim, device=device, dtype=dtype)
    wide = torch.randn(1, rows, ffn, device=device, dtype=dtype)

    def fastest(function) -> float:
        times = []
        for _ in range(2):  # a GPU at its power limit now and then slows down for a moment
            warm()
            times += common.milliseconds(function, device)
        return min(times)

    def gemm(layer, value: Tensor, **options: bool) -> float:
        if isinstance(layer, FP8Linear) and layer.input_quantizer is not None:
            # on an input that is cast already; a GELU belongs to the next cast
            made: QuantizedActivation = layer.input_quantizer(value)
            return fastest(lambda: layer(made))
        return fastest(lambda: layer(value, **options))

    def attend(core: AttentionCore, keys: int) -> float:
        shapes = [(1, count, spec.num_heads, spec.head_dim) for count in (tokens, keys, keys)]
        qkv = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        return fastest(attention_alone(core, *qkv))

    terms = {
        "self_attention": attend(block.self_attn.inner_attention, tokens),
        "cross_attention": attend(block.cross_attn.inner_attention, TEXT_TOKENS),
        "gemm_self_qkvo": 4 * gemm(block.self_attn.q, x),
        "gemm_cross_qo": 2 * gemm(block.cross_attn.q, x),
        "gemm_ffn_0_gelu": gemm(block.ffn[0], x, gelu=True),
        "gemm_ffn_2": gemm(block.ffn[2], wide),
    }
    source = torch.empty(2**28 if device != "cpu" else 2**22, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    copy_ms = fastest(lambda: target.copy_(source))
    bandwidth = 2 * source.numel() * 4 / copy_ms  # bytes per ms
    one = tokens * dim
    half = x.element_size()
    moved = {
        # three times: read the stream and a branch, write the stream and the next normed activation
        "residual_norm": 3 * one * (2 * stream_bytes + 2 * half),
        "qk_norm_rope": 4 * one * half,
        "cross_q_norm": 2 * one * half,
    }
    if recipe is not None:
        moved |= cast_bytes(model, one, tokens * ffn, stream_bytes, half)
    if not block.self_attn.inner_attention.setting.is_exact:
        # k and v read twice (statistics, cast), q once and a sixteenth, all written in FP8; V's mean added to the end
        moved["fp8_attention_casts"] = int(one * (3 * (half + 1) + (2 + 1 / 16) * half + 2 * half))
    if block.self_attn.inner_attention.setting.sparsity is not None:
        moved["block_statistics"] = 2 * one * half
    terms |= {name: value / bandwidth for name, value in moved.items()}
    gigabytes = sum(moved.values()) / 1e9
    console.print(f"copy bandwidth {bandwidth / 1e9:.2f} TB/s; fused passes move {gigabytes:.1f} GB a block")
    return terms


def cast_bytes(model: WanModel, one: int, wide: int, stream_bytes: int, half: int) -> dict[str, int]:
    """What the casts of a recipe must move: inside the norms where the scale is known in the same pass, else a pass of
    their own; one more reading where the tensor's own maximum comes first."""
    recipe = recipe_of(model)
    assert recipe is not None
    current = recipe.name == "Float8CurrentScaling"
    alone = (2 if current else 1) * half + 1
    normed = half + half + 1 if current else 1  # current: stored with its maximum, then read and cast
    return {
        "residual_norm": 3 * one * (2 * stream_bytes + half + normed),
        "attention_output_casts": 2 * one * alone,
        "gelu_and_cast": wide * alone,
    }


def kernels_used(call, device: str) -> dict[str, float]:
    """Milliseconds of one forward by kernel name (GPU), or by operator (CPU), the twelve largest. Names of templates
    are cut where they only repeat; what tells FP8 attention from bf16 stays."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        call()
        if cuda:
            torch.cuda.synchronize()
    totals: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        totals[_short(event.key)] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000
    largest = sorted(totals.items(), key=lambda item: -item[1])[:12]
    return {name: round(value, 3) for name, value in largest}


def _short(kernel: str) -> str:
    """A kernel's name in at most 110 characters, its operand types kept."""
    if "FlashAttnFwdSm90" in kernel:
        types = [name for name in ("float_e4m3_t", "bfloat16_t", "half_t") if name in kernel]
        return f"FlashAttnFwdSm90 ({', '.join(types[:1])})"
    return kernel[:110]


def settle(call, seconds: float = 2.0) -> None:
    """Run until the GPU has come to the clock that its power limit leaves it; as often on every rank."""
    began = time.perf_counter()
    while ranks.slowest([time.perf_counter() - began], "cuda")[0] < seconds:
        call()
        torch.cuda.synchronize()


def host_ms(call, device: str) -> float:
    """Milliseconds until a forward returns to its caller, which has the work queued and not done: what the host adds
    where the GPU is quicker, and the whole forward if something in it waits for the GPU."""
    times = []
    for _ in range(3):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return min(times)


def velocity_error(
    model: WanModel,
    grid: tuple[int, int, int],
    device: str,
    dtype: torch.dtype,
    originals: dict[str, Tensor] | None = None,
    loras: Sequence[Lora] = (),
    batch: int = 1,
) -> float:
    """Relative L2 error of the velocity against fp32 weights and arithmetic, on a short clip."""
    frames = max(1, min(grid[0], 4096 // (grid[1] * grid[2] // 4)))
    grid = (frames, *grid[1:])
    x, timestep, context = model_inputs(model.spec, grid, device, dtype, batch)
    model.begin_run()
    ours = model(x, timestep, context)
    with torch.device("meta"):
        exact = build_model(model.spec)
    exact.fused_kernels = "eager"
    state = originals if originals is not None else model.state_dict()
    exact.load_state_dict({name: value.to(device, torch.float32) for name, value in state.items()}, assign=True)
    set_attention(exact, Attention("sdpa"))
    set_lora(exact, *loras)
    reference = exact(x.float(), timestep, context.float())
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def measure(
    model_name: str,
    size: str,
    frames: int,
    layers: tuple[int, int],
    attention: str,
    dtype: torch.dtype,
    device: str,
    kernels: str = "auto",
    stream: torch.dtype | None = None,
    compiled: str = "off",
    recipe: Recipe | None = None,
    lora_rank: int = 0,
    dims: ParallelDims | None = None,
    overlap: bool = True,
    with_floor: bool = True,
    density: float | None = None,
    means: bool = False,
) -> dict:
    """One row of results."""
    dims = dims or ParallelDims()
    batch = dims.cfg  # with cfg 2 a forward has both conditionings
    spec = MODELS[model_name]
    width, height = (int(n) for n in size.split("x"))
    grid = latent_grid(spec, width, height, frames)
    tokens = grid[0] * grid[1] * grid[2] // 4
    phase = common.Phases(silent=not ranks.is_first())
    named = [
        model_name, "no recipe" if recipe is None else f"{recipe.name} on {recipe.backend}", attention,
        ranks.name_of(dims) or "one GPU", *(["no overlap"] if not overlap else []),
        *([f"compile {compiled}"] if compiled != "off" else []), *([f"sparsity {density}"] if density else []),
    ]  # fmt: skip
    phase("weights", f"{', '.join(named)}: random weights of {layers[1]} blocks")
    model = random_model(spec, layers[1], device, dtype)
    set_attention(model, open_window(attention, density, means))
    model.fused_kernels, model.stream_dtype_override = kernels, stream
    originals = None
    if recipe is not None or dims.shard > 1:
        phase("copy", "their copy in host memory, for the error")
        originals = {name: value.cpu() for name, value in model.state_dict().items()}
    if recipe is not None:
        phase("recipe", "weights to FP8")
        apply_recipe(model, recipe)
    loras = [random_lora(model, lora_rank)] if lora_rank else []
    set_lora(model, *loras)
    if compiled != "off":
        compile_blocks(model, mode=compiled)
    if dims.world > 1:
        phase("layout", f"{dims}")
        parallelize(model, dims)
    split = model.stack_wrappers.get(ULYSSES)
    if isinstance(split, SequenceParallel):
        split.overlap = overlap
    x, timestep, context = model_inputs(spec, grid, device, dtype, batch)
    every_block = model.blocks
    phase("first forward", "first forward: kernels are compiled")
    began = time.perf_counter()
    model(x, timestep, context)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    first_s = time.perf_counter() - began

    def forward() -> Tensor:
        return model(x, timestep, context)

    cuda = device.startswith("cuda")
    rounds = (3 if ranks.world() > 1 else 5) if tokens > 40_000 else 15

    def by_layers() -> tuple[float, float]:
        """Milliseconds of a block, and outside the blocks."""
        times: dict[int, list[float]] = {count: [] for count in layers}
        for round_ in range(rounds):  # in turn, so that a warming GPU slows both counts alike
            for count in layers:
                model.blocks = every_block[:count]
                times[count] += ranks.milliseconds(forward, device, repeats=1, warmup=2 if round_ == 0 else 1)
        medians = {count: statistics.median(values) for count, values in times.items()}
        each = (medians[layers[1]] - medians[layers[0]]) / (layers[1] - layers[0])
        return each, medians[layers[0]] - layers[0] * each

    if cuda:
        phase("settling", "forwards until the clock has settled")
        settle(forward)
        torch.cuda.reset_peak_memory_stats()
    phase("rounds", f"{rounds} rounds of {layers[0]} and {layers[1]} blocks at {tokens:,} tokens")
    layer_ms, fixed_ms = by_layers()
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    weights_gib = sum(local(p).numel() * p.element_size() for p in model.parameters()) / 2**30
    model.blocks = every_block[: layers[0]]
    phase("profile", f"a block takes {layer_ms:.3f} ms; kernels by name")
    queued = host_ms(forward, device)
    used = kernels_used(forward, device)
    resolution = next(m for m in model.modules() if isinstance(m, AttentionCore)).resolve(
        torch.empty(1, tokens, spec.num_heads, spec.head_dim, device=device, dtype=dtype),
        torch.empty(1, tokens, 1, spec.head_dim, device=device, dtype=dtype),
    )
    terms: dict[str, float] = {}
    if with_floor and dims.world == 1:
        phase("floor", "floor: each product and attention by itself")
        remove_lora(model)  # the floor is that of the block without it
        stream_bytes = torch.empty((), dtype=model.stream_dtype).element_size()
        terms = floor_terms(model, tokens, device, dtype, stream_bytes, forward)
        set_lora(model, *loras)
    model.blocks = every_block
    phase("error", "error against fp32")
    error = velocity_error(model, grid, device, dtype, originals, loras, batch)
    if dims.world > 1:
        phase("exchange", "collectives by themselves, and the block without them")
    exchanges = exchange_terms(model, dims, tokens, batch, dtype, device, layer_ms, by_layers, used, layers[0])
    phase.done()
    forward_s = (fixed_ms + spec.num_layers * layer_ms) / 1000
    return {
        "model": model_name,
        "size": size,
        "frames": frames,
        "tokens": tokens,
        "recipe": "none" if recipe is None else recipe.name,
        "backend": str(dtype).removeprefix("torch.")
        if recipe is None
        else model.quantization.resolve(torch.device(device), dtype).backend.name,  # type: ignore[attr-defined]
        "attention": attention if attention != "auto" else resolution.backend.name,
        "lora_rank": lora_rank,
        "sparsity": density,
        **({"dropped_means": True} if means else {}),
        "sparse_backend": next(
            (name for core in attention_cores(model) for run in core.sparse_runs.values() for name in run.answered),
            None,
        ),
        "cache": None,
        "world_size": dims.world,
        "topology": ranks.name_of(dims),
        "overlap": overlap if dims.ulysses > 1 else None,
        "layer_ms": round(layer_ms, 3),
        "fixed_ms": round(fixed_ms, 3),
        "host_ms_per_block": round(queued / layers[0], 3),
        "forward_s": round(forward_s, 4),
        "seconds_40_steps": round((2 // dims.cfg) * STEPS * forward_s, 2),
        "peak_gib": peak_gib and round(peak_gib, 2),
        "weights_gib": round(weights_gib, 2),
        **exchanges,
        "floor_ms": round(sum(terms.values()), 3) if terms else None,
        "floor_ratio": round(layer_ms / sum(terms.values()), 4) if terms else None,
        "floor_terms_ms": {name: round(value, 3) for name, value in terms.items()},
        "fused_kernels": kernels,
        "compile": compiled,
        "first_forward_s": round(first_s, 2),
        "graphs": sum(parts.graphs for parts in model.compiled_parts.values()),
        "stream": str(model.stream_dtype).removeprefix("torch."),
        "kernels": used,
        "attention_refused": resolution.refused,
        "error": error,
    }


def exchange_terms(
    model: WanModel,
    dims: ParallelDims,
    tokens: int,
    batch: int,
    dtype: torch.dtype,
    device: str,
    layer_ms: float,
    by_layers: Callable[[], tuple[float, float]],
    used: dict[str, float],
    layers: int,
) -> dict[str, object]:
    """What of a block's time are exchanges; nothing on a single GPU. The model's scales are of no use afterwards."""
    if dims.world == 1:
        return {}
    multiple = dims.sequence
    if isinstance(model.quantization, Quantization):
        recipe = recipe_of(model)
        assert recipe is not None
        multiple *= token_multiple(model.quantization.runner(torch.device(device), dtype), recipe.granularity)
    alone = ranks.exchange_alone(model.spec, dims, tokens + -tokens % multiple, batch // dims.cfg, dtype, device)
    free_ms = layer_ms
    if dims.sequence > 1:
        with ranks.silent():
            free_ms, _ = by_layers()
    return {
        "exchange_ms": round(layer_ms - free_ms, 3),
        "layer_ms_without_exchange": round(free_ms, 3),
        "exchange_alone": alone,
        "nccl_kernels_ms_per_block": round(ranks.nccl_ms(used) / layers, 3),
    }


SAME = ("model", "size", "frames", "recipe", "backend", "attention", "lora_rank", "compile", "stream", "fused_kernels")
"""What two rows must share for one to be the other on more GPUs."""


def efficiency(rows: Sequence[dict], row: dict) -> dict[str, float]:
    """What share of the GPUs' time goes where it goes on one GPU; nothing without that row."""
    single = [known for known in rows if known["world_size"] == 1 and all(known[key] == row[key] for key in SAME)]
    if row["world_size"] == 1 or not single:
        return {}
    seconds = single[0]["seconds_40_steps"]
    return {"efficiency": round(seconds / (row["world_size"] * row["seconds_40_steps"]), 4)}


def local(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[operator]


def show(row: dict) -> None:
    """Print a row as a person wants to read it."""
    table = Table(title=f"{row['model']} {row['size']} x {row['frames']} frames, {row['tokens']:,} tokens")
    for column in ("", "value"):
        table.add_column(column)
    for name, value in row.items():
        if not isinstance(value, dict):
            table.add_row(name, str(value))
    console.print(table)
    for title in ("floor_terms_ms", "kernels", "attention_refused"):
        console.print(title, row[title])


def recipes(names: str, backends: str, device: str, dtype: str) -> list[Recipe | None]:
    """Every recipe on every backend that can run it here; with several, the others are named and left out."""
    found: list[Recipe | None] = []
    for name, backend in itertools.product(names.split(","), backends.split(",")):
        recipe = Recipe(name, backend=backend)
        if recipe.is_none:
            found += [None] if None not in found else []
            continue
        try:
            Quantization(recipe, ()).resolve(torch.device(device), getattr(torch, dtype))
        except BackendUnavailableError as error:
            if "," not in names + backends:
                raise
            console.print(f"left out {name} on {backend}: {error}")
        else:
            found.append(recipe)
    return found


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join((*MODELS, *EXTENDED))}.")] = "i2v-A14B",
    size: Annotated[str, typer.Option(help="Pixels, width x height.")] = "1280x720",
    frames: Annotated[int, typer.Option(help="Pixel frames, 4n+1.")] = 81,
    layers: Annotated[
        str, typer.Option(help="The two layer counts whose difference is timed; Animate and S2V have their own.")
    ] = "3,6",
    attention: Annotated[str, typer.Option(help="Attention backend, or several with commas: one row each.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    kernels: Annotated[str, typer.Option(help="Norms and rotary turns: auto, triton or eager.")] = "auto",
    stream: Annotated[
        str, typer.Option(help="Residual stream: float32 or bfloat16, or both with a comma.")
    ] = "float32",
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}; or several: one row each.")] = "none",
    backend: Annotated[str, typer.Option(help="Who multiplies in FP8; or several.")] = "auto",
    compiled: Annotated[
        str, typer.Option("--compile", help=f"torch.compile of the blocks: off, {', '.join(MODES)}; or several.")
    ] = "off",
    lora_rank: Annotated[
        str, typer.Option(help="Rank of a live LoRA on all ten linears, 0 for none; or several: one row each.")
    ] = "0",
    sparsity: Annotated[
        str,
        typer.Option(
            help="Share of the key blocks that self-attention keeps, as 0.5 or 0.5+means, or off; or several."
        ),
    ] = "off",
    ulysses: Annotated[int, typer.Option(help="Under torchrun: ranks that trade tokens for heads.")] = 1,
    ring: Annotated[int, typer.Option(help="Under torchrun: ranks that gather keys and values.")] = 1,
    cfg_parallel: Annotated[bool, typer.Option(help="Under torchrun: cond and uncond on different ranks.")] = False,
    fsdp: Annotated[bool, typer.Option(help="Under torchrun: weights of the blocks sharded over all ranks.")] = False,
    topologies: Annotated[
        str, typer.Option(help="In place of the four: several with commas, as one,cfg2,ulysses2+fsdp.")
    ] = "",
    overlap: Annotated[
        str, typer.Option(help="Ulysses: on sends v and k while the next is projected; off; or both with a comma.")
    ] = "on",
    floor: Annotated[bool, typer.Option(help="Measure the floor of the single-GPU rows.")] = True,
    device: Annotated[str, typer.Option(help="cuda or cpu; empty picks.")] = "",
    json: Annotated[str, typer.Option(help="Where to write the results file.")] = "",
    comfyui: Annotated[str, typer.Option(help="Animate and S2V: a ComfyUI, for core's classes and VAE.")] = "",
) -> None:
    """Time a Wan2.2 transformer on random weights against the floor of its own kernels."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model in EXTENDED:
        import dit_extended

        scalings = recipes(recipe, backend, device, dtype)
        dit_extended.run(model, size, frames, attention, scalings, dtype, device, comfyui, json)
        return
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is not one of {', '.join((*MODELS, *EXTENDED))}")
    if (frames - 1) % 4:
        raise typer.BadParameter(f"frames must be 4n+1; got {frames}")
    device = ranks.start(device)
    console.quiet = not ranks.is_first()
    layouts = ranks.chosen(topologies, ulysses, ring, cfg_parallel, fsdp)
    for dims in layouts:
        dims.check(MODELS[model])
        if dims.world not in (1, ranks.world()):
            raise typer.BadParameter(f"{dims} takes {dims.world} ranks; torchrun started {ranks.world()}")
    first, second = (int(n) for n in layers.split(","))
    rows: list[dict] = []
    for name, stored, mode, scaling, rank, dims, early, share in itertools.product(
        attention.split(","),
        stream.split(","),
        compiled.split(","),
        recipes(recipe, backend, device, dtype),
        (int(number) for number in lora_rank.split(",")),
        layouts,
        overlap.split(","),
        sparsity.split(","),
    ):
        if early == "off" and dims.ulysses == 1 and "on" in overlap:
            continue  # the same again
        with torch.inference_mode():
            types = getattr(torch, dtype), getattr(torch, stored)
            counts = first, second
            row = measure(
                model,
                size,
                frames,
                counts,
                name,
                types[0],
                device,
                kernels,
                types[1],
                mode,
                scaling,
                rank,
                dims,
                early == "on",
                floor,
                None if share == "off" else float(share.removesuffix("+means")),
                share.endswith("+means"),
            )
        rows.append(row | efficiency(rows, row))
        if json and ranks.is_first():
            common.write_results(json, rows, device)
        show(rows[-1])
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    ranks.stop()


if __name__ == "__main__":
    typer.run(main)
