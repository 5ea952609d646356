"""torch.compile of the blocks on a real GPU: the Triton kernels inside, weights that stay on the host, TF32."""

from __future__ import annotations

import pytest
import torch
from test_model_parity import inputs, relative, tiny_model

from wan_fp8 import Recipe, apply_recipe, compile_blocks, remove_compile
from wan_fp8.models.blocks import ForwardOptions

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _inference():
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", ["t2v", "ti2v"])
@pytest.mark.parametrize("kernels", ["triton", "eager"])
def test_compiled_equals_plain_and_compiles_once(name: str, kernels: str) -> None:
    model = tiny_model(name, torch.bfloat16).to(CUDA)
    model.fused_kernels = kernels
    exact = tiny_model(name, torch.float32).to(CUDA)
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})

    def both(model, frames=3, rows=6, step=900.0, seed=0):
        x, context = inputs(name, frames=frames, rows=rows, tokens=12 + seed)
        dtype = model.compute_dtype
        return model(x.to(CUDA, dtype), torch.tensor([step], device=CUDA), context.to(CUDA, dtype))

    runs = [{}, {"step": 30.0}, {"seed": 5}, {"frames": 5}, {"rows": 8, "frames": 2}]
    plain = [both(model, **run) for run in runs]
    truth = [both(exact, **run) for run in runs]
    compile_blocks(model, fullgraph=True)
    first = both(model, **runs[0])
    parts = model.compiled_parts[model.compile_setting]
    graphs = parts.graphs
    compiled = [first, *(both(model, **run) for run in runs[1:])]
    assert 1 <= parts.graphs == graphs
    for ours, theirs, oracle in zip(compiled, plain, truth, strict=True):
        assert relative(ours, oracle) < 1.3 * relative(theirs, oracle) + 1e-4
    remove_compile(model)
    assert all(torch.equal(both(model, **run), was) for run, was in zip(runs, plain, strict=True))


def test_tf32_is_used_inside_and_put_back() -> None:
    model = tiny_model("t2v").to(CUDA)
    x, context = (t.to(CUDA) for t in inputs("t2v"))
    timestep = torch.tensor([900.0], device=CUDA)
    plain = model(x, timestep, context)
    fast = model(x, timestep, context, options=ForwardOptions(tf32=True))
    assert 1e-5 < relative(fast, plain) < 1e-2
    assert torch.equal(model(x, timestep, context), plain)
    torch.backends.cuda.matmul.allow_tf32 = True
    assert torch.equal(model(x, timestep, context, options=ForwardOptions(tf32=False)), plain)
    assert torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("recipe", ["rowwise", "Float8CurrentScaling", "Float8BlockScaling", "DelayedScaling"])
def test_fp8_linears_compile(recipe: str) -> None:
    """The fused kernels cast to e4m3 inside what is compiled; their constants must not arrive as float64."""
    model = tiny_model("t2v", torch.bfloat16).to(CUDA)
    apply_recipe(model, Recipe(recipe, backend="torch"))
    model.fused_kernels = "triton"
    x, context = (t.to(CUDA, torch.bfloat16) for t in inputs("t2v"))
    timesteps = [torch.tensor([t], device=CUDA) for t in (900.0, 700.0)]
    plain = [model(x, t, context) for t in timesteps]
    compile_blocks(model, fullgraph=True)
    model.begin_run()
    compiled = [model(x, t, context) for t in timesteps]
    assert model.compiled_parts[model.compile_setting].graphs > 0
    for ours, theirs in zip(compiled, plain, strict=True):
        assert relative(ours, theirs) < 2e-2, "another rounding may move a value across a step of e4m3"
