"""Wan2.2 Attention: which MODELs it takes, what it tells, and FP8 only where its window and its guard allow it."""

from __future__ import annotations

import dataclasses
import logging

import bridge_kit as kit
import nodes_kit
import pytest
import torch
from nodes_kit import call, latents

pytestmark = pytest.mark.usefixtures("comfy_core", "inference")

SIZE = {"width": 32, "height": 32, "length": 5}
TEXT = {"positive": kit.prompt(1), "negative": kit.prompt(2)}
STEPS = 6
EXACT_BLOCKS = {"skip_first_blocks": 0, "skip_last_blocks": 0}


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def t2v(comfy_core):
    """New ones for each test: an attention remembers the backends that it found."""
    return kit.core_model("t2v", seed=0), kit.core_model("t2v", seed=1)


@pytest.fixture
def pack():
    """The attention package of the loaded pack, and its registry filled."""
    attention = nodes_kit.module("wan_fp8.attention")
    nodes_kit.module("wan_fp8.attention.core").register_backends()
    return attention


@pytest.fixture
def node_texts(request, monkeypatch):
    """What is put on the node that executes now, number 12 of a prompt of this test's own."""
    from comfy_execution.utils import CurrentNodeContext

    texts = []
    voice = nodes_kit.module("nodes.bridge.voice")
    monkeypatch.setattr(voice, "show_on_node", lambda node, text: texts.append(text) if node == "12" else None)
    with CurrentNodeContext(request.node.name, "12"):
        yield texts


def attended(model, **inputs):
    return call("WanFP8Attention", model=model, **inputs).args


def sample(model, model_low=None, **changes):
    inputs = dict(model=model, model_low=model_low, **TEXT, **SIZE, seed=7, steps=STEPS)
    if model_low is None:
        inputs["boundary"] = 0.0
    return latents(call("WanFP8SampleT2V", **{**inputs, **changes}))


def spied(monkeypatch, pack, name, change=None):
    """Calls of one backend, as the sigma of the step each belongs to; ``change`` spoils what it returns."""
    backend, calls = pack.ATTENTION.backend(name), []

    def run(q, k, v):
        calls.append(q.shape)
        out = backend.run(q, k, v)
        return out if change is None else change(out)

    replaced = type(backend)(name, run, backend.refuse, backend.exact, backend.priority)
    monkeypatch.setitem(pack.ATTENTION._backends, name, replaced)
    return calls


def told(output):
    """What a node shows under itself."""
    return "" if output.ui is None else output.ui.as_dict()["text"][0]


# ---- the node itself -----------------------------------------------------------------------------------------------


def test_every_backend_is_offered_and_the_order_stays(pack):
    settings = nodes_kit.module("nodes.settings")
    assert settings.BACKENDS == (
        "auto", "sdpa", "cudnn", "fa2", "fa3", "fa4", "fa3-fp8", "sage", "reference", "reference-fp8",
    )  # fmt: skip
    assert settings.EXACT_BACKENDS == ("auto", "sdpa", "cudnn", "fa2", "fa3", "fa4", "reference")
    assert set(settings.BACKENDS) == set(pack.ATTENTION.names)
    exact = {name for name in pack.ATTENTION.names[1:] if pack.ATTENTION.backend(name).exact}
    assert set(settings.EXACT_BACKENDS) == exact | {"auto"}


def test_defaults_are_the_engines(pack):
    schema = nodes_kit.load_pack()["WanFP8Attention"].GET_SCHEMA()
    defaults = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
    assert (defaults.pop("sparsity"), defaults.pop("sparsity_bound")) == ("off", 0.0)
    assert pack.Attention(**defaults) == pack.Attention()


def test_tells_what_auto_took_and_why_not_the_others(t2v, caplog):
    with caplog.at_level(logging.INFO):
        output = call("WanFP8Attention", model=t2v[0], model_low=t2v[1])
    text = told(output)
    assert text.splitlines()[0] == "attention auto: sdpa (flash kernel) on cpu, float32"
    assert "passed over fa3: it needs a Hopper GPU" in text and "passed over cudnn: it needs an NVIDIA GPU" in text
    assert text.count("attention auto") == 1, "two experts alike are told of once"
    assert all(line in [r.getMessage() for r in caplog.records] for line in text.splitlines())


