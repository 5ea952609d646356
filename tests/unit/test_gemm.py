"""FP8 matrix products: error bounds on both sides, scales and layouts, who runs where and why not."""

from __future__ import annotations

import sys
import types
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wan_fp8.errors import BackendUnavailableError, InputError
from wan_fp8.gemm import GEMM, GemmRequest, register_backends, token_multiple
from wan_fp8.gemm.backends import torch_scaled_mm, transformer_engine
from wan_fp8.hardware import DeviceCaps
from wan_fp8.kernels.quantize import (
    Cast,
    Granularity,
    QuantizedActivation,
    dequantized_weight,
    quantize,
    quantize_current,
    quantize_weight,
    spread_scale,
    weight_granularity,
)

register_backends()
K, N, M = 1024, 384, 96


def operands(granularity: Granularity, outlier: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    activations, weights = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    x = torch.randn(2, M // 2, K, generator=activations).bfloat16()
    if outlier is not None:
        x[0, 5, 77] = outlier
    weight = 0.02 * torch.randn(N, K, generator=weights)
    bias = torch.randn(N, generator=weights).bfloat16()
    return x, weight, bias


def cast(x: Tensor, granularity: Granularity) -> QuantizedActivation:
    if granularity is Granularity.TENSOR:
        return quantize_current(x)
    return quantize(x, Cast(granularity, power_of_2=granularity is Granularity.BLOCK))


def token_errors(y: Tensor, exact: Tensor) -> Tensor:
    return (y.double() - exact).norm(dim=-1) / exact.norm(dim=-1)


@pytest.mark.parametrize(
    "backend, granularity",  # torch multiplies block scales on a Hopper GPU only
    [*(("reference", kind) for kind in Granularity), ("torch", Granularity.TENSOR), ("torch", Granularity.ROW)],
)
def test_errors(granularity: Granularity, backend: str) -> None:
    """Against real operands an error below 0.03 would mean that nothing was cast; against the dequantised ones only
    the output's rounding may be left."""
    x, weight, bias = operands(granularity)
    qweight, scale = quantize_weight(weight, granularity, power_of_2=granularity is Granularity.BLOCK)
    assert qweight.dtype == torch.float8_e4m3fn and weight_granularity(scale, weight.shape) is granularity
    y = GEMM.backend(backend).run(cast(x, granularity), qweight, scale, bias)
    assert y.shape == (2, M // 2, N) and y.dtype == torch.bfloat16
    exact = x.double() @ weight.double().t()
    errors = token_errors(y.double() - bias.double(), exact)
    total = float((y.double() - bias.double() - exact).norm() / exact.norm())
    assert 0.034 < total < 0.042, total
    assert errors.max() < 0.05
    real = qweight.double() * spread_scale(scale, weight.shape).double()
    dequantised = cast(x, granularity).dequantized(torch.float64) @ real.t() + bias.double()
    assert float((y.double() - dequantised).norm() / dequantised.norm()) < 0.003


@pytest.mark.parametrize("granularity", list(Granularity))
def test_weight_error(granularity: Granularity) -> None:
    _, weight, _ = operands(granularity)
    for power_of_2 in (False, True):
        qweight, scale = quantize_weight(weight, granularity, power_of_2=power_of_2)
        back = qweight.double() * spread_scale(scale, weight.shape).double()
        assert torch.equal(dequantized_weight(qweight, scale, torch.float64), back)
        assert torch.equal(dequantized_weight(qweight, scale, torch.bfloat16), back.bfloat16()), "rounded once"
        assert 0.024 < float((back - weight.double()).norm() / weight.double().norm()) < 0.029
        if power_of_2 or granularity is Granularity.MX:
            assert torch.equal(scale.float().log2(), scale.float().log2().round())
        else:
            assert float(qweight.float().abs().max()) == 448


@pytest.mark.parametrize("granularity", [Granularity.ROW, Granularity.BLOCK])
def test_an_outlier_harms_its_own_token_only(granularity: Granularity) -> None:
    x, weight, _ = operands(granularity, outlier=1e4)
    qweight, scale = quantize_weight(weight, granularity)
    y = GEMM.backend("reference").run(cast(x, granularity), qweight, scale, None)
    assert not y.isnan().any()
    errors = token_errors(y, x.double() @ weight.double().t()).flatten()
    assert errors.median() < 0.05
    assert errors.kthvalue(M - 1).values < 0.05, "only one token may be worse"


def test_casts_saturate() -> None:
    """Up to torch 2.12 a cast makes NaN of what exceeds 448: the clamp comes first, on every torch."""
    one = torch.ones(1)
    x = torch.tensor([[1e4, -1e4, 470.0, 1.0] * 32])
    values = quantize(x, Cast(Granularity.TENSOR, multiplier=one, dequant=one)).qdata.float()
    assert values[0, :4].tolist() == [448, -448, 448, 1]


def test_torch_checks_of_a_gpu() -> None:
    """Shapes and layouts as cuBLAS is told about them, for every matrix of a 14B block and of TI2V-5B."""
    shapes = [(5120, 5120), (5120, 13824), (13824, 5120), (3072, 3072), (3072, 14336), (14336, 3072)]
    with FakeTensorMode():
        for tokens, (k, n) in [(m, shape) for m in (75_600, 9_450, 5_566, 1) for shape in shapes]:
            qdata = torch.empty(1, tokens, k, device="cuda", dtype=torch.float8_e4m3fn)
            weight = torch.empty(n, k, device="cuda", dtype=torch.float8_e4m3fn)
            bias = torch.empty(n, device="cuda", dtype=torch.bfloat16)
            sizes = {
                Granularity.TENSOR: ((1,), ()),
                Granularity.ROW: ((tokens, 1), (n, 1)),
                Granularity.BLOCK: ((k // 128, tokens), (n // 128, k // 128)),
            }
            for granularity, (left, right) in sizes.items():
                x = QuantizedActivation(qdata, torch.empty(left, device="cuda"), granularity, torch.bfloat16)
                y = torch_scaled_mm.multiply(x, weight, torch.empty(right, device="cuda"), bias)
                assert y.shape == (1, tokens, n) and y.dtype == torch.bfloat16


def caps(capability: tuple[int, int] | None, *, torch_version: str = "2.11.0+cu130", cuda: str | None = "13.0"):
    return DeviceCaps(
        device=torch.device("cpu" if capability is None else "cuda"),
        name="a GPU" if capability else "cpu",
        capability=capability,
        total_memory_bytes=None,
        torch_version=torch_version,
        cuda_version=cuda,
    )


def refusal(backend: str, granularity: Granularity, *args, dtype: torch.dtype = torch.bfloat16, **kwargs) -> str | None:
    return GEMM.backend(backend).refuse(GemmRequest(caps(*args, **kwargs), granularity, dtype))


def test_refusals() -> None:
    row, tensor, block = Granularity.ROW, Granularity.TENSOR, Granularity.BLOCK
    for kind in (row, tensor, block):
        assert refusal("torch", kind, (9, 0)) is None
        assert "8.0" in refusal("torch", kind, (8, 0))
        assert "NVIDIA GPU" in refusal("torch", kind, None, cuda=None)
    assert refusal("torch", row, (8, 9)) is refusal("torch", tensor, (12, 0)) is None
    assert "9.0" in refusal("torch", block, (10, 0))
    assert "torch 2.10" in refusal("torch", block, (9, 0), torch_version="2.9.1")
    assert "CUDA 12.9" in refusal("torch", block, (9, 0), cuda="12.8")
    assert "bf16 and fp16" in refusal("torch", row, (9, 0), dtype=torch.float32)
    assert "no row scales" in refusal("transformer_engine", row, (9, 0))
    with pytest.raises(BackendUnavailableError, match=r"no FP8 GEMM backend.*torch: .*NVIDIA GPU.*reference: never"):
        GEMM.resolve("auto", GemmRequest(caps(None, cuda=None), row, torch.bfloat16))
    assert GEMM.resolve("auto", GemmRequest(caps((9, 0)), row, torch.bfloat16)).backend.name == "torch"
    assert GEMM.resolve("reference", GemmRequest(caps(None, cuda=None), row, torch.bfloat16)).backend.exact
    with pytest.raises(InputError, match="cublas"):
        GEMM.resolve("cublas", GemmRequest(caps((9, 0)), row, torch.bfloat16))


# ---- Transformer Engine, by the contracts that we rely on; its numbers are tested on a GPU ---------------------------


class Stub(types.ModuleType):
    """``transformer_engine`` as far as our calls go."""


@pytest.fixture
def engine(monkeypatch):
    """A stub of the library, and the calls that it saw."""
    calls: list[tuple] = []

    class Storage:
        def __init__(self, *args, **kwargs):
            self.args, self.kwargs = args, kwargs

    def quantizer(kind):
        class Quantizer:
            internal = False

            def __init__(self, *args, **kwargs):
                self.kind, self.args, self.kwargs = kind, args, kwargs

            def __call__(self, x):
                assert self.internal and x.ndim == 2 and x.is_contiguous()
                calls.append((kind, self.args, self.kwargs))
                stored = types.SimpleNamespace(_data=torch.zeros(x.shape, dtype=torch.uint8), _scale_inv=torch.ones(1))
                stored._rowwise_data = stored._data
                stored._rowwise_scale_inv = torch.ones(x.shape[1] // 128, x.shape[0])
                return stored

        return Quantizer

    def general_gemm(weight, x, **kwargs):
        calls.append(("gemm", weight, x, kwargs))
        data = x.kwargs.get("data", x.args[0] if x.args else None)
        rows = weight.kwargs.get("data", weight.args[0] if weight.args else None).shape[0]
        return (torch.zeros(data.shape[0], rows, dtype=torch.bfloat16),)

    members = {
        "DType": types.SimpleNamespace(kFloat8E4M3="e4m3"),
        "gelu": lambda x, q: (calls.append(("gelu",)), q(x))[1],
        "Float8BlockQuantizer": quantizer("block"),
        "Float8CurrentScalingQuantizer": quantizer("current"),
        "Float8Quantizer": quantizer("delayed"),
        "general_gemm": general_gemm,
        "Float8TensorStorage": Storage,
        "Float8BlockwiseQTensorStorage": Storage,
    }
    for name in ("transformer_engine", *transformer_engine._NAMES):
        module = Stub(name)
        for member in transformer_engine._NAMES.get(name, ()):
            setattr(module, member, members[member])
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(transformer_engine, "has_module", lambda name: True)
    monkeypatch.setattr(transformer_engine.metadata, "version", lambda name: "2.20.2")
    transformer_engine.probe.cache_clear()
    yield calls
    transformer_engine.probe.cache_clear()


def test_transformer_engine_takes_our_tensors(engine) -> None:
    runner = GEMM.backend("transformer_engine").run
    x, weight, bias = operands(Granularity.TENSOR)
    for granularity in (Granularity.TENSOR, Granularity.BLOCK):
        qweight, scale = quantize_weight(weight, granularity)
        x_ = x.flatten(0, 1)[:32].repeat(4, 1)[None]
        made = runner.quantize(x_, Cast(granularity, power_of_2=True), gelu := granularity is Granularity.BLOCK)
        assert made.qdata.dtype == torch.float8_e4m3fn and made.shape == x_.shape
        assert (("gelu",) in engine) is gelu
        assert runner(made, qweight, scale, bias).shape == (1, 128, N)
        _, left, right, options = engine[-1]
        data = left.kwargs["data"] if granularity is Granularity.TENSOR else left.args[0]
        assert data.data_ptr() == qweight.data_ptr(), "no copy of the weight"
        assert options == {
            "out_dtype": torch.bfloat16,
            "bias": bias,
            "use_split_accumulator": granularity is Granularity.BLOCK,
        }
        assert right is not left
    assert token_multiple(runner, Granularity.TENSOR) == 16 and token_multiple(runner, Granularity.BLOCK) == 128


def test_transformer_engine_keeps_scales_and_maxima_of_ours(engine) -> None:
    multiplier, amax = torch.full((1,), 3.0), torch.zeros(1)
    x = torch.zeros(1, 16, 128, dtype=torch.bfloat16)
    given = Cast(Granularity.TENSOR, multiplier=multiplier, dequant=1 / multiplier, amax=amax)
    GEMM.backend("transformer_engine").run.quantize(x, given, False)
    kind, args, _ = engine[0]
    assert kind == "delayed" and args[0] is multiplier and args[1] is amax
    with pytest.raises(InputError, match="divisible by 16; got 17"):
        GEMM.backend("transformer_engine").run.quantize(x.new_zeros(1, 17, 128), given, False)


NO_EXTENSION = "Could not find shared object file for Transformer Engine torch lib."
NO_CUDA = "libcudart.so.13: cannot open shared object file: No such file or directory"


def _raise(error: Exception):
    def run(*_):
        raise error

    return run


@pytest.mark.parametrize(
    "break_it, reason",
    [
        (lambda m: m.setattr(transformer_engine.metadata, "version", lambda _: "2.19.1"), "2.19.1 has not been tested"),
        (lambda m: m.delattr(sys.modules["transformer_engine_torch"], "gelu"), "has no transformer_engine_torch.gelu"),
        (lambda m: m.setattr(transformer_engine, "has_module", lambda _: False), "not installed"),
        (lambda m: m.setitem(sys.modules, "transformer_engine.pytorch", None), "does not load"),
        (
            lambda m: m.setattr(transformer_engine.metadata, "version", _raise(PackageNotFoundError())),
            "no package metada",
        ),
        (lambda m: m.setattr(transformer_engine.metadata, "version", lambda _: "2.21.0"), "takes 2.20 up to, not incl"),
        (
            lambda m: m.setattr(transformer_engine.importlib, "import_module", _raise(FileNotFoundError(NO_EXTENSION))),
            rf"2.20.2 does not load ({NO_EXTENSION})",
        ),
        (
            lambda m: m.setattr(transformer_engine.importlib, "import_module", _raise(OSError(NO_CUDA))),
            f"2.20.2 does not load ({NO_CUDA})",
        ),
        (
            lambda m: m.setattr(transformer_engine.importlib, "import_module", _raise(RuntimeError("another torch"))),
            "2.20.2 does not load (another torch)",
        ),
    ],
)
def test_transformer_engine_refuses_with_the_reason(engine, monkeypatch, break_it, reason: str) -> None:
    break_it(monkeypatch)
    assert reason in refusal("transformer_engine", Granularity.TENSOR, (9, 0))
    command = "python install.py --with transformer-engine (pip install --no-build-isolation"
    assert command in refusal("transformer_engine", Granularity.TENSOR, (9, 0)), "and what would help"
    with pytest.raises(BackendUnavailableError, match=r"'transformer_engine' cannot run here: Transformer Engine"):
        GEMM.resolve("transformer_engine", GemmRequest(caps((9, 0)), Granularity.TENSOR, torch.bfloat16))


@pytest.mark.parametrize("cuda, package", [("12.8", "core_cu12]"), ("13.0", "core_cu13]"), (None, "core_cu13]")])
def test_the_command_fits_the_cuda_of_torch(engine, monkeypatch, cuda: str | None, package: str) -> None:
    monkeypatch.setattr(transformer_engine, "has_module", lambda _: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert package in transformer_engine.probe()[1]


def test_two_copies_of_the_package_share_one_operator() -> None:
    """ComfyUI loads the pack under a name of its own; a test, or a script beside it, may load it once more."""
    assert torch_scaled_mm._define_operator() is None
    assert str(torch.ops.wan_fp8.grouped_mm.default) == "wan_fp8.grouped_mm.default"
