"""Live LoRAs on a real GPU: the two kernels at Wan's widths, models under every recipe, graphs, and core's memory.

Run in a process of its own: core decides at import whether there is a GPU.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from test_live_lora import lora_file, merged
from test_model_parity import inputs, relative, tiny_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nodes"))

import bridge_kit as kit

from wan_fp8 import Lora, Recipe, apply_recipe, compile_blocks, remove_lora, set_lora
from wan_fp8.gemm import GEMM, GemmRequest, register_backends
from wan_fp8.hardware import device_caps
from wan_fp8.kernels import low_rank
from wan_fp8.kernels.quantize import Cast, Granularity, quantize, quantize_current
from wan_fp8.quant.recipe import GRANULARITIES

CUDA = torch.device("cuda", 0)
PAIRS = [("none", "auto"), *((name, backend) for name in GRANULARITIES for backend in ("torch", "transformer_engine"))]
STRENGTH = 0.7


@pytest.fixture(autouse=True)
def _inference():
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        yield


def model_with(name: str, backend: str):
    """A bf16 model under a recipe, or a skip with the backend's reason."""
    if name != "none":
        register_backends()
        reason = GEMM.backend(backend).refuse(GemmRequest(device_caps(CUDA), GRANULARITIES[name], torch.bfloat16))
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
    return apply_recipe(tiny_model("t2v", torch.bfloat16).to(CUDA), Recipe(name, backend=backend), keep_sources=True)


def forward(model, *, batch: int = 1, step: float = 900.0, rows: int = 6) -> Tensor:
    x, context = inputs("t2v", batch, rows=rows, tokens=128)
    dtype = model.compute_dtype
    return model(x.to(CUDA, dtype), torch.full((batch,), step, device=CUDA), context.to(CUDA, dtype))


@pytest.mark.parametrize(("dim", "width"), [(5120, 13824), (13824, 5120)])
@pytest.mark.parametrize(
    ("rank", "dtype"), [*((rank, torch.bfloat16) for rank in (16, 64, 208)), (64, torch.float16)], ids=str
)
def test_kernels_at_wan_widths(dim: int, width: int, rank: int, dtype: torch.dtype) -> None:
    """Against fp64 of what the bytes stand for, and no worse than the eager references; 1,001 tokens."""
    generator = torch.Generator(CUDA).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=CUDA, generator=generator)

    x, y = random(1, 1001, dim).to(dtype), random(1, 1001, width).to(dtype)
    down, up = (random(rank, dim) / dim**0.5).to(dtype), (random(width, rank) / rank**0.5).to(dtype)
    bound = 2.5e-3 if dtype == torch.bfloat16 else 3.2e-4
    for granularity in low_rank.FUSED:
        power = granularity is Granularity.BLOCK
        made = quantize_current(x) if granularity is Granularity.TENSOR else quantize(x, Cast(granularity, power))
        exact = made.dequantized(torch.float64)[0] @ down.double().t()
        hidden = low_rank.project(made, down, fused=True)
        assert bound / 4 < relative(hidden, exact) < bound, granularity
    exact = y.double()[0] + hidden.double() @ up.double().t()
    fused, eager = (low_rank.add_(y.clone(), hidden, up, fused=fused) for fused in (True, False))
    assert bound / 4 < relative(fused[0], exact) < min(bound, 1.1 * relative(eager[0], exact))


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_a_model(name: str, backend: str) -> None:
    """Against the exact merge in fp32, one sample and two: no worse than merging and casting once; kernels against
    references; removed without a trace."""
    model = model_with(name, backend)
    exact = tiny_model("t2v").to(CUDA)
    exact.load_state_dict({k: v.float() for k, v in tiny_model("t2v", torch.bfloat16).state_dict().items()})
    file = lora_file(exact)
    changed = merged(exact, (file, STRENGTH))
    once = tiny_model("t2v", torch.bfloat16).to(CUDA)
    once.load_state_dict({k: v.bfloat16() for k, v in changed.state_dict().items()})
    apply_recipe(once, Recipe(name, backend=backend))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    low = 0.001 if name == "none" else 0.01
    for batch in (1, 2):
        truth = forward(changed, batch=batch)
        once.begin_run()
        bound = 1.2 * relative(forward(once, batch=batch), truth)
        model.begin_run()
        plain = forward(model, batch=batch)
        results = {}
        for setting in ("triton", "eager"):
            model.fused_kernels = setting
            set_lora(model, Lora(file, STRENGTH))
            model.begin_run()
            results[setting] = relative(forward(model, batch=batch), truth)
        assert all(low < error < bound for error in results.values()), (batch, results, bound)
        assert relative(plain, truth) > 0.1
        model.fused_kernels = "auto"
        remove_lora(model)
        model.begin_run()
        assert torch.equal(forward(model, batch=batch), plain)
    assert all(torch.equal(v.float(), before[k].float()) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_two_kernels_a_linear_and_nothing_else(name: str, backend: str) -> None:
    """By the profiler: a branch adds its two products to each of the eight linears that run in every step, and no
    copy, cast or waiting for the GPU."""
    model = model_with(name, backend)
    counts = {}
    for what in ("without", "with"):
        if what == "with":
            set_lora(model, Lora(lora_file(model, rank=64), STRENGTH))
        for step in (900.0, 900.0, 800.0):
            forward(model, step=step)
        x, context = (t.to(CUDA, torch.bfloat16) for t in inputs("t2v", tokens=128))
        timestep = torch.tensor([700.0], device=CUDA)
        model(x, timestep, context)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x, timestep, context)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
            model(x, timestep, context)
            torch.cuda.synchronize()
        counts[what] = {e.key: e.count for e in trace.key_averages() if e.self_device_time_total > 0}
    linears = 8 * len(model.blocks)
    added = {k: n - counts["without"].get(k, 0) for k, n in counts["with"].items() if n != counts["without"].get(k, 0)}
    assert sum(n for k, n in added.items() if "add_kernel" in k) == linears, added
    if name == "none" or GRANULARITIES[name] not in low_rank.FUSED:
        return  # the first product is the library's
    assert sum(n for k, n in added.items() if "project_kernel" in k) == linears, added
    assert not any(word in k.lower() for k, n in added.items() if n > 0 for word in ("copy", "cast", "memcpy")), added


