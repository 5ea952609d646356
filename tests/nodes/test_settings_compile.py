"""Wan2.2 Compile and Precision in real sampling runs. Graphs are traced and run as they are: no code is generated."""

from __future__ import annotations

import logging

import bridge_kit as kit
import nodes_kit
import pytest
import torch
from nodes_kit import call, latents

pytestmark = pytest.mark.usefixtures("comfy_core", "inference")

SIZE = {"width": 32, "height": 32, "length": 5}
TEXT = {"positive": kit.prompt(1), "negative": kit.prompt(2)}


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def traced_only(comfy_core, monkeypatch):
    """Each graph that torch traces, by the size of its inputs; it is run as it is."""
    parts = nodes_kit.module("wan_fp8.compile").CompiledParts
    graphs = []

    def keep(self, graph, inputs):
        graphs.append(len(inputs))
        return graph

    monkeypatch.setattr(parts, "_generate", keep)
    return graphs


@pytest.fixture(scope="module")
def core(comfy_core):
    return kit.core_model("t2v", seed=3)


@pytest.fixture(scope="module")
def compiled(core):
    """The same MODEL with its blocks compiled, after its first run."""
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        parts = nodes_kit.module("wan_fp8.compile").CompiledParts
        patch.setattr(parts, "_generate", lambda self, graph, inputs: graph)
        model = changed(core, mode="default")
        kit.ksample(model)
    return model


def changed(model, **inputs):
    return call("WanFP8Compile", model=model, **inputs).args[0]


def settings(model):
    return nodes_kit.module("nodes.bridge").settings_of(model)


def graphs_of(model):
    return sum(parts.graphs for parts in model.model.diffusion_model.compiled_parts.values())


# ---- torch.compile -------------------------------------------------------------------------------------------------


def test_off_by_default(core):
    model = changed(core)
    assert settings(model).compile is None and settings(model).stream_dtype is None
    assert torch.equal(kit.ksample(model), kit.ksample(nodes_kit.module("nodes.bridge").hosted(core)))
    assert graphs_of(model) == 0


def test_same_latents_and_the_model_that_came_in_is_not_compiled(core, compiled, traced_only):
    plain = nodes_kit.module("nodes.bridge").hosted(core)
    assert plain.model is compiled.model, "both share one loaded transformer"
    before = graphs_of(compiled)
    assert before > 0
    one, two, three = kit.ksample(compiled), kit.ksample(plain), kit.ksample(compiled)
    assert torch.equal(one, two) and torch.equal(one, three)
    assert not traced_only and graphs_of(compiled) == before
    assert kit.distance(one, kit.ksample(core)) < 1e-5


@pytest.mark.parametrize("change", ["steps", "seed", "prompt", "longer prompts", "resolution", "guidance", "sampler"])
def test_another_run_compiles_nothing(compiled, traced_only, change):
    changes = {
        "steps": {"steps": 5},
        "seed": {"seed": 8},
        "prompt": {"positive": kit.prompt(9), "negative": kit.prompt(10)},
        "longer prompts": {"positive": kit.prompt(9, rows=20), "negative": kit.prompt(10, rows=20)},
        "resolution": {"latent": kit.empty_latent(frames=3, size=6)},
        "guidance": {"cfg": 7.0},
        "sampler": {"sampler": "heun"},
    }
    kit.ksample(compiled, **changes[change])
    assert not traced_only


def test_strengths_of_a_lora_compile_nothing(compiled, traced_only):
    lora = kit.core_lora(kit.lora_pairs(compiled.model.diffusion_model.state_dict()))
    plain = kit.ksample(compiled)
    kit.ksample(kit.with_core_lora(compiled, lora, 0.5))
    traced_only.clear()  # merged weights may be another kind of tensor than loaded ones, once
    results = [kit.ksample(kit.with_core_lora(compiled, lora, strength)) for strength in (0.1, 0.9, 0.5)]
    assert all(kit.distance(result, plain) > 1e-3 for result in results)
    assert torch.equal(kit.ksample(compiled), plain)
    assert not traced_only


def test_lora_before_and_after_are_the_same(core, traced_only):
    lora = kit.core_lora(kit.lora_pairs(core.model.diffusion_model.state_dict()))
    after = kit.ksample(kit.with_core_lora(changed(core, mode="default"), lora))
    before = kit.ksample(changed(kit.with_core_lora(core, lora), mode="default"))
    assert kit.distance(before, after) < 1e-6 and traced_only


@pytest.mark.parametrize("with_lora", [False, True])
def test_weights_that_stay_on_the_host(core, with_lora, traced_only):
    """Core's own transfers and patches on the way are called as they are, between graphs."""
    lora = kit.core_lora(kit.lora_pairs(core.model.diffusion_model.state_dict()))
    plain = nodes_kit.module("nodes.bridge").fork(core)
    plain = kit.with_core_lora(plain, lora) if with_lora else plain
    model = changed(plain, mode="default")

    def forward(patcher):
        net = patcher.model.diffusion_model
        patcher.patch_model(torch.device("cpu"), lowvram_model_memory=1)
        try:
            assert any(getattr(module, "comfy_cast_weights", False) for module in net.modules())
            x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
            rows = kit.prompt(1)[0][0]
            return net(x, torch.tensor([500.0]), rows, transformer_options=patcher.model_options["transformer_options"])
        finally:
            patcher.unpatch_model(torch.device("cpu"))

    assert torch.equal(forward(model), forward(plain))
    assert traced_only


