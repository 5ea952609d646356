"""Step caching in real sampling runs: our samplers and core's, with everything else that sits on a MODEL."""

from __future__ import annotations

import json
import logging
import re

import bridge_kit as kit
import nodes_kit
import pytest
import torch
from nodes_kit import call, latents

pytestmark = pytest.mark.usefixtures("comfy_core", "inference", "curves")

SIZE = {"width": 32, "height": 32, "length": 5}
TEXT = {"positive": kit.prompt(1), "negative": kit.prompt(2)}
STEPS = 20


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def curves(comfy_core, tmp_path, monkeypatch):
    """An empty folder of curves, and the only one."""
    import folder_paths

    nodes_kit.load_pack()
    folder = tmp_path / "magcache"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "wan_magcache", ([str(folder)], set()))
    folder_paths.filename_list_cache.pop("wan_magcache", None)
    yield folder
    folder_paths.filename_list_cache.pop("wan_magcache", None)


@pytest.fixture(scope="module")
def t2v(comfy_core):
    return kit.core_model("t2v", seed=0), kit.core_model("t2v", seed=1)


@pytest.fixture(scope="module")
def ti2v(comfy_core):
    return kit.core_model("ti2v", seed=0)


def bridge():
    return nodes_kit.module("nodes.bridge")


def cached(model, low=None, **inputs):
    """One or both MODELs behind Wan2.2 MagCache."""
    both = {"model": model} if low is None else {"model": model, "model_low": low}
    out = call("WanFP8MagCache", **both, **{"curve": "published", **inputs}).args
    return out[0] if low is None else tuple(out)


def sample(models, **changes):
    inputs = dict(model=models[0], model_low=models[1], **TEXT, **SIZE, seed=7, steps=STEPS)
    return latents(call("WanFP8SampleT2V", **{**inputs, **changes}))