@pytest.mark.parametrize("loads", [True, False])
def test_tells_whose_flash_attention_2_runs(t2v, pack, monkeypatch, loads):
    why = "flash_attn does not load (ImportError: undefined symbol)"
    flash2 = nodes_kit.module("wan_fp8.attention.backends.flash2")
    monkeypatch.setattr(flash2, "_package", lambda: (lambda q, k, v: q, "") if loads else (None, why))
    fa2 = dataclasses.replace(pack.ATTENTION.backend("fa2"), refuse=lambda _: None)
    monkeypatch.setitem(pack.ATTENTION._backends, "fa2", fa2)
    said = told(call("WanFP8Attention", model=t2v[0], backend="fa2"))
    whose = "flash-attn" if loads else f"torch's own kernel: {why}"
    assert said == f"attention fa2: fa2 ({whose}) on cpu, float32"


@pytest.mark.parametrize("backend", ["fa3", "fa3-fp8", "cudnn", "sage", "fa4"])
def test_a_backend_that_cannot_run_stops_the_node(t2v, backend):
    error = nodes_kit.module("wan_fp8.errors").BackendUnavailableError
    with pytest.raises(error, match=rf"attention backend '{backend}' cannot run here: it needs .*GPU"):
        attended(t2v[0], backend=backend)


def test_the_exact_backend_beside_is_checked_too(t2v):
    error = nodes_kit.module("wan_fp8.errors").BackendUnavailableError
    with pytest.raises(error, match="attention backend 'cudnn' cannot run here"):
        attended(t2v[0], backend="reference-fp8", exact="cudnn")
    attended(t2v[0], backend="reference", exact="cudnn")  # not used beside an exact one


def test_the_low_noise_expert_is_checked_and_may_be_absent(t2v):
    errors = nodes_kit.module("wan_fp8.errors")
    first, second = attended(t2v[0])
    with pytest.raises(errors.InputError, match="returns 'model_low' only when 'model_low' is connected"):
        second.clone()
    with pytest.raises(errors.UnsupportedPatchError, match="this MODEL holds a"):
        attended(t2v[0], model_low=nodes_kit.vae("2.1"))
    same = attended(first, model_low=first)
    assert same[0] is same[1]


def test_wrong_task_keeps_its_sentence():
    errors = nodes_kit.module("wan_fp8.errors")
    with pytest.raises(errors.UnsupportedPatchError, match=r"Wan2\.2 T2V-A14B"):
        attended(type("Patcher", (), {"model": None})())


# ---- on a MODEL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["core", "ours"])
def test_the_model_that_came_in_is_unchanged(whose, monkeypatch, pack):
    model = kit.core_model("t2v", seed=3)
    if whose == "ours":
        model = nodes_kit.module("nodes.bridge").fork(model)
    before = kit.ksample(model)
    options = {k: dict(v) if isinstance(v, dict) else v for k, v in model.model_options.items()}
    changed, _ = attended(model, backend="reference-fp8", skip_first_steps=0, skip_last_steps=0, **EXACT_BLOCKS)
    assert changed is not model and model.model_options == options
    calls = spied(monkeypatch, pack, "reference-fp8")
    with_fp8 = kit.ksample(changed)
    assert len(calls) == 2 * 2, "two steps, two blocks; guidance in one batch"
    assert 1e-4 < kit.distance(with_fp8, before) < 0.1
    calls.clear()
    assert torch.equal(kit.ksample(model), before) and not calls, "both in one graph, in either order"
    assert torch.equal(kit.ksample(changed), with_fp8)


def test_an_exact_backend_changes_the_kernel_and_not_the_numbers(t2v, monkeypatch, pack):
    calls = spied(monkeypatch, pack, "reference")
    plain = sample(t2v[0])
    assert not calls
    got = sample(attended(t2v[0], backend="reference")[0])
    assert len(calls) == STEPS * 2 * 2, "self- and cross-attention of two blocks"
    assert kit.distance(got, plain) < 1e-4


def test_lora_before_and_after_are_the_same():
    model = kit.core_model("t2v", seed=3)
    lora = kit.core_lora(kit.lora_pairs(model.model.diffusion_model.state_dict()))
    before, _ = attended(kit.with_core_lora(model, lora), backend="reference")
    after = kit.with_core_lora(attended(model, backend="reference")[0], lora)
    a, b = kit.ksample(before), kit.ksample(after)
    assert kit.distance(a, b) < 1e-6
    assert kit.distance(a, kit.ksample(attended(model, backend="reference")[0])) > 1e-3, "the LoRA takes part"
    assert kit.distance(a, kit.ksample(kit.with_core_lora(model, lora))) < 1e-4