@pytest.mark.parametrize("name", ["none", "rowwise", "Float8BlockScaling"])
def test_compiled(name: str) -> None:
    model = model_with(name, "auto" if name == "none" else "torch")
    files = [lora_file(model, rank=32, seed=seed) for seed in (5, 6)]
    settings = [(files[0], 1.0), (files[0], 0.3), (files[1], -0.5)]
    plain = []
    for file, strength in settings:
        set_lora(model, Lora(file, strength))
        plain.append(forward(model))
    compile_blocks(model, fullgraph=True)
    graphs = None
    for (file, strength), expected in zip(settings, plain, strict=True):
        set_lora(model, Lora(file, strength))
        model.begin_run()
        assert relative(forward(model), expected) < (0.02 if name == "none" else 0.04)
        forward(model, rows=4)
        parts = model.compiled_parts[model.compile_setting]
        graphs = graphs or parts.graphs
        assert parts.graphs == graphs, "another strength compiles nothing"


# ---- under core ------------------------------------------------------------------------------------------------------

COMFYUI = Path(os.environ.get("COMFYUI_DIR") or kit.PACK / ".host" / "comfyui")


@pytest.fixture(scope="module")
def core():
    if not (COMFYUI / "comfy" / "options.py").is_file():
        pytest.fail(f"no ComfyUI at {COMFYUI}: run 'python scripts/host.py' or set COMFYUI_DIR")
    if str(COMFYUI) not in sys.path:
        sys.path.insert(0, str(COMFYUI))
    import comfy.cli_args

    if comfy.cli_args.args.cpu:
        pytest.skip("core is already imported for the CPU in this process: run tests/gpu by itself")
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfy.model_management

    assert comfy.model_management.get_torch_device().type == "cuda"


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "rowwise"])
def test_strengths_alternate_and_memory_returns(core, fp8: bool, monkeypatch) -> None:
    import comfy.model_patcher

    def resting() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    bridge, model = kit.bridge(), kit.own_model(dtype=torch.bfloat16)
    if fp8:
        model = bridge.with_recipe(model, kit.engine("quant").Recipe("rowwise"))[0]
    file = kit.core_lora(kit.lora_pairs(kit.core_weights(), rank=32))
    weak, strong = (bridge.load_lora(model, file, strength, live=True).model for strength in (0.2, 1.0))
    first = [kit.ksample(given) for given in (model, weak, strong)]
    assert kit.distance(first[2], first[0]) > 2 * kit.distance(first[1], first[0]) > 0.02
    merged_one = kit.ksample(bridge.load_lora(model, file, 1.0).model)
    assert kit.distance(first[2], merged_one) < 0.15 * kit.distance(first[2], first[0]) + 0.05
    kit.ksample(model)
    held, loads = resting(), []
    monkeypatch.setattr(
        comfy.model_patcher.ModelPatcher,
        "load",
        lambda *a, load=comfy.model_patcher.ModelPatcher.load, **k: loads.append(a) or load(*a, **k),
    )
    for _ in range(5):
        for given, expected in zip((weak, model, strong), (first[1], first[0], first[2]), strict=True):
            assert torch.equal(kit.ksample(given), expected)
    assert loads == [] and abs(resting() - held) < 2**20
    streamed = strong.clone()
    streamed.detach()
    load = type(streamed).load
    streamed.load = lambda device, **kw: load(streamed, device, lowvram_model_memory=1)
    for _ in range(3):
        assert torch.equal(kit.ksample(streamed), first[2]), "weights that stay in host memory"
    kit.unload_everything()