@pytest.fixture
def said(caplog):
    """What runs reported: (computed, total, skipped) by expert."""
    caplog.set_level(logging.INFO, logger="wan_fp8")

    def read():
        pattern = r"^(\w+)(?: \(([\w-]+) expert\))?: (\d+) of (\d+) passes computed, (\d+) skipped"
        found = [re.match(pattern, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return [(m[2], int(m[3]), int(m[4]), int(m[5])) for m in found if m]

    return read


@pytest.fixture
def blocks_run(monkeypatch):
    """Batch of every call of a block."""
    block, sizes = nodes_kit.module("wan_fp8.models.blocks").WanBlock, []
    forward = block.forward

    def counted(self, stream, state):
        if self.index == 0:
            sizes.append(stream._x.shape[0])
        return forward(self, stream, state)

    monkeypatch.setattr(block, "forward", counted)
    return sizes


def planned(setting, steps=STEPS, share=None, task="t2v", shift=12.0):
    """Passes that a setting skips, by the engine alone."""
    caching, sampling = nodes_kit.module("wan_fp8.caching"), nodes_kit.module("wan_fp8.sampling")
    specs = nodes_kit.module("wan_fp8.models.specs")
    first, end, expert = share
    plan = caching.RunPlan(
        spec=specs.SPECS[f"{task}-A14B"],
        schedule=tuple(sampling.sigmas(steps, shift, "unipc").float().tolist()),
        first=first,
        end=end,
        expert=expert,
    )
    return setting.start(plan).decisions


# ---- our samplers --------------------------------------------------------------------------------------------------


def test_both_experts_skip_what_the_curve_says(t2v, said, blocks_run):
    magcache = nodes_kit.module("wan_fp8.caching").MagCache
    switch = nodes_kit.module("wan_fp8.sampling").high_noise_steps(
        nodes_kit.module("wan_fp8.sampling").timesteps(STEPS, 12.0, "unipc"), 0.875
    )
    plain = sample(t2v)
    assert said() == [] and sum(blocks_run) == 2 * STEPS
    blocks_run.clear()
    result = sample(cached(*t2v))
    high = len(planned(magcache(0.12, 2, 0.2), share=(0, switch, "high_noise")))
    low = len(planned(magcache(0.12, 2, 0.2), share=(switch, STEPS, "low_noise")))
    assert high and low
    assert said() == [
        ("high-noise", 2 * switch - high, 2 * switch, high),
        ("low-noise", 2 * (STEPS - switch) - low, 2 * (STEPS - switch), low),
    ]
    assert sum(blocks_run) == 2 * STEPS - high - low
    assert 1e-4 < kit.distance(result, plain) < 1
    assert torch.equal(sample(cached(*t2v)), result), "a second run in the same server begins afresh"
    assert torch.equal(sample(t2v), plain), "the MODELs that came in are as they were"


def test_nothing_skipped_is_the_same_to_the_bit(t2v, said):
    plain = sample(t2v)
    assert torch.equal(sample(cached(*t2v, preset="custom", max_skips=0)), plain)
    assert [skipped for *_, skipped in said()] == [0, 0]


@pytest.mark.parametrize("phase", ["in_phase", "published"])
def test_memory_decides_about_batches_and_the_numbers_stay(t2v, phase, said, blocks_run, monkeypatch):
    import comfy.model_management as management

    models = cached(*t2v, phase=phase)
    needed = models[0].model.memory_required([2, 16, 2, 4, 4])
    results, reports = [], []
    for free in (10 * needed, needed):
        monkeypatch.setattr(management, "get_free_memory", lambda *args, free=free, **kw: free)
        blocks_run.clear()
        results.append(sample(models))
        reports.append(said())
        assert set(blocks_run) == ({2} if free > 5 * needed and phase == "in_phase" else set(blocks_run))
    assert reports[0] == reports[1]
    assert kit.distance(results[0], results[1]) < 1e-4


def test_without_guidance_only_cond_is_there(t2v, said):
    sample(cached(*t2v), guidance=1.0, guidance_low=1.0)
    reports = said()
    assert sum(total for _, _, total, _ in reports) == STEPS
    assert all(skipped for *_, skipped in reports)


@pytest.mark.parametrize("image", [False, True])
def test_ti2v_with_and_without_a_timestep_per_frame(ti2v, image, said):
    samples = {} if not image else {"noise_mask": torch.ones(1, 1, 2, 2, 2).index_fill(2, torch.tensor(0), 0.0)}
    latent = kit.empty_latent(48, size=2) | samples
    model = cached(bridge().set_shift(ti2v, 5.0))
    caching = nodes_kit.module("wan_fp8.caching")
    seen = []
    start = caching.MagCache.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching.MagCache, "start", lambda self, plan: seen.append(plan.per_frame) or start(self, plan))
        kit.ksample(model, latent, steps=STEPS)
    assert seen == [image]
    ((_, computed, total, skipped),) = said()
    assert total == 2 * STEPS == computed + skipped and skipped > 4


# ---- core's samplers -----------------------------------------------------------------------------------------------


def test_cores_pair_of_samplers(t2v, said):
    """Each knows its own steps only, and nobody says which expert it holds."""
    high, low = (bridge().set_shift(model, 12.0) for model in t2v)
    high, low = cached(high, low)
    kit.ksample(high, steps=STEPS, scheduler="simple", last_step=13, force_full_denoise=False)
    kit.ksample(low, steps=STEPS, scheduler="simple", start_step=13, disable_noise=True)
    (first, second) = said()
    assert first[0] == "high-noise" and first[2] == 26 and first[3] >= 4
    assert second[0] == "low-noise" and second[2] == 14 and second[3] >= 2


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2s_ancestral"])
def test_solvers_that_evaluate_more_than_once_a_step(ti2v, sampler, said):
    kit.ksample(cached(bridge().set_shift(ti2v, 5.0)), kit.empty_latent(48, size=2), steps=12, sampler=sampler)
    ((_, _, total, skipped),) = said()
    assert total == 2 * (2 * 12 - 1) and skipped > 2 and skipped % 2 == 0


def windows(model, **options):
    from comfy.context_windows import (
        ContextFuseMethods,
        ContextSchedules,
        IndexListContextHandler,
        get_matching_context_schedule,
        get_matching_fuse_method,
    )

    model = model.clone()
    model.model_options["context_handler"] = IndexListContextHandler(
        context_schedule=get_matching_context_schedule(options.pop("schedule", ContextSchedules.STATIC_STANDARD)),
        fuse_method=get_matching_fuse_method(ContextFuseMethods.PYRAMID),
        context_length=3,
        context_overlap=1,
        dim=2,
    )
    return model


def test_context_windows_are_kept_apart(ti2v, said):
    """Windows of equal shape: mixed up, the two halves of the video would be added to each other."""
    from comfy.context_windows import ContextSchedules

    latent = {"samples": torch.zeros(1, 48, 5, 2, 2)}
    shifted = bridge().set_shift(ti2v, 5.0)
    model = windows(cached(shifted))
    ours = kit.ksample(model, latent, steps=12)
    ((_, _, total, skipped),) = said()
    assert total == 2 * 2 * 12 and skipped > 8
    plain = kit.ksample(windows(shifted), latent, steps=12)
    mixed_up = nodes_kit.module("nodes.bridge.hosted_model")
    position = mixed_up.position_of_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mixed_up,
            "position_of_run",
            lambda options, expert: position({k: v for k, v in options.items() if k != "context_window"}, expert),
        )
        wrong = kit.ksample(model, latent, steps=12)
    assert kit.distance(ours, plain) < 0.8 * kit.distance(wrong, plain)
    said()
    kit.ksample(windows(cached(shifted), schedule=ContextSchedules.UNIFORM_LOOPED), latent, steps=12)
    ((_, _, total, skipped),) = said()
    assert skipped < total / 2, "windows that move are computed where they are new"