def test_the_last_node_in_a_row_wins_and_others_keep_their_part(t2v):
    bridge = nodes_kit.module("nodes.bridge")
    model, _ = call("WanFP8Compile", model=t2v[0], tf32=True).args
    model, _ = attended(model, backend="reference")
    model, _ = attended(model, backend="sdpa")
    settings = bridge.settings_of(model)
    assert settings.attention.backend == "sdpa" and settings.tf32 is True


def test_the_same_core_model_is_forked_once(t2v):
    one, two = (attended(t2v[0], backend=name)[0] for name in ("reference", "sdpa"))
    assert one.model is two.model, "another setting does not load the weights again"


# ---- window and guard ----------------------------------------------------------------------------------------------


def windowed(model, model_low=None, **changes):
    window = {"skip_first_steps": 1, "skip_last_steps": 2, "skip_first_blocks": 1, "skip_last_blocks": 0}
    return attended(model, model_low=model_low, backend="reference-fp8", **{**window, **changes})


def test_fp8_only_inside_the_window(t2v, monkeypatch, pack, caplog):
    calls = spied(monkeypatch, pack, "reference-fp8")
    with caplog.at_level(logging.INFO):
        got = sample(windowed(t2v[0])[0], guidance=1.0)
    assert len(calls) == STEPS - 3, "the second of two blocks, in steps 1 to 3 of 0 to 5"
    assert "attention reference-fp8: used for 3 of 12 self-attentions, sdpa else" in caplog.text
    assert 0 < kit.distance(got, sample(t2v[0], guidance=1.0)) < 0.1


def test_the_window_is_counted_over_both_experts(t2v, monkeypatch, pack):
    """Step 0 is the high-noise expert's and the last two are the low-noise expert's: exact; the rest is FP8."""
    calls = spied(monkeypatch, pack, "reference-fp8")
    sample(*windowed(*t2v), guidance=1.0, guidance_low=1.0)
    assert len(calls) == STEPS - 3


def test_the_guard_refuses_falls_back_and_says_so(t2v, monkeypatch, pack, caplog, node_texts):
    exact = sample(t2v[0], guidance=1.0)
    calls = spied(monkeypatch, pack, "reference-fp8", change=lambda out: out + 1)
    model, _ = windowed(t2v[0])
    with caplog.at_level(logging.INFO):
        got = sample(model, guidance=1.0)
    assert len(calls) == 1, "one look, then the exact backend"
    assert torch.equal(got, exact)
    assert "attention reference-fp8 refused in block 1: relative error" in caplog.text
    assert "guard: reference-fp8 refused in 1 of 1 blocks, which ran exactly: 1 (" in caplog.text
    assert node_texts and "refused in 1 of 1 blocks" in node_texts[-1]
    calls.clear()
    sample(model, guidance=1.0)
    assert len(calls) == 1, "the next run is measured anew"


def test_the_guard_accepts_and_says_how_close_it_was(t2v, caplog, node_texts):
    with caplog.at_level(logging.INFO):
        sample(windowed(t2v[0])[0], guidance=1.0)
    assert "guard: worst relative error 0.0" in caplog.text and "the bound is 0.08" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "attention" in r.getMessage()]
    assert "used for 3 of 12" in node_texts[-1]


def test_no_guard_is_told_and_looks_at_nothing(t2v, monkeypatch, pack):
    output = call("WanFP8Attention", model=t2v[0], backend="reference-fp8", bound=0.0)
    assert "the guard is off: nothing will notice if reference-fp8 fails on this video" in told(output)
    core = nodes_kit.module("wan_fp8.attention.core")
    monkeypatch.setattr(core, "measure_error", lambda *args: pytest.fail("the guard is off"))
    sample(windowed(t2v[0], bound=0.0)[0])


def test_a_window_without_a_step_is_said(t2v, monkeypatch, pack, caplog):
    calls = spied(monkeypatch, pack, "reference-fp8")
    with caplog.at_level(logging.WARNING):
        sample(windowed(t2v[0], skip_first_steps=3, skip_last_steps=3)[0], guidance=1.0)
    assert not calls
    assert "attention reference-fp8 was not used: nothing in this run lies inside its window" in caplog.text