def test_after_and_before_an_fp8_recipe(core, traced_only):
    recipe = {"recipe": "DelayedScaling", "backend": "reference"}
    quantised = call("WanFP8Recipe", model=core, **recipe).args[0]
    plain = kit.ksample(quantised, steps=3)
    after = changed(quantised, mode="default")
    assert torch.equal(kit.ksample(after, steps=3), plain)
    assert traced_only
    before = call("WanFP8Recipe", model=changed(core, mode="default"), **recipe).args[0]
    assert torch.equal(kit.ksample(before, steps=3), plain)
    assert graphs_of(before) == graphs_of(after) > 0


def test_says_when_it_compiles(core, monkeypatch, caplog):
    from comfy_execution.utils import CurrentNodeContext

    texts = []
    voice = nodes_kit.module("nodes.bridge.voice")
    monkeypatch.setattr(voice, "show_on_node", lambda node, text: texts.append(text))
    model = changed(nodes_kit.module("nodes.bridge").fork(core), mode="default")
    with CurrentNodeContext("says when it compiles", "5"), caplog.at_level(logging.INFO):
        kit.ksample(model)
    assert texts[0].startswith("torch.compile (default): compiling graph 1 of the transformer block")
    assert f"{graphs_of(model)} graphs of the transformer block compiled in" in texts[-1]
    assert texts[-1] in [record.getMessage() for record in caplog.records]


def test_cancel_stops_a_compiled_run(compiled):
    import comfy.model_management as management

    expected = kit.ksample(compiled)
    calls = []
    attention = nodes_kit.module("wan_fp8.attention.core").AttentionCore
    forward = attention.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            management.interrupt_current_processing()
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "forward", counted)
        with pytest.raises(management.InterruptProcessingException):
            kit.ksample(compiled)
    management.interrupt_current_processing(False)
    assert len(calls) == 2, "within the block"
    assert torch.equal(kit.ksample(compiled), expected)


def test_a_machine_that_cannot_compile_stops_the_node(core, monkeypatch):
    error = nodes_kit.module("wan_fp8.errors").BackendUnavailableError
    monkeypatch.setenv("PATH", "")
    with pytest.raises(error, match=r"torch\.compile cannot run on cpu: it needs a C\+\+ compiler.*set mode to 'off'"):
        changed(core, mode="default")
    changed(core, mode="off")


# ---- precision -----------------------------------------------------------------------------------------------------


def test_tf32_in_this_models_steps_only(core):
    matmul, seen = torch.backends.cuda.matmul, []
    model = changed(core, tf32=True)
    layer = model.model.diffusion_model.blocks[0].ffn[2]
    hook = layer.register_forward_pre_hook(lambda *_: seen.append(matmul.allow_tf32))
    try:
        kit.ksample(model)
        assert set(seen) == {True} and not matmul.allow_tf32
        seen.clear()
        kit.ksample(changed(core, tf32=False))
        assert set(seen) == {False}
    finally:
        hook.remove()


def test_tf32_without_a_gpu_for_it_is_said(core, caplog):
    with caplog.at_level(logging.WARNING):
        changed(core, tf32=True)
    assert "tf32 has no effect on cpu: it needs an NVIDIA GPU of Ampere or later" in caplog.text


def test_residual_stream_of_this_model_only(core):
    half = changed(core, residual_stream="bfloat16")
    plain = changed(core)
    assert half.model is plain.model
    exact, rounded = kit.ksample(plain), kit.ksample(half)
    assert 1e-4 < kit.distance(rounded, exact) < 0.05
    assert torch.equal(kit.ksample(plain), exact)


# ---- guidance in one batch or in two calls -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t2v", "ti2v"])
def test_memory_decides_and_the_numbers_stay(kind, monkeypatch):
    import comfy.model_management as management

    wan = nodes_kit.module("wan_fp8.models.wan")
    forward, batches = wan.WanModel.forward, []

    def counted(self, x, *args, **kwargs):
        batches.append(x.shape[0])
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(wan.WanModel, "forward", counted)
    model = nodes_kit.module("nodes.bridge").hosted(kit.core_model(kind, seed=3))
    latent = kit.empty_latent(model.model.latent_format.latent_channels, size=4)
    shape = list(latent["samples"].shape)
    needed = {batch: model.model.memory_required([batch, *shape[1:]]) for batch in (1, 2)}
    assert needed[1] < needed[2] <= 2 * needed[1]
    results = {}
    for free, expected in ((1.5 * needed[2] + 1, [2, 2]), (1.5 * needed[2] - 1, [1, 1, 1, 1])):
        monkeypatch.setattr(management, "get_free_memory", lambda *args, free=free, **kw: free)
        batches.clear()
        results[len(expected)] = kit.ksample(model, latent)
        assert batches == expected
    assert kit.distance(results[2], results[4]) < 1e-5


def test_nothing_piles_up_over_the_steps(compiled):
    import gc

    seen = []

    def count(step, denoised, x, total):
        if step % 5 != 4:
            return
        gc.collect()
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"
        }
        seen.append((len(storages), sum(storages.values())))

    kit.ksample(compiled, steps=20, callback=count)
    assert len(seen) == 4 and len(set(seen)) == 1, seen


def test_our_sampler_takes_compiled_experts(core, compiled):
    inputs = dict(**TEXT, **SIZE, seed=7, steps=3)
    plain = latents(call("WanFP8SampleT2V", model=core, model_low=core, **inputs))
    assert torch.equal(latents(call("WanFP8SampleT2V", model=compiled, model_low=compiled, **inputs)), plain)