def test_windows_without_frames_are_refused(ti2v):
    error = nodes_kit.module("wan_fp8.errors").UnsupportedPatchError
    model = cached(bridge().set_shift(ti2v, 5.0)).clone()
    model.model_options["transformer_options"]["context_window"] = object()
    with pytest.raises(error, match="context windows of the kind object do not say which frames they hold"):
        kit.ksample(model, kit.empty_latent(48, size=2), steps=12)


# ---- with what else sits on a MODEL --------------------------------------------------------------------------------


def test_with_a_lora_before_and_after(t2v, said):
    file = kit.core_lora(kit.lora_pairs(kit.core_weights("t2v")))
    before = sample(tuple(kit.with_core_lora(model, file, 0.5) for model in t2v))
    plain = sample(tuple(cached(model) for model in t2v))
    first = sample(cached(*(kit.with_core_lora(model, file, 0.5) for model in t2v)))
    second = sample(tuple(kit.with_core_lora(model, file, 0.5) for model in cached(*t2v)))
    assert kit.distance(first, second) < 1e-5 < kit.distance(first, plain)
    assert kit.distance(first, before) > 1e-4
    assert all(skipped for *_, skipped in said())


@pytest.mark.parametrize("recipe", ["DelayedScaling", "rowwise"])
def test_with_an_fp8_recipe(t2v, recipe, said):
    models = call("WanFP8Recipe", model=t2v[0], model_low=t2v[1], recipe=recipe, backend="reference").args
    exact = sample(models)
    ours = sample(cached(*models))
    assert len(said()) == 2 and 1e-4 < kit.distance(ours, exact) < 1
    after = call(
        "WanFP8Recipe",
        **dict(zip(("model", "model_low"), cached(*t2v), strict=True)),
        recipe=recipe,
        backend="reference",
    )
    assert torch.equal(sample(after.args), ours)
    assert all(skipped for *_, skipped in said())


def test_with_compiled_blocks(t2v, said, monkeypatch):
    parts = nodes_kit.module("wan_fp8.compile").CompiledParts
    monkeypatch.setattr(parts, "_generate", lambda self, graph, inputs: graph)
    plain = sample(cached(*t2v))
    compiled = call("WanFP8Compile", model=t2v[0], model_low=t2v[1], mode="default").args
    assert kit.distance(sample(cached(*compiled)), plain) < 1e-5
    counts = said()
    assert counts[:2] == counts[2:]