def test_both_experts_have_their_say_on_one_node(t2v, node_texts):
    high, low = windowed(*t2v)
    inputs = dict(**TEXT, **SIZE, seed=7, steps=STEPS, guidance=1.0, guidance_low=1.0)
    output = call("WanFP8SampleT2V", model=high, model_low=low, **inputs)
    for text in (node_texts[-1], told(output)):
        assert text.count("attention reference-fp8: used for") == 2, "on the node, and in the prompt's history"


def test_exact_attention_says_nothing(t2v, node_texts):
    output = call("WanFP8SampleT2V", model=t2v[0], boundary=0.0, **TEXT, **SIZE, seed=7, steps=STEPS)
    assert output.ui is None and not node_texts


def test_memory_is_estimated_for_the_copies_in_fp8(monkeypatch):
    memory, told = nodes_kit.module("wan_fp8.models.memory"), []
    estimate = memory.forward_needs

    def spy(*args, low_precision_attention, **kwargs):
        told.append(low_precision_attention)
        return estimate(*args, low_precision_attention=low_precision_attention, **kwargs)

    monkeypatch.setattr(nodes_kit.module("nodes.bridge.fork"), "forward_needs", spy)
    model = kit.core_model("t2v", seed=3)
    for given, expected in ((windowed(model)[0], True), (attended(model)[0], False), (windowed(model)[0], True)):
        told.clear()
        kit.ksample(given)
        assert told and set(told) == {expected}, "before the weights are loaded, and for the batch of each step"


def test_cores_sampler_is_told_as_well(caplog, node_texts):
    model, _ = windowed(kit.core_model("t2v", seed=3), skip_first_steps=0, skip_last_steps=1)
    with caplog.at_level(logging.INFO):
        kit.ksample(model)
    assert "attention reference-fp8: used for 1 of 4 self-attentions" in caplog.text
    assert "used for 1 of 4" in node_texts[-1]


# ---- sparse attention ----------------------------------------------------------------------------------------------


LARGER = {"width": 96, "height": 96, "length": 17}
"""180 tokens: two blocks."""


def test_sparsity_presets_are_the_engines(t2v, pack):
    sparse = nodes_kit.module("wan_fp8.attention.sparse")
    settings_of = nodes_kit.module("nodes.bridge").settings_of
    assert ("off", *sparse.presets()) == nodes_kit.module("nodes.settings").SPARSITIES
    output = call("WanFP8Attention", model=t2v[0], sparsity="fast", sparsity_bound=0.07)
    chosen = settings_of(output.args[0]).attention.sparsity
    assert (chosen.bound, chosen.coverage) == (0.07, sparse.presets()["fast"].coverage)
    assert "sparse attention: masked, between the first 15% and the last 5%" in told(output)
    assert "passed over fa4 for sparse: it needs a Hopper or Blackwell GPU" in told(output)
    assert settings_of(attended(t2v[0], sparsity="balanced")[0]).attention.sparsity == sparse.presets()["balanced"]
    with pytest.raises(nodes_kit.module("wan_fp8.errors").InputError, match="sparsity must be one of off, safe"):
        attended(t2v[0], sparsity="most")


def test_sparse_attention_in_a_run(t2v, monkeypatch, caplog, node_texts):
    sparse = nodes_kit.module("wan_fp8.attention.sparse")
    everywhere = sparse.Sparsity(policy="density", density=0.5, skip_first=0.3, skip_first_blocks=0, skip_last_blocks=0)
    monkeypatch.setitem(sparse.presets(), "fast", everywhere)
    plain = sample(t2v[0], guidance=1.0, **LARGER)
    model, _ = attended(t2v[0], sparsity="fast", sparsity_bound=0.0)
    with caplog.at_level(logging.INFO):
        got = sample(model, guidance=1.0, **LARGER)
    assert got.shape == plain.shape and 0 < float((got - plain).norm() / plain.norm()) < 0.5
    assert "sparse attention (density, masked): 6 of 12 self-attentions" in caplog.text  # 2 blocks, steps 3 to 5 of 6
    assert "dropped attention mass, measured on 6 samples" in node_texts[-1]
    (facts,) = model.model.diffusion_model.sparse_facts
    assert list(facts["density_by_step"]) == ["3", "4", "5"] and facts["answered"] == {"dense": 6, "masked": 6}
    assert facts["seconds_saved"] is not None
