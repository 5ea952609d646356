"""FP8 linears on a real GPU: numerics by recipe and backend, kernels by name, Transformer Engine bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from test_model_parity import TINY, inputs, random_state, relative, tiny_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from wan_fp8 import Recipe, apply_recipe, load_scales, remove_recipe, save_scales
from wan_fp8.gemm import GEMM, GemmRequest, GemmRunner, register_backends, token_multiple
from wan_fp8.gemm.backends import transformer_engine
from wan_fp8.hardware import device_caps
from wan_fp8.kernels.quantize import Cast, Granularity, quantize, quantize_current, quantize_weight, spread_scale
from wan_fp8.models.wan import build_model
from wan_fp8.quant.linear import FP8Linear
from wan_fp8.quant.recipe import GRANULARITIES

CUDA = torch.device("cuda")
PAIRS = [(name, backend) for name in GRANULARITIES for backend in ("torch", "transformer_engine")]
K, N, M = 5120, 1536, 1024


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def runner(backend: str, granularity: Granularity) -> GemmRunner:
    """The backend, or a skip with its reason."""
    register_backends()
    chosen = GEMM.backend(backend)
    reason = chosen.refuse(GemmRequest(device_caps(CUDA), granularity, torch.bfloat16))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return chosen.run


def operands(outlier: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    activations, weights = (torch.Generator(CUDA).manual_seed(seed) for seed in (1, 2))
    x = torch.randn(1, M, K, device=CUDA, generator=activations).bfloat16()
    if outlier is not None:
        x[0, 5, 77] = outlier
    weight = 0.02 * torch.randn(N, K, device=CUDA, generator=weights)
    return x, weight.bfloat16(), torch.randn(N, device=CUDA, generator=weights).bfloat16()


def cast(run: GemmRunner, x: Tensor, granularity: Granularity):
    if run.quantize is not None:
        return run.quantize(x, Cast(granularity, power_of_2=True), False)
    if granularity is Granularity.TENSOR:
        return quantize_current(x)
    return quantize(x, Cast(granularity, power_of_2=granularity is Granularity.BLOCK))


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("backend", ["torch", "transformer_engine", "reference"])
def test_errors(backend: str, granularity: Granularity) -> None:
    run = runner(backend, granularity)
    x, weight, bias = operands()
    qweight, scale = quantize_weight(weight, granularity, power_of_2=granularity is Granularity.BLOCK)
    made = cast(run, x, granularity)
    y = run(made, qweight, scale, bias).double()
    exact = x.double() @ weight.double().t() + bias.double()
    errors = (y - exact).norm(dim=-1) / (exact - bias.double()).norm(dim=-1)
    total = float((y - exact).norm() / (exact - bias.double()).norm())
    assert 0.030 < total < 0.042 and errors.max() < 0.05, (total, float(errors.max()))
    real = qweight.double() * spread_scale(scale, weight.shape).double()
    dequantised = made.dequantized(torch.float64) @ real.t() + bias.double()
    assert float((y - dequantised).norm() / dequantised.norm()) <= 0.003


@pytest.mark.parametrize("granularity", list(Granularity))
def test_weight_only(granularity: Granularity) -> None:
    """Only the weight is rounded; and no fp32 copy of a weight is made on the way."""
    run = runner("weight-only", granularity)
    x, weight, _ = operands()
    qweight, scale = quantize_weight(weight, granularity, power_of_2=granularity is Granularity.BLOCK)
    run(x, qweight, scale, None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = run(x, qweight, scale, None)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 2 * (N * K + M * N) * 1.1, "one bf16 weight, and the result"
    exact = x.double() @ weight.double().t()
    assert abs(float((y.double() - exact).norm() / exact.norm()) - 0.0265) < 0.001


@pytest.mark.parametrize("granularity", [Granularity.ROW, Granularity.BLOCK, Granularity.MX])
@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
def test_an_outlier_of_1e4(backend: str, granularity: Granularity) -> None:
    run = runner(backend, granularity)
    x, weight, _ = operands(outlier=1e4)
    qweight, scale = quantize_weight(weight, granularity, power_of_2=granularity is Granularity.BLOCK)
    y = run(cast(run, x, granularity), qweight, scale, None).double()
    exact = x.double() @ weight.double().t()
    assert not y.isnan().any()
    assert ((y - exact).norm(dim=-1) / exact.norm(dim=-1)).median() < 0.05


@pytest.mark.parametrize("tokens", [9_450, 9_419, 5_566, 1])
@pytest.mark.parametrize("granularity", list(Granularity))
def test_torch_takes_any_number_of_tokens(tokens: int, granularity: Granularity) -> None:
    """Or the next multiple of what it says it needs."""
    run = runner("torch", granularity)
    tokens += -tokens % token_multiple(run, granularity)
    x, weight, bias = operands()
    x = x[:, :1].expand(1, tokens, K).contiguous()
    qweight, scale = quantize_weight(weight, granularity, power_of_2=granularity is Granularity.BLOCK)
    made = cast(run, x, granularity)
    want = GEMM.backend("reference").run(made, qweight, scale, bias)
    assert relative(run(made, qweight, scale, bias), want) < 0.005


# ---- Transformer Engine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"])
def test_bit_equal_to_te_linear(name: str) -> None:
    """The same weight bytes and scales, in our Parameters and in te.Linear."""
    granularity = GRANULARITIES[name]
    run = runner("transformer_engine", granularity)
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    x, weight, bias = operands()
    recipe = getattr(recipes, name)()
    with torch.inference_mode(False), torch.no_grad():
        with te.quantized_model_init(enabled=True, recipe=recipe):
            linear = te.Linear(K, N, bias=True, params_dtype=torch.bfloat16, device="cuda")
        linear.requires_grad_(False)
        multiplier = None
        if name == "DelayedScaling":
            state = linear.fp8_meta["scaling_fwd"]
            state.scale[1] = 448.0 / weight.float().abs().max()
            multiplier = (448.0 / x.float().abs().max()).reshape(1)
            state.scale[0] = multiplier[0]
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
        with te.autocast(enabled=True, recipe=recipe):
            theirs = linear(x)
        if granularity is Granularity.BLOCK:
            stored, scale = linear.weight._rowwise_data, linear.weight._rowwise_scale_inv[:, : K // 128]
        else:
            stored, scale = linear.weight._data, linear.weight._scale_inv.reshape(())
    amax = None if multiplier is None else torch.zeros(1, device=CUDA)
    dequant = None if multiplier is None else 1 / multiplier
    made = run.quantize(x, Cast(granularity, True, multiplier, dequant, amax), False)
    ours = run(made, stored.view(torch.float8_e4m3fn).view(N, K), scale.contiguous(), bias)
    assert torch.equal(ours, theirs)
    if amax is not None:
        assert float(amax) == float(x.float().abs().max()), "the maximum lands in our cell"


def test_its_gelu_is_the_tanh_form() -> None:
    run = runner("transformer_engine", Granularity.TENSOR)
    x, _, _ = operands()
    for granularity in (Granularity.TENSOR, Granularity.BLOCK):
        if GEMM.backend("transformer_engine").refuse(GemmRequest(device_caps(CUDA), granularity, torch.bfloat16)):
            continue
        made = run.quantize(x, Cast(granularity, power_of_2=True), True).dequantized()
        want = torch.nn.functional.gelu(x.float(), approximate="tanh")
        assert 0.02 < relative(made, want) < 0.03


def test_its_scales_are_laid_out_as_ours() -> None:
    run = runner("transformer_engine", Granularity.BLOCK)
    x, _, _ = operands()
    theirs = run.quantize(x, Cast(Granularity.BLOCK, power_of_2=True), False)
    ours = quantize(x, Cast(Granularity.BLOCK, power_of_2=True))
    assert torch.equal(theirs.scale, ours.scale)
    assert float((theirs.qdata.float() != ours.qdata.float()).float().mean()) < 1e-4


# ---- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, backend", PAIRS)
@pytest.mark.parametrize("kind", ["t2v", "ti2v"])
def test_a_model(name: str, backend: str, kind: str) -> None:
    """Against bf16; fused kernels against their eager references; undone bit for bit."""
    runner(backend, GRANULARITIES[name])
    model = tiny_model(kind, torch.bfloat16).to(CUDA)
    x, context = (t.to(CUDA, torch.bfloat16) for t in inputs(kind))
    exact = model(x, torch.tensor([900], device=CUDA), context)
    apply_recipe(model, Recipe(name, backend=backend), keep_sources=True)
    results = {}
    for setting in ("triton", "eager"):
        model.fused_kernels = setting
        model.begin_run()
        results[setting] = [model(x, torch.tensor([t], device=CUDA), context) for t in (900, 800)]
    assert 0.01 < relative(results["triton"][0], exact) < 0.08
    for fused, eager in zip(*results.values(), strict=True):
        assert relative(fused, eager) < 0.03
    remove_recipe(model)
    model.fused_kernels = "auto"
    assert torch.equal(model(x, torch.tensor([900], device=CUDA), context), exact)


@pytest.mark.parametrize("name, backend", PAIRS)
def test_only_fp8_products_in_the_ten_linears(name: str, backend: str) -> None:
    """By the profiler: eight e4m3 products a block from the second forward on (text keys and values are kept), none
    in bf16, nothing padded or copied on the way."""
    runner(backend, GRANULARITIES[name])
    with torch.device("meta"):  # widths that are multiples of 512, as Wan's are: block scales need no padding
        model = build_model(dataclasses.replace(TINY["t2v"], dim=512, ffn_dim=1024, num_heads=4))
    state = {key: value.to(CUDA, torch.bfloat16) for key, value in random_state(model).items()}
    model.load_state_dict(state, assign=True)
    apply_recipe(model, Recipe(name, backend=backend))
    x, context = (t.to(CUDA, torch.bfloat16) for t in inputs("t2v", rows=16, columns=16, frames=2, tokens=512))

    def forward() -> Tensor:
        return model(x, torch.tensor([900], device=CUDA), context)

    forward(), forward()
    names: list[str] = []
    linears = [m for m in model.modules() if isinstance(m, FP8Linear)]
    with contextlib.ExitStack() as stack:
        for linear in linears:
            original = linear.forward

            def marked(*args, _original=original, **kwargs):
                with torch.profiler.record_function("fp8_linear"):
                    return _original(*args, **kwargs)

            linear.forward = marked  # type: ignore[method-assign]
            stack.callback(linear.__dict__.pop, "forward")
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
            forward()
            torch.cuda.synchronize()
    events = trace.events()
    spans = [e for e in events if e.name == "fp8_linear" and e.device_type == torch.autograd.DeviceType.CPU]
    assert len(spans) == 8 * len(model.blocks)
    for span in spans:
        for event in events:
            inside = span.time_range.start <= event.time_range.start <= span.time_range.end
            if inside and event.kernels:
                names += [kernel.name for kernel in event.kernels]
    # by name among all kernels of the forward: a product that a library launches belongs to no operator of torch
    kernels = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    products = [n for n in kernels if any(w in n.lower() for w in ("gemm", "nvjet", "cutlass")) and "flash" not in n]
    fp8 = [n for n in products if any(word in n.lower() for word in ("e4m3", "qqt", "_qq", "f8", "fp8"))]
    assert len(fp8) >= len(spans), sorted(set(products))
    high = [n for n in products if n not in fp8 and "f32f32" not in n and "sgemm" not in n]  # those two are in fp32
    assert len(high) <= 1, ("the patch embedding alone is in bf16", sorted(set(high)))
    assert not any(word in n.lower() for n in names for word in ("pad", "copy_kernel", "catarray")), sorted(set(names))
    print(name, backend, sorted(set(fp8)))


@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
def test_delayed_scales_move_without_the_host(backend: str, tmp_path) -> None:
    runner(backend, Granularity.TENSOR)
    model = tiny_model("t2v", torch.bfloat16).to(CUDA)
    apply_recipe(model, Recipe("DelayedScaling", backend=backend))
    x, context = (t.to(CUDA, torch.bfloat16) for t in inputs("t2v"))
    timesteps = [torch.tensor([float(t)], device=CUDA) for t in (900, 700, 500)]
    model(x, timesteps[0], context)
    scales = model.quantization.scales
    first = scales.multiplier.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for timestep in timesteps[1:]:
            model(3 * x, timestep, context)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(scales.multiplier, first)
    assert torch.allclose(scales.multiplier, 448 / scales.history.amax(0))
    save_scales(model, tmp_path / "scales.safetensors")
    results = []
    for _ in range(2):
        second = tiny_model("t2v", torch.bfloat16).to(CUDA)
        apply_recipe(second, Recipe("DelayedScaling", backend=backend))
        load_scales(second, tmp_path / "scales.safetensors")
        results.append(second(x, timesteps[0], context))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["t2v", "ti2v"])
@pytest.mark.parametrize("name", [None, *GRANULARITIES])
def test_the_host_never_waits(kind: str, name: str | None) -> None:
    """Timesteps per frame, a known prompt, every recipe: after its first forward a model queues work and returns."""
    model = tiny_model(kind, torch.bfloat16).to(CUDA)
    if name is not None:
        runner("torch", GRANULARITIES[name])
        apply_recipe(model, Recipe(name, backend="torch"))
    x, context = (t.to(CUDA, torch.bfloat16) for t in inputs(kind))
    timesteps = [torch.full((1, x.shape[2]) if kind == "ti2v" else (1,), t, device=CUDA) for t in (900.0, 800.0)]
    timesteps[1][..., :1] = 0 if kind == "ti2v" else 800
    model(x, timesteps[0], context)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, timesteps[1], context)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_convolutions_still_run_beside_transformer_engine() -> None:
    """It brings a cuDNN of its own finding; torch keeps its own."""
    transformer_engine.probe()
    assert torch.backends.cudnn.version()
    x = torch.randn(1, 4, 3, 8, 8, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(4, 4, 3, 3, 3, device=CUDA, dtype=torch.bfloat16)
    assert torch.nn.functional.conv3d(x, weight, padding=1).isfinite().all()


def test_quantising_on_the_gpu_leaves_one_byte_a_weight() -> None:
    torch.cuda.empty_cache()
    model = tiny_model("t2v", torch.bfloat16)
    before = torch.cuda.memory_allocated()
    apply_recipe(model, Recipe("rowwise", backend="torch"), device=CUDA, move=True).to(CUDA)
    held = torch.cuda.memory_allocated() - before
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert stored <= held < 1.05 * stored + 512 * len(list(model.parameters()))
    assert all(
        m.source is not None and m.source.device.type == "cpu" for m in model.modules() if isinstance(m, FP8Linear)
    )


def test_the_reason_is_the_library_s_own() -> None:
    library, note = transformer_engine.probe()
    print("Transformer Engine:", note if library is None else f"{note}, usable")
    assert note
