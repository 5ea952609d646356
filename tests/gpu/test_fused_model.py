"""Fused kernels and attention backends on a real GPU: against float64 closed forms and against the eager model."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES
from test_model_parity import TINY, inputs, official_forward, relative, tiny_model

from wan_fp8 import Attention, set_attention
from wan_fp8.attention.core import ATTENTION, AttentionCore, register_backends

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels(case, dtype) -> None:
    case(CUDA, dtype, fused=True)


@pytest.mark.parametrize("name", ["t2v", "i2v", "ti2v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fused_model_follows_the_official_mathematics(name: str, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_model(name, dtype)
    x, context = (t.to(dtype) for t in inputs(name))
    expected = official_forward(model.state_dict(), TINY[name], x, 973.0, context)
    model = model.to(CUDA)
    x, context, timestep = x.to(CUDA), context.to(CUDA), torch.tensor([973], device=CUDA)
    errors = {}
    for setting in ("triton", "eager"):
        model.fused_kernels = setting
        errors[setting] = relative(model(x, timestep, context).cpu(), expected)
    low, high = {torch.float32: (0, 1e-5), torch.bfloat16: (5e-4, 1e-2), torch.float16: (5e-5, 1.5e-3)}[dtype]
    assert all(low <= error < high for error in errors.values()), errors
    assert errors["triton"] < 1.1 * errors["eager"] + 1e-6, errors


def test_gelu_epilogue_is_the_tanh_form() -> None:
    from wan_fp8.models.layers import Linear

    generator = torch.Generator(CUDA).manual_seed(0)
    layer = Linear(512, 1024).to(CUDA, torch.bfloat16)
    for p in layer.parameters():
        p.copy_(torch.randn(p.shape, device=CUDA, generator=generator) / 16)
    x = torch.randn(2, 96, 512, device=CUDA, generator=generator).bfloat16()
    linear = x.double() @ layer.weight.double().T + layer.bias.double()
    exact = torch.nn.functional.gelu(linear, approximate="tanh")
    assert 1e-3 < relative(layer(x, gelu=True), exact) < 2.5e-3


@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "fa2", "fa3", "fa4"])
@pytest.mark.parametrize("tokens", [1, 130, 2047])
def test_attention_backends(backend: str, tokens: int) -> None:
    register_backends()
    generator = torch.Generator(CUDA).manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 3, 128, device=CUDA, generator=generator).bfloat16() for _ in range(3))
    core = set_attention(AttentionCore(), Attention(backend))
    reason = ATTENTION._backends[backend].refuse(core.request(q, k))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    exact = ATTENTION._backends["reference"].run(q.double(), k.double(), v.double())
    assert relative(core(q, k, v), exact) < 4e-3
    assert relative(core(q, k[:, : tokens // 2 + 1], v[:, : tokens // 2 + 1]), exact) > 1e-2 or tokens == 1


def test_no_host_synchronisation_inside_a_forward() -> None:
    model = tiny_model("t2v", torch.bfloat16).to(CUDA)
    x, context = (t.to(CUDA, torch.bfloat16) for t in inputs("t2v"))
    timestep = torch.tensor([973.0], device=CUDA)
    model(x, timestep, context)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, timestep, context)
    finally:
        torch.cuda.set_sync_debug_mode("default")
