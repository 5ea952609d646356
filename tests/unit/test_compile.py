"""torch.compile of the blocks: the same numbers, compiled once, undone without a trace. No code is generated here."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from test_model_parity import TINY, inputs, random_state, relative, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from wan_fp8 import Recipe, apply_recipe, compile_blocks, remove_compile
from wan_fp8.compile import Compile, CompiledParts
from wan_fp8.errors import InputError
from wan_fp8.hardware import DeviceCaps
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.wan import WanModel, build_model
from wan_fp8.quant import linear

GRAPHS = 4
"""One for each of the three parts, and one more because the first block has no branch to add yet."""


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def t2v():
    """A compiled model (traced only), its runner, and what it gave at first; the graphs are shared by the tests."""
    with torch.inference_mode():
        model = tiny_model("t2v")
        x, context = inputs("t2v")
        plain = model(x, torch.tensor([900.0]), context)
        compile_blocks(model, backend="eager", fullgraph=True)
        first = model(x, torch.tensor([900.0]), context)
    return model, next(iter(model.compiled_parts.values())), plain, first


def test_same_numbers_from_few_graphs(t2v) -> None:
    _, parts, plain, first = t2v
    assert torch.equal(first, plain)
    assert parts.graphs == GRAPHS


@pytest.mark.parametrize("what", ["step", "seed", "prompt", "longer prompt", "resolution", "length", "strength"])
def test_nothing_is_compiled_again(t2v, what: str) -> None:
    model, parts, *_ = t2v
    x, context = inputs("t2v")
    timestep = torch.tensor([123.0 if what == "step" else 900.0])
    if what == "seed":
        x = torch.randn(x.shape)
    elif what == "prompt":
        context = torch.randn(context.shape)
    elif what == "longer prompt":
        context = torch.randn(1, 50, 4096)
    elif what == "resolution":
        x, _ = inputs("t2v", rows=4, columns=10)
    elif what == "length":
        x, _ = inputs("t2v", frames=5)
    elif what == "strength":
        for linear in (model.blocks[1].self_attn.q, model.blocks[0].ffn[2]):
            linear.weight = torch.nn.Parameter(linear.weight * 1.25, requires_grad=False)
    got = model(x, timestep, context)
    assert parts.graphs == GRAPHS
    off = tiny_model("t2v")
    off.load_state_dict(model.state_dict())
    assert torch.equal(got, off(x, timestep, context))


@pytest.mark.parametrize("name", ["i2v", "ti2v"])
def test_other_tasks_and_timesteps_per_frame(name: str) -> None:
    model = tiny_model(name)
    x, context = inputs(name)
    timestep = torch.tensor([[0.0, 650.0, 650.0]]) if name == "ti2v" else torch.tensor([900.0])
    plain = model(x, timestep, context)
    compile_blocks(model, backend="aot_eager", fullgraph=True)
    assert relative(model(x, timestep, context), plain) < 1e-6
    parts = next(iter(model.compiled_parts.values()))
    assert parts.graphs == GRAPHS
    model(x, timestep / 2, context)
    assert parts.graphs == GRAPHS


def small(layers: int, dtype: torch.dtype = torch.float32) -> WanModel:
    with torch.device("meta"):
        model = build_model(dataclasses.replace(TINY["i2v"], num_layers=layers))
    model.load_state_dict({name: value.to(dtype) for name, value in random_state(model).items()}, assign=True)
    return model


def test_all_blocks_share_what_is_compiled() -> None:
    model = compile_blocks(small(layers=10), backend="eager")
    x, context = inputs("i2v")
    model(x, torch.tensor([900.0]), context)
    assert next(iter(model.compiled_parts.values())).graphs == GRAPHS


@pytest.mark.parametrize("recipe", ["DelayedScaling", "rowwise"])
def test_fp8_linears_and_their_delayed_scales(recipe: str) -> None:
    """Scales belong to layers, graphs to all of them. The first step of a run has no scales yet: graphs of its own."""
    model = apply_recipe(small(layers=6), Recipe(recipe, backend="reference"))
    x, context = inputs("i2v")

    def run() -> list[torch.Tensor]:
        model.begin_run()
        return [model(x, torch.tensor([step]), context) for step in (900.0, 800.0, 700.0)]

    plain = run()
    compile_blocks(model, backend="eager", fullgraph=True)
    compiled = run()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(compiled, plain, strict=True))
    assert next(iter(model.compiled_parts.values())).graphs == GRAPHS * (2 if recipe == "DelayedScaling" else 1)
    remove_compile(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(), plain, strict=True))


HOPPER, BLACKWELL = (9, 0), (10, 0)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # to lay weights out on the host
@pytest.mark.parametrize(
    ("recipe", "capability"),
    [
        ("DelayedScaling", HOPPER),
        ("Float8CurrentScaling", HOPPER),
        ("Float8BlockScaling", HOPPER),
        ("rowwise", HOPPER),
        ("MXFP8BlockScaling", BLACKWELL),
    ],
)
def test_products_of_a_gpu_are_traced_as_one_graph(recipe: str, capability: tuple[int, int], monkeypatch) -> None:
    """Without a GPU: tensors without memory, on what says that it is one. Inductor lowers a product by one scale only
    where both scales have as many dimensions, and knows block scaled ones as an operator of ours."""
    gpu = DeviceCaps(
        device=torch.device("cuda", 0),
        name="a GPU",
        capability=capability,
        total_memory_bytes=None,
        torch_version="2.11.0",
        cuda_version="13.0",
    )
    monkeypatch.setattr(linear, "device_caps", lambda device: gpu)
    graphs = []

    def keep(parts, graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(CompiledParts, "_generate", keep)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = apply_recipe(small(1, torch.bfloat16), Recipe(recipe, backend="torch"))
        x, context = (t.bfloat16() for t in inputs("i2v"))
        compile_blocks(model, fullgraph=True)
        model.begin_run()
        for step in (900.0, 800.0)[: 1 + (recipe == "DelayedScaling")]:  # its first step has no scales yet
            out = model(x, torch.tensor([step]), context)
    assert out.shape == (1, 16, *x.shape[2:])
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    by_one_or_row = [node for node in nodes if node.target is torch._scaled_mm]
    grouped = [node for node in nodes if "grouped_mm" in str(node.target)]
    assert not [node for node in nodes if "scaled_mm_v2" in str(node.target)]
    assert bool(grouped) == (recipe in ("Float8BlockScaling", "MXFP8BlockScaling")) != bool(by_one_or_row)
    for node in by_one_or_row:
        a, b = (node.kwargs[name].meta["example_value"].ndim for name in ("scale_a", "scale_b"))
        assert a == b


def test_static_tokens_are_compiled_by_size_beyond_torchs_own_limit(monkeypatch) -> None:
    import torch._dynamo

    monkeypatch.setattr("wan_fp8.compile.USUAL_LIMIT", 1)
    model = small(layers=1)
    compile_blocks(model, backend="eager", dynamic=False, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        for frames in (1, 2, 3, 4):
            x, context = inputs("i2v", frames=frames)
            model(x, torch.tensor([900.0]), context)
    assert next(iter(model.compiled_parts.values())).graphs == 4 * 3


def test_one_forward_can_ask_for_it_and_another_not() -> None:
    model = small(layers=1)
    x, context = inputs("i2v")
    timestep = torch.tensor([900.0])
    setting = Compile(backend="eager")
    plain = model(x, timestep, context)
    said: list[str] = []
    options = ForwardOptions(compile=setting, announce=said.append)
    assert torch.equal(model(x, timestep, context, options=options), plain)
    graphs = model.compiled_parts[setting].graphs
    assert graphs == 3 and len(said) == 2 * graphs
    assert "compiling graph 1" in said[0] and "3 graphs of the transformer block compiled in" in said[-1]
    assert torch.equal(model(x, timestep, context), plain)
    assert torch.equal(model(x, timestep, context, options=options), plain)
    assert model.compiled_parts[setting].graphs == graphs and len(said) == 2 * graphs
    assert model.compile_setting is None


def test_removal_restores_and_frees() -> None:
    model = small(layers=1)
    x, context = inputs("i2v")
    timestep = torch.tensor([900.0])
    plain = model(x, timestep, context)
    assert compile_blocks(compile_blocks(model, backend="eager"), backend="eager") is model
    model(x, timestep, context)
    (parts,) = model.compiled_parts.values()
    codes = [weakref.ref(function._torchdynamo_orig_callable) for function in parts._functions.values()]
    gone = weakref.ref(parts)
    del parts
    assert remove_compile(model) is model
    assert torch.equal(model(x, timestep, context), plain)
    gc.collect()
    assert gone() is None and all(code() is None for code in codes)
    whole = weakref.ref(model)
    compile_blocks(model, backend="eager")
    model(x, timestep, context)
    del model
    gc.collect()
    assert whole() is None, "compiled code keeps no model alive"


def test_hosts_replacements_work_around_compiled_parts() -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v")
    timestep = torch.tensor([900.0])
    calls: list[str] = []

    def replace(args, extra):
        calls.append("block")
        return extra["original_block"](args)

    def override(func, q, k, v, heads, mask=None, transformer_options=None):
        calls.append("attention")
        return func(q, k, v, heads, mask=mask) * 0.5

    hooks = {"block_replace": {0: replace}, "attention_override": override}
    plain = model(x, timestep, context, options=ForwardOptions(**hooks))
    said = len(calls)
    compiled = ForwardOptions(compile=Compile(backend="eager"), **hooks)
    assert torch.equal(model(x, timestep, context, options=compiled), plain)
    assert len(calls) == 2 * said


def test_wrong_settings_get_a_sentence() -> None:
    with pytest.raises(InputError, match="mode must be one of default, max-autotune-no-cudagraphs; got 'fastest'"):
        compile_blocks(torch.nn.Module(), mode="fastest")
    with pytest.raises(InputError, match="backend must be one of"):
        Compile(backend="tensorrt")
