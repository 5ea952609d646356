"""Our DiT against code that we did not write: diffusers' WanTransformer3DModel, core ComfyUI's WanModel, and the
official mathematics.

Where the three differ we follow the official code (Wan-Video/Wan2.2 ``wan/modules/model.py``):
- residual stream: official fp32 after the first gated add; diffusers and core keep the compute type. Equal when
  everything is fp32.
- qk RMSNorm: official rounds to bf16 before the gain; we round once after it. Equal in fp32.
- time MLP: official fp32 with fp64 angles; core feeds the compute type. Equal in fp32 up to the fp32 sinusoid of the
  others.
- rotary angles: official complex128; diffusers and core rotate with fp32 tables.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from wan_fp8.models.specs import ModelSpec, Task
from wan_fp8.models.wan import WanModel, build_model

TINY = {
    "t2v": ModelSpec(
        task=Task.T2V, dim=256, ffn_dim=384, num_heads=2, num_layers=2, in_dim=16, out_dim=16, text_dim=4096
    ),
    "i2v": ModelSpec(
        task=Task.I2V, dim=128, ffn_dim=256, num_heads=1, num_layers=2, in_dim=36, out_dim=16, text_dim=4096
    ),
    "ti2v": ModelSpec(
        task=Task.TI2V, dim=256, ffn_dim=384, num_heads=2, num_layers=2, in_dim=48, out_dim=48, text_dim=4096
    ),
}
TOLERANCE = 1e-5
"""Relative L2 error in fp32 on a CPU."""


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def random_state(model: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        value = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
            value = 1 + 0.2 * value
        elif tensor.ndim > 1 and "modulation" not in name:
            value = value / math.sqrt(tensor[0].numel())
        else:
            value = 0.3 * value
        state[name] = value
    return state


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> WanModel:
    with torch.device("meta"):
        model = build_model(TINY[name])
    model.load_state_dict({k: v.to(dtype) for k, v in random_state(model).items()}, assign=True)
    return model


def inputs(name: str, batch: int = 1, frames: int = 3, rows: int = 6, columns: int = 8, tokens: int = 12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, TINY[name].in_dim, frames, rows, columns, generator=generator)
    context = torch.randn(batch, tokens, 4096, generator=generator)
    return x, context


@pytest.mark.parametrize("name", ["t2v", "i2v", "ti2v"])
@pytest.mark.parametrize("batch", [1, 2])
def test_core_agrees(comfy_core, name: str, batch: int) -> None:
    import comfy.ldm.wan.model
    import comfy.ops

    spec = TINY[name]
    theirs = comfy.ldm.wan.model.WanModel(
        model_type="t2v", in_dim=spec.in_dim, out_dim=spec.out_dim, dim=spec.dim, ffn_dim=spec.ffn_dim,
        num_heads=spec.num_heads, num_layers=spec.num_layers, operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
    )  # fmt: skip
    ours = tiny_model(name)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, context = inputs(name, batch)
    timestep = torch.tensor([987.0, 412.0][:batch])
    with torch.inference_mode():
        assert relative(ours(x, timestep, context), theirs(x, timestep, context)) < TOLERANCE


def test_core_agrees_on_timesteps_per_frame(comfy_core) -> None:
    import comfy.ldm.wan.model
    import comfy.ops

    spec = TINY["ti2v"]
    theirs = comfy.ldm.wan.model.WanModel(
        model_type="t2v", in_dim=48, out_dim=48, dim=spec.dim, ffn_dim=spec.ffn_dim, num_heads=spec.num_heads,
        num_layers=spec.num_layers, operations=comfy.ops.disable_weight_init, dtype=torch.float32,
    )  # fmt: skip
    ours = tiny_model("ti2v")
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, context = inputs("ti2v", batch=2)
    timestep = torch.tensor([[0.0, 712.0, 712.0], [0.0, 33.0, 33.0]])
    with torch.inference_mode():
        assert relative(ours(x, timestep, context), theirs(x, timestep, context)) < TOLERANCE


def diffusers_twin(name: str, ours: WanModel):
    from diffusers import WanTransformer3DModel

    spec = TINY[name]
    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=spec.num_heads, attention_head_dim=128, in_channels=spec.in_dim,
        out_channels=spec.out_dim, text_dim=4096, freq_dim=256, ffn_dim=spec.ffn_dim, num_layers=spec.num_layers,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6,
    ).eval()  # fmt: skip
    renames = [
        ("head.modulation", "scale_shift_table"), ("head.head", "proj_out"), ("modulation", "scale_shift_table"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"), ("norm3", "norm2"), ("self_attn.o", "attn1.to_out.0"),
        ("cross_attn.o", "attn2.to_out.0"), ("self_attn.norm", "attn1.norm"), ("cross_attn.norm", "attn2.norm"),
        ("self_attn.", "attn1.to_"), ("cross_attn.", "attn2.to_"), ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
    ]  # fmt: skip
    state = {}
    for key, value in ours.state_dict().items():
        for official, diffusers_name in renames:
            if official in key:
                key = key.replace(official, diffusers_name)
                break
        state[key] = value
    theirs.load_state_dict(state, strict=True)
    return theirs


@pytest.mark.parametrize("name", ["t2v", "i2v"])
def test_diffusers_agrees(name: str) -> None:
    ours = tiny_model(name)
    theirs = diffusers_twin(name, ours)
    x, context = inputs(name, batch=2)
    timestep = torch.tensor([987, 412])
    with torch.inference_mode():
        expected = theirs(x, timestep, context, return_dict=False)[0]
        assert relative(ours(x, timestep, context), expected) < TOLERANCE


def test_diffusers_agrees_on_timesteps_per_token() -> None:
    ours = tiny_model("ti2v")
    theirs = diffusers_twin("ti2v", ours)
    x, context = inputs("ti2v")
    per_token = torch.full((1, 3 * 3 * 4), 650.0)
    per_token[:, :12] = 0
    with torch.inference_mode():
        expected = theirs(x, per_token, context, return_dict=False)[0]
        assert relative(ours(x, per_token, context), expected) < TOLERANCE
        per_frame = torch.tensor([[0.0, 650.0, 650.0]])
        assert torch.equal(ours(x, per_frame, context), ours(x, per_token, context))


def official_forward(w: dict[str, Tensor], spec: ModelSpec, x: Tensor, t: float, context: Tensor) -> Tensor:
    """The official mathematics for one sample, straight from its description, in float64 and complex128."""
    w = {k: v.double() for k, v in w.items()}
    linear = lambda name, v: v @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    gelu = lambda v: 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))  # noqa: E731
    silu = lambda v: v / (1 + torch.exp(-v))  # noqa: E731

    def layer_norm(v: Tensor) -> Tensor:
        return (v - v.mean(-1, keepdim=True)) / torch.sqrt(v.var(-1, unbiased=False, keepdim=True) + 1e-6)

    def rms(v: Tensor, name: str) -> Tensor:
        return v / torch.sqrt((v * v).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    _, _, frames, rows, columns = x.shape
    grid = (frames, rows // 2, columns // 2)
    tokens = []
    kernel = w["patch_embedding.weight"].flatten(1)
    for f in range(grid[0]):
        for i in range(grid[1]):
            for j in range(grid[2]):
                patch = x[0, :, f, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].double()
                tokens.append(kernel @ patch.reshape(-1) + w["patch_embedding.bias"])
    hidden = torch.stack(tokens)

    angle = t * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    e = linear("time_embedding.2", silu(linear("time_embedding.0", torch.cat([angle.cos(), angle.sin()]))))
    e0 = linear("time_projection.1", silu(e)).view(6, spec.dim)
    text = linear("text_embedding.2", gelu(linear("text_embedding.0", context[0].double())))

    def rotations(length: int, width: int) -> Tensor:
        theta = 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        return torch.polar(
            torch.ones(length, width // 2, dtype=torch.float64), torch.outer(torch.arange(length).double(), theta)
        )

    parts = [rotations(n, width) for n, width in zip(grid, (44, 42, 42), strict=True)]
    turn = torch.stack(
        [
            torch.cat([parts[0][f], parts[1][i], parts[2][j]])
            for f in range(grid[0])
            for i in range(grid[1])
            for j in range(grid[2])
        ]
    )

    def rotate(v: Tensor) -> Tensor:
        pairs = torch.view_as_complex(v.reshape(v.shape[0], spec.num_heads, 64, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(128)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)

    heads = lambda v: v.view(v.shape[0], spec.num_heads, 128)  # noqa: E731
    for n in range(spec.num_layers):
        p = f"blocks.{n}"
        m = w[f"{p}.modulation"][0] + e0
        a = layer_norm(hidden) * (1 + m[1]) + m[0]
        q = rms(linear(f"{p}.self_attn.q", a), f"{p}.self_attn.norm_q")
        k = rms(linear(f"{p}.self_attn.k", a), f"{p}.self_attn.norm_k")
        y = attention(rotate(q), rotate(k), heads(linear(f"{p}.self_attn.v", a)))
        hidden = hidden + linear(f"{p}.self_attn.o", y) * m[2]
        c = layer_norm(hidden) * w[f"{p}.norm3.weight"] + w[f"{p}.norm3.bias"]
        q = rms(linear(f"{p}.cross_attn.q", c), f"{p}.cross_attn.norm_q")
        k = rms(linear(f"{p}.cross_attn.k", text), f"{p}.cross_attn.norm_k")
        y = attention(heads(q), heads(k), heads(linear(f"{p}.cross_attn.v", text)))
        hidden = hidden + linear(f"{p}.cross_attn.o", y)
        b = layer_norm(hidden) * (1 + m[4]) + m[3]
        hidden = hidden + linear(f"{p}.ffn.2", gelu(linear(f"{p}.ffn.0", b))) * m[5]
    m = w["head.modulation"][0] + e
    out = linear("head.head", layer_norm(hidden) * (1 + m[1]) + m[0])
    out = out.view(*grid, 1, 2, 2, spec.out_dim)
    return torch.einsum("fhwpqrc->cfphqwr", out).reshape(1, spec.out_dim, frames, rows, columns)


@pytest.mark.parametrize("name", ["t2v", "i2v", "ti2v"])
def test_official_mathematics(name: str) -> None:
    x, context = inputs(name)
    weights = tiny_model(name).state_dict()
    expected = official_forward(weights, TINY[name], x, 973.0, context)
    with torch.inference_mode():
        single = tiny_model(name)(x, torch.tensor([973]), context)
        assert single.dtype == torch.float32
        assert relative(single, expected) < TOLERANCE
        double = tiny_model(name, torch.float64)(x.double(), torch.tensor([973]), context.double())
        assert double.dtype == torch.float64
        assert relative(double, expected) < 1e-12


def test_bf16_is_near_and_not_exact() -> None:
    """Two-sided: an error below bf16 rounding would mean that another type was computed in."""
    x, context = inputs("t2v")
    expected = official_forward(
        tiny_model("t2v", torch.bfloat16).state_dict(), TINY["t2v"], x.bfloat16(), 500.0, context.bfloat16()
    )
    with torch.inference_mode():
        ours = tiny_model("t2v", torch.bfloat16)(x.bfloat16(), torch.tensor([500]), context.bfloat16())
    assert ours.dtype == torch.float32
    assert 5e-4 < relative(ours, expected) < 1e-2
