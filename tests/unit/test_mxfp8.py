"""MXFP8: scales of 32 in E8M0, their order for cuBLAS, and what torch's own checks say. It has not run on a GPU."""

from __future__ import annotations

import pytest
import torch
from test_model_parity import relative, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wan_fp8.errors import BackendUnavailableError
from wan_fp8.gemm import GEMM, register_backends
from wan_fp8.gemm.backends import torch_scaled_mm
from wan_fp8.kernels.quantize import (
    Cast,
    Granularity,
    QuantizedActivation,
    cublas_tiles,
    quantize,
    quantize_weight,
    spread_scale,
    weight_granularity,
)
from wan_fp8.models.layers import Linear
from wan_fp8.quant import Recipe, apply_recipe
from wan_fp8.quant import recipe as recipes
from wan_fp8.quant.linear import FP8Linear

register_backends()
MX = Granularity.MX


def gaussian(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_scales_are_those_of_the_format() -> None:
    """Against a loop over the groups: the smallest power of two under which nothing exceeds 448."""
    x = gaussian(3, 96, seed=1, scale=37.0)
    x[1, :32] = 0
    x[2, 40] = 448 * 8.0  # exactly at the edge: its scale is 8
    x[2, 64:] = 1e-6
    made = quantize(x[None], Cast(MX))
    assert made.scale.dtype == torch.float8_e8m0fnu and made.scale.shape == (3, 3)
    for row in range(3):
        for group in range(3):
            values, scale = x[row, 32 * group : 32 * group + 32], float(made.scale[row, group].float())
            bytes_ = made.qdata[0, row, 32 * group : 32 * group + 32]
            largest = float(values.abs().max())
            if largest == 0:
                assert not bytes_.float().any()
                continue
            assert largest <= 448 * scale < 2 * largest * (1 + 1e-6), (row, group)
            assert torch.equal(bytes_.float(), (values / scale).to(torch.float8_e4m3fn).float())
    assert float(made.scale[2, 1].float()) == 8
    weight, scale = quantize_weight(x, MX)
    assert torch.equal(weight.float(), made.qdata[0].float()), "weights are cast as activations are"
    assert torch.equal(scale.float(), made.scale.float()) and weight_granularity(scale, x.shape) is MX


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "10 channels x50", "4 tokens x100"])
def test_gemm_error(kind: str) -> None:
    """0.0373 to 0.0377 by emulation elsewhere (512 x 5120 x 512)."""
    x = gaussian(256, 2048, seed=3)
    if kind == "laplace":
        uniform = torch.rand(256, 2048, generator=torch.Generator().manual_seed(5)) - 0.5
        x = -uniform.sign() * torch.log1p(-2 * uniform.abs() + 1e-7)
    if kind == "10 channels x50":
        x[:, 100:110] *= 50
    if kind == "4 tokens x100":
        x[:4] *= 100
    weight = gaussian(256, 2048, seed=4, scale=0.02)
    y = GEMM.backend("reference").run(quantize(x[None], Cast(MX)), *quantize_weight(weight, MX), None)
    exact = x.double() @ weight.double().t()
    error = float((y[0].double() - exact).norm() / exact.norm())
    assert 0.0365 < error < 0.0385, error


def test_an_outlier_harms_its_own_group_only() -> None:
    x = gaussian(64, 1024, seed=6)
    x[5, 77] = 1e5
    back = quantize(x[None], Cast(MX)).dequantized()[0]
    errors = (back - x).unflatten(1, (-1, 32)).norm(dim=2) / x.unflatten(1, (-1, 32)).norm(dim=2)
    errors[5, 77 // 32] = 0
    assert errors.max() < 0.05 and not back.isnan().any()


@pytest.mark.parametrize("rows, groups", [(128, 4), (256, 12), (130, 5), (1, 1)])
def test_order_of_scales(rows: int, groups: int) -> None:
    """cuBLAS documents the place of each scale in a tile of 128 x 4: (row % 32) * 16 + (row / 32) * 4 + group."""
    scale = torch.randint(1, 254, (rows, groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    tiles = cublas_tiles(scale.view(torch.float8_e8m0fnu)).view(torch.uint8)
    wide = -(-groups // 4)
    assert tiles.numel() == -(-rows // 128) * wide * 512
    for row in range(rows):
        for group in range(groups):
            tile = (row // 128) * wide + group // 4
            place = tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + group % 4
            assert tiles[place] == scale[row, group], (row, group)
    assert int((tiles != 0).sum()) == rows * groups, "the rest is filled"


def test_torch_checks_of_a_gpu() -> None:
    """Shapes, types and layouts as cuBLAS is told about them; a scale that is missing is noticed."""
    shapes = [(5120, 5120), (5120, 13824), (13824, 5120), (3072, 3072), (3072, 14336), (14336, 3072)]
    e8m0 = torch.float8_e8m0fnu
    with FakeTensorMode():
        for tokens, (k, n) in [(m, shape) for m in (75_600, 9_450, 5_566, 1) for shape in shapes]:
            qdata = torch.empty(1, tokens, k, device="cuda", dtype=torch.float8_e4m3fn)
            weight = torch.empty(n, k, device="cuda", dtype=torch.float8_e4m3fn)
            bias = torch.empty(n, device="cuda", dtype=torch.bfloat16)
            x = QuantizedActivation(qdata, torch.empty(tokens, k // 32, device="cuda", dtype=e8m0), MX, torch.bfloat16)
            y = torch_scaled_mm.multiply(x, weight, torch.empty(n, k // 32, device="cuda", dtype=e8m0), bias)
            assert y.shape == (1, tokens, n) and y.dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="for MX scaling"):
            torch_scaled_mm.multiply(x, weight, torch.empty(n, k // 64, device="cuda", dtype=e8m0), bias)


def test_a_file_without_power_of_2_scales_is_cast_again() -> None:
    """Its real values are what is cast: a second rounding, which no recipe can avoid there."""
    with torch.inference_mode():
        model = tiny_model("t2v", torch.bfloat16)
        real = {}
        for path, module in model.named_modules():
            if type(module) is Linear and path.startswith("blocks."):
                scale = module.weight.float().abs().amax() / 448 * 1.1
                module.weight = torch.nn.Parameter((module.weight.float() / scale).to(torch.float8_e4m3fn), False)
                module.weight_scale = torch.nn.Parameter(scale, False)
                real[path] = module.dequantized(module.weight, torch.float32)
        apply_recipe(model, Recipe("MXFP8BlockScaling", backend="reference"))
        for path, module in model.named_modules():
            if isinstance(module, FP8Linear):
                back = module.weight.float() * spread_scale(module.weight_scale, module.weight.shape)
                assert 0.005 < relative(back, real[path]) < 0.03


def test_it_is_refused_where_torch_has_no_type_for_its_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "E8M0", None)
    with pytest.raises(BackendUnavailableError, match=r"MXFP8BlockScaling needs torch 2\.7.*rowwise"):
        Recipe("MXFP8BlockScaling")
    Recipe("rowwise")