def test_skip_layer_guidance_is_another_pass(t2v, said, blocks_run):
    """Core's node evaluates cond once more a step, with blocks replaced: same name, same step, another residual."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    def guided(model):
        chosen = dict(double_layers="1", single_layers="", scale=3.0, start_percent=0.0, end_percent=1.0)
        execute = SkipLayerGuidanceDiT.execute if hasattr(SkipLayerGuidanceDiT, "execute") else None
        out = (
            execute(model, **chosen, rescaling_scale=0.0)
            if execute
            else SkipLayerGuidanceDiT().skip_guidance(model, chosen["scale"], 0.0, 1.0, "1", "")
        )
        return getattr(out, "args", out)[0]

    high = guided(bridge().set_shift(t2v[0], 12.0))
    plain = kit.ksample(high, steps=STEPS, last_step=13)
    ours = kit.ksample(cached(high), steps=STEPS, last_step=13)
    ((_, _, total, skipped),) = said()
    assert total == 3 * 13 and skipped % 3 == 0 and skipped > 3
    assert 1e-5 < kit.distance(ours, plain) < 0.5


def test_the_memory_of_residuals_is_asked_for(t2v):
    plain, with_cache = bridge().hosted(t2v[0]), cached(t2v[0])
    net = with_cache.model.diffusion_model
    shape = [2, 16, 2, 4, 4]
    assert plain.model is with_cache.model
    net.settings_of_run = bridge().settings_of(plain)
    before = with_cache.model.memory_required(shape)
    net.settings_of_run = bridge().settings_of(with_cache)
    tokens, width = 2 * 2 * 2, net.spec.dim
    assert with_cache.model.memory_required(shape) - before == 2 * tokens * width * 4
    net.settings_of_run = bridge().settings_of(cached(t2v[0], reuse="linear"))
    assert with_cache.model.memory_required(shape) - before == 4 * tokens * width * 4
    net.settings_of_run = bridge().settings_of(call("WanFP8MagCacheCalibrate", model=t2v[0]).args[0])
    assert with_cache.model.memory_required(shape) - before == 2 * tokens * width * 4, (
        "a copy of the tokens, both at once"
    )
    net.settings_of_run = bridge().settings_of(plain)


# ---- nothing stays behind ------------------------------------------------------------------------------------------


def test_an_interrupt_leaves_nothing(t2v):
    import comfy.model_management as management

    models = cached(*t2v)
    expected = sample(models)
    nets = [model.model.diffusion_model for model in models]
    wan = nodes_kit.module("wan_fp8.models.wan").WanModel
    forward, calls = wan.forward, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            assert any(cache.bytes() for net in nets for cache in net.caches.values())
            management.interrupt_current_processing()
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "forward", counted)
        with pytest.raises(management.InterruptProcessingException):
            sample(models)
    management.interrupt_current_processing(False)
    assert all(not net.caches and not net.stack_wrappers for net in nets)
    assert torch.equal(sample(models), expected)
    assert all(not net.caches and not net.stack_wrappers for net in nets)


def test_a_clone_that_is_freed_meanwhile_takes_nothing_with_it(t2v, said):
    """Core detaches a MODEL whenever one is garbage-collected, be it a clone of the one that is being sampled."""
    import gc

    models = cached(*t2v)
    expected = sample(models)
    before = said()
    wan = nodes_kit.module("wan_fp8.models.wan").WanModel
    forward = wan.forward

    def collected(self, *args, **kwargs):
        models[0].clone(), models[1].clone()  # gone at once
        gc.collect()
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "forward", collected)
        assert torch.equal(sample(models), expected)
    assert said() == before


# ---- refusals ------------------------------------------------------------------------------------------------------


def refusal(*names):
    errors = nodes_kit.module("wan_fp8.errors")
    return tuple(getattr(errors, name) for name in names or ("InputError", "UnsupportedPatchError"))


def test_a_model_that_the_published_curve_is_not_of(t2v):
    with pytest.raises(refusal(), match=r"width 5120 with 40 blocks, and this one has width 128 and 2, and models/wan"):
        cached(t2v[0], curve="auto")
    out = call("WanFP8MagCache", model=t2v[0], curve="published")
    assert "although the curve 'published t2v-A14B' was measured on a model of width 5120" in out.ui.value
    cached(t2v[0], curve="auto", policy="easycache")


def test_few_steps_are_refused_before_weights_are_loaded(t2v, monkeypatch):
    import comfy.sampler_helpers

    monkeypatch.setattr(comfy.sampler_helpers, "prepare_sampling", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(refusal(), match=r"MagCache cannot skip in a run of 4 steps: up to 8 steps"):
        sample(cached(*t2v), steps=4, shift=5.0)


@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
def test_cores_caches_are_refused(t2v, node):
    import comfy_extras.nodes_easycache as easycache

    def other(model):
        return getattr(easycache, node).execute(model, 0.2, 0.15, 0.95, False).args[0]

    said = r"this MODEL carries core's (EasyCache|LazyCache) beside Wan2.2 MagCache.*keep one of the two nodes"
    with pytest.raises(refusal(), match=said):
        cached(other(t2v[0]))
    late = other(bridge().set_shift(cached(t2v[0]), 12.0))
    with pytest.raises(refusal(), match=said):
        kit.ksample(late, steps=STEPS, last_step=13)


@pytest.mark.parametrize(
    ("name", "distilled"),
    [
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors", True),
        ("Wan22_Lightning_rank64.safetensors", True),
        ("lcm-wan.safetensors", True),
        ("wan_4_step.safetensors", True),
        ("film_grain_v14_steps.safetensors", False),
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", False),
        ("calcmotion_24steps.safetensors", False),
    ],
)
def test_distilled_models_are_told_by_name(name, distilled):
    curves = nodes_kit.module("nodes.curves")
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "wan2.2.safetensors"}},
        "2": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "lora_name": name, "strength": 1.0}},
        "3": {"class_type": "WanFP8MagCache", "inputs": {"model": ["2", 0]}},
        "4": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "lora_name": "lightx2v.safetensors"}},
    }
    assert curves.distilled_names(prompt, "3") == ([name] if distilled else [])
    prompt["2"]["inputs"]["strength"] = 0.0
    assert curves.distilled_names(prompt, "3") == []


def test_distilled_folders_are_told_by_name():
    curves = nodes_kit.module("nodes.curves")
    folder = "FastWan2.2-TI2V-5B-FullAttn-Diffusers"
    prompt = {
        "1": {"class_type": "WanFP8LoadCheckpoint", "inputs": {"checkpoint": folder, "low_noise": "none"}},
        "2": {"class_type": "WanFP8MagCache", "inputs": {"model": ["1", 0], "preset": "4 steps, by name"}},
    }
    assert curves.distilled_names(prompt, "2") == [folder]


def test_easycache_has_no_magnitude_to_scale_by(t2v):
    with pytest.raises(refusal(), match=r"reuse 'scale'.*'easycache' has none"):
        cached(t2v[0], curve="auto", policy="easycache", reuse="scale")


def test_a_distilled_lora_stops_the_node_that_wants_the_published_curve(t2v):
    node = nodes_kit.load_pack()["WanFP8MagCache"]
    from comfy_api.internal import lock_class

    prompt = {
        "1": {"inputs": {"lora": "Wan2.2-Lightning.safetensors", "strength": 1.0}},
        "2": {"inputs": {"model": ["1", 0]}},
    }
    clone = lock_class(node.PREPARE_CLASS_CLONE(_hidden(unique_id="2", prompt=prompt)))
    with pytest.raises(refusal(), match=r"Wan2.2-Lightning.safetensors is distilled to a few steps by its name"):
        node.execute.__func__(
            clone,
            model=t2v[0],
            preset="E012K2R20",
            threshold=0.1,
            max_skips=2,
            retention=0.2,
            curve="published",
            phase="in_phase",
            policy="magcache",
            reuse="keep",
        )


def _hidden(**values):
    from comfy_api.latest import io

    return {getattr(io.Hidden, name): value for name, value in values.items()}


def test_wrong_choices(t2v):
    for box, value in (("preset", "E1"), ("policy", "teacache"), ("phase", "x"), ("reuse", "x")):
        with pytest.raises(refusal(), match=rf"{box} must be one of"):
            cached(t2v[0], **{box: value})
    with pytest.raises(refusal(), match=r"there is no curve 'gone\.json'"):
        cached(t2v[0], curve="gone.json")


# ---- measuring -----------------------------------------------------------------------------------------------------


def measured(models, name="", steps=12, **changes):
    """Calibrate, sample, save; the latents and what the saving node returned."""
    measuring = call("WanFP8MagCacheCalibrate", model=models[0], model_low=models[1]).args
    result = sample(measuring, steps=steps, **changes)
    saved = call(
        "WanFP8MagCacheSave", model=measuring[0], model_low=measuring[1], latent={"samples": result}, name=name
    )
    return result, saved


def test_measure_save_find_and_skip(t2v, curves, said):
    plain = sample(t2v, steps=12)
    result, saved = measured(t2v)
    assert torch.equal(result, plain), "measuring changes nothing"
    latent, image, name = saved.args
    assert torch.equal(latent["samples"], result)
    assert image.shape[0] == 1 and image.shape[-1] == 3 and 0.02 < float(image.std()) < 0.5
    data = json.loads((curves / name).read_text())
    assert data["task"] == "t2v" and data["shape"] == [128, 2] and len(data["cond"]) == len(data["uncond"]) == 12
    assert [expert for expert, _ in data["models"]] == ["high_noise", "low_noise"]
    assert "curve of 12 steps written to models/wan/magcache/" + name in saved.ui.value
    assert "E012K2R20 would skip" in saved.ui.value
    out = call("WanFP8MagCache", model=t2v[0], model_low=t2v[1], preset="custom", threshold=2.0)
    assert f"curve: {name.removesuffix('.json')}, measured on this model" in out.ui.value
    said()
    sample(out.args, steps=12)
    assert all(skipped for *_, skipped in said())
    cached(t2v[0], curve=name)
    # the same model under our loader's storage is found; with a LoRA, or another model, it is not
    recipe = call("WanFP8Recipe", model=t2v[0], recipe="rowwise", backend="reference").args[0]
    cached(recipe, curve="auto")
    file = kit.core_lora(kit.lora_pairs(kit.core_weights("t2v")))
    for other in (kit.with_core_lora(t2v[0], file), kit.core_model("t2v", seed=5)):
        with pytest.raises(refusal(), match="models/wan/magcache has none for it"):
            cached(other, curve="auto")
        with pytest.raises(refusal(), match="was measured on other weights or with other LoRAs"):
            cached(other, curve=name)
    with pytest.raises(refusal(), match="was measured on a t2v model, and this one is ti2v"):
        cached(kit.core_model("ti2v"), curve=name)


def test_a_lora_has_its_own_curve(t2v, curves):
    file = kit.core_lora(kit.lora_pairs(kit.core_weights("t2v")))
    models = tuple(kit.with_core_lora(model, file, 0.7) for model in t2v)
    measured(models, name="with lora")
    again = tuple(kit.with_core_lora(model, file, 0.7) for model in t2v)
    assert "with lora, measured on this model" in call("WanFP8MagCache", model=again[0]).ui.value
    for other in (t2v[0], kit.with_core_lora(t2v[0], file, 0.6)):
        with pytest.raises(refusal(), match="has none for it"):
            cached(other, curve="auto")


def test_a_live_lora_is_part_of_the_model(t2v, said):
    file = kit.core_lora(kit.lora_pairs(kit.core_weights("t2v")))

    def live(strength):
        return bridge().load_lora(t2v[0], file, strength, live=True).model

    marks = [bridge().fingerprint(model) for model in (bridge().hosted(t2v[0]), live(0.5), live(0.5), live(0.6))]
    assert marks[1] == marks[2] and len(set(marks)) == 3
    run = dict(steps=STEPS, last_step=13)
    models = [bridge().set_shift(model, 12.0) for model in (t2v[0], live(0.5))]
    plain, ours = (kit.ksample(cached(model), **run) for model in models)
    merged = kit.ksample(cached(kit.with_core_lora(models[0], file, 0.5)), **run)
    assert kit.distance(ours, merged) < 1e-4 < kit.distance(ours, plain)
    assert all(skipped for *_, skipped in said())


def test_without_guidance_the_curve_has_one_row(t2v, curves):
    _, saved = measured(t2v, name="alone.json", guidance=1.0, guidance_low=1.0)
    assert saved.args[2] == "alone.json"
    assert json.loads((curves / "alone.json").read_text())["uncond"] is None


def test_a_broken_run_is_not_saved(t2v, curves):
    import comfy.model_management as management

    measuring = call("WanFP8MagCacheCalibrate", model=t2v[0], model_low=t2v[1]).args
    with pytest.raises(refusal(), match="nothing has been measured"):
        call("WanFP8MagCacheSave", model=measuring[0], model_low=measuring[1], latent={})
    wan = nodes_kit.module("wan_fp8.models.wan").WanModel
    forward, calls = wan.forward, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise management.InterruptProcessingException
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "forward", counted)
        with pytest.raises(management.InterruptProcessingException):
            sample(measuring, steps=12)
    with pytest.raises(refusal(), match="the run was cut short"):
        call("WanFP8MagCacheSave", model=measuring[0], model_low=measuring[1], latent={})
    assert not curves.exists()


def test_what_cannot_be_saved(t2v, curves):
    measuring = call("WanFP8MagCacheCalibrate", model=t2v[0], model_low=t2v[1]).args
    with pytest.raises(refusal(), match=r"do not come from one Wan2\.2 Calibrate MagCache"):
        call("WanFP8MagCacheSave", model=t2v[0], latent={})
    sample(measuring, steps=12)
    with pytest.raises(refusal(), match="two experts were sampled and 'model_low' is not connected"):
        call("WanFP8MagCacheSave", model=measuring[0], latent={})
    for name in ("../out", "a/b", ".hidden", "x" * 200):
        with pytest.raises(refusal(), match="name must be a file name"):
            call("WanFP8MagCacheSave", model=measuring[0], model_low=measuring[1], latent={}, name=name)
    with pytest.raises(refusal(), match="this MODEL skips steps, and a curve is measured with every step computed"):
        call("WanFP8MagCacheCalibrate", model=cached(t2v[0]))
    with pytest.raises(refusal(), match=r"carries Wan2\.2 MagCache and Wan2\.2 Calibrate MagCache"):
        sample(tuple(cached(model) for model in measuring), steps=12)
    assert not curves.exists()


def test_a_damaged_curve_is_passed_over_with_a_word(t2v, curves, caplog):
    measured(t2v, name="good")
    (curves / "bad.json").write_text("{")
    import folder_paths

    folder_paths.filename_list_cache.pop("wan_magcache", None)
    with caplog.at_level(logging.INFO):
        out = call("WanFP8MagCache", model=t2v[0])
    assert "good, measured on this model" in out.ui.value
    assert "passed over bad.json is no readable JSON" in caplog.text


def test_cores_pair_can_be_measured(t2v, curves):
    shifted = [bridge().set_shift(model, 12.0) for model in t2v]
    high, low = call("WanFP8MagCacheCalibrate", model=shifted[0], model_low=shifted[1]).args
    first = kit.ksample(high, steps=12, last_step=8)
    second = kit.ksample(low, {"samples": first}, steps=12, start_step=8, disable_noise=True)
    saved = call("WanFP8MagCacheSave", model=high, model_low=low, latent={"samples": second}, name="pair")
    data = json.loads((curves / saved.args[2]).read_text())
    assert data["switch"] == 8 and len(data["sigmas"]) == 12
