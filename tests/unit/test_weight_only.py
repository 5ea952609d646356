"""The backend ``weight-only``: weights in FP8, activations as they are; by name on any device with FP8 types."""

from __future__ import annotations

import pytest
import torch
from test_model_parity import inputs, relative, tiny_model
from torch import Tensor

from wan_fp8 import compile_blocks
from wan_fp8.errors import BackendUnavailableError, InputError
from wan_fp8.gemm import GEMM, GemmRequest, register_backends
from wan_fp8.hardware import device_caps
from wan_fp8.kernels.quantize import Granularity, quantize_weight, spread_scale
from wan_fp8.quant import RECIPES, Recipe, apply_recipe, recipe_of, remove_recipe, save_scales
from wan_fp8.quant.linear import FP8Linear

register_backends()
NAMES = RECIPES[1:]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def weight_only(name: str) -> Recipe:
    return Recipe(name, backend="weight-only")


def step(model) -> Tensor:
    x, context = inputs("t2v")
    return model(x, torch.tensor([900.0]), context)


@pytest.mark.parametrize("granularity", list(Granularity))
def test_error(granularity: Granularity) -> None:
    """One rounded operand: 0.0265 on Gaussian data; below it nothing was stored in FP8, above it activations were."""
    x = torch.randn(2, 48, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = 0.02 * torch.randn(384, 1024, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(384, generator=torch.Generator().manual_seed(3)).bfloat16()
    qweight, scale = quantize_weight(weight, granularity, power_of_2=granularity is Granularity.BLOCK)
    runner = GEMM.backend("weight-only").run
    exact = x.double() @ weight.double().t()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = runner(x.to(dtype), qweight, scale, None)
        assert y.dtype == dtype and y.shape == (2, 48, 384)
        error = float((y.double() - exact).norm() / exact.norm())
        assert abs(error - 0.0265) < 0.001, (dtype, error)
    real = qweight.double() * spread_scale(scale, weight.shape).double()
    y, want = runner(x, qweight, scale, bias), x.double() @ real.t() + bias.double()
    assert float((y.double() - want).norm() / want.norm()) < 0.004  # bf16: the weight's and the output's rounding


def test_only_by_name() -> None:
    request = GemmRequest(device_caps("cpu"), Granularity.ROW, torch.bfloat16)
    assert GEMM.resolve("weight-only", request).backend.name == "weight-only"
    with pytest.raises(BackendUnavailableError, match=r"weight-only: never chosen automatically"):
        GEMM.resolve("auto", request)


@pytest.mark.parametrize("name", NAMES)
def test_a_model(name: str) -> None:
    """Closer to the original than the recipe with both operands in FP8, and equal to its dequantised weights."""
    model = tiny_model("t2v")
    exact = step(model)
    both = relative(step(apply_recipe(tiny_model("t2v"), Recipe(name, backend="reference"))), exact)
    apply_recipe(model, weight_only(name))
    layers = [module for module in model.modules() if isinstance(module, FP8Linear)]
    assert recipe_of(model) == weight_only(name) and len(layers) == 10 * len(model.blocks)
    assert all(layer.weight.dtype == torch.float8_e4m3fn and layer.input_quantizer is None for layer in layers)
    ours = step(model)
    assert 0.005 < relative(ours, exact) < both
    plain = tiny_model("t2v")
    for path, layer in model.named_modules():
        if isinstance(layer, FP8Linear):
            plain.get_submodule(path).weight.copy_(layer.dequantized(layer.weight, torch.float32))
    assert relative(ours, step(plain)) < 1e-6
    remove_recipe(model)
    assert torch.equal(step(model), exact)


def test_changing_the_backend_keeps_the_weights() -> None:
    model = apply_recipe(tiny_model("t2v"), Recipe("rowwise", backend="reference"))
    first, pointers = step(model), {k: v.data_ptr() for k, v in model.state_dict().items()}
    apply_recipe(model, weight_only("rowwise"))
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == pointers
    assert not torch.equal(step(model), first)
    apply_recipe(model, Recipe("rowwise", backend="reference"))
    assert torch.equal(step(model), first)


def test_it_has_no_scales_to_follow(tmp_path) -> None:
    model = apply_recipe(tiny_model("t2v"), weight_only("DelayedScaling"))
    assert torch.equal(step(model), step(model))
    with pytest.raises(InputError, match="no DelayedScaling"):
        save_scales(model, tmp_path / "scales.safetensors")


def test_it_compiles() -> None:
    model = apply_recipe(tiny_model("t2v"), weight_only("rowwise"))
    want = step(model)
    compile_blocks(model, backend="aot_eager")
    assert torch.equal(step(model), want)
