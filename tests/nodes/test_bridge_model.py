"""Our transformer as a citizen of core's graph: samplers, shift, windows, caches, patches, hooks, saving, little
memory."""

from __future__ import annotations

import dataclasses
import json

import bridge_kit as kit
import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfy_core")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield
    kit.unload_everything()


@pytest.fixture(scope="module")
def pair(comfy_core):
    """The same weights from core's loader and from ours."""
    return kit.core_model(), kit.own_model()


def close(ours, core, tolerance=1e-5):
    assert kit.distance(ours, core) < tolerance


# ---- sampling nodes ------------------------------------------------------------------------------------------------


def advanced(model, latent, first, last, noise, leftover, steps=4):
    """Core's KSamplerAdvanced."""
    import nodes

    if noise == "enable":
        latent = {"samples": latent["samples"]}
    return nodes.KSamplerAdvanced().sample(
        model, noise, 7, steps, 3.5, "euler", "simple", kit.prompt(1), kit.prompt(2), latent, first, last, leftover
    )[0]


def test_ksampler_advanced_pair(pair):
    results = []
    for high, low in (pair[:1] * 2, (kit.bridge().fork(pair[0]), pair[1])):
        half = advanced(high, kit.empty_latent(), 0, 2, "enable", "enable")
        results.append(advanced(low, half, 2, 10000, "disable", "disable")["samples"])
    close(results[1], results[0])


@pytest.mark.parametrize("shift", [3.0, 12.0])
def test_model_sampling_sd3(pair, shift):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    core, ours = (kit.ksample(ModelSamplingSD3().patch(m, shift)[0]) for m in pair)
    close(ours, core)
    assert kit.distance(core, kit.ksample(pair[0])) > 1e-3


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc", "res_multistep_cfg_pp"])
def test_other_samplers(pair, sampler):
    core, ours = (kit.ksample(m, sampler=sampler, steps=3) for m in pair)
    close(ours, core, 3e-5)


def test_two_runs_in_a_row_and_after_unloading(pair):
    first = kit.ksample(pair[1])
    assert torch.equal(kit.ksample(pair[1]), first)
    kit.unload_everything()
    assert torch.equal(kit.ksample(pair[1]), first)


@pytest.mark.parametrize("size", [5, 7])
def test_odd_latent_sizes(pair, size):
    core, ours = (kit.ksample(m, kit.empty_latent(size=size)) for m in pair)
    assert ours.shape[-1] == size
    close(ours, core)


def test_i2v_conditioning():
    generator = torch.Generator().manual_seed(3)
    image, mask = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.ones(1, 1, 2, 4, 4)
    mask[:, :, 0] = 0
    conditioning = [[rows, {"concat_latent_image": image, "concat_mask": mask}] for rows, _ in kit.prompt(1)]
    core, ours = (kit.ksample(m, positive=conditioning) for m in (kit.core_model("i2v"), kit.own_model("i2v")))
    close(ours, core)
    assert kit.distance(ours, kit.ksample(kit.own_model("i2v"))) > 1e-2


def test_ti2v_first_frame_given():
    latent = kit.empty_latent(48, frames=3)
    latent["samples"] = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(4))
    latent["noise_mask"] = torch.ones(1, 1, 3, 4, 4)
    latent["noise_mask"][:, :, 0] = 0
    core, ours = (kit.ksample(m, latent) for m in (kit.core_model("ti2v"), kit.own_model("ti2v")))
    close(ours, core)
    assert kit.distance(ours[:, :, 0], latent["samples"][:, :, 0]) < 1e-5


def test_time_dim_concat(pair):
    extra = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    conditioning = [[rows, {"time_dim_concat": extra}] for rows, _ in kit.prompt(1)]
    core, ours = (kit.ksample(m, positive=conditioning) for m in pair)
    close(ours, core)
    assert kit.distance(ours, kit.ksample(pair[1])) > 1e-3


def test_context_windows(pair):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode as Node

    latent = kit.empty_latent(frames=7)
    results = [
        kit.ksample(Node.execute(m, 13, 5, "standard_static", 1, False, "pyramid").args[0], latent) for m in pair
    ]
    close(results[1], results[0])
    assert kit.distance(results[1], kit.ksample(pair[1], latent)) > 1e-3


def test_rope_options(pair):
    def stretched(model):
        model = model.clone()
        model.set_model_rope_options(scale_x=0.5, shift_x=1.0, scale_y=2.0, shift_y=0.0, scale_t=1.5, shift_t=3.0)
        return model

    core, ours = (kit.ksample(stretched(m)) for m in pair)
    close(ours, core)
    assert kit.distance(ours, kit.ksample(pair[1])) > 1e-3


# ---- patches -------------------------------------------------------------------------------------------------------


def test_easycache_fires_and_skips(pair, caplog):
    from comfy_extras.nodes_easycache import EasyCacheNode

    results = []
    for model in pair:
        caplog.clear()
        with caplog.at_level("INFO"):
            results.append(kit.ksample(EasyCacheNode.execute(model, 1000.0, 0.0, 1.0, False).args[0], steps=6))
        assert "skipped 4/6" in caplog.text or "skipped 3/6" in caplog.text
    close(results[1], results[0])
    assert kit.distance(results[1], kit.ksample(pair[1], steps=6)) > 1e-3


@pytest.mark.parametrize("simple", [False, True])
def test_skip_layer_guidance(pair, simple):
    import comfy_extras.nodes_slg as slg

    results = []
    for model in pair:
        if simple:
            guided = slg.SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, "1", "").args[0]
        else:
            guided = slg.SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1", "").args[0]
        results.append(kit.ksample(guided))
    close(results[1], results[0])
    assert kit.distance(results[1], kit.ksample(pair[1])) > 1e-3


def refused(model, match, **kw):
    with pytest.raises(kit.engine("errors").UnsupportedPatchError, match=match):
        kit.ksample(model, **kw)


def test_skip_layer_guidance_beyond_the_model_is_refused(pair):
    import comfy_extras.nodes_slg as slg

    refused(slg.SkipLayerGuidanceDiT.execute(pair[1], 3.0, 0.0, 1.0, "1, 9", "").args[0], "block 9.*blocks 0 to 1")
    refused(slg.SkipLayerGuidanceDiT.execute(pair[1], 3.0, 0.0, 1.0, "1", "7").args[0], "single_block.*single_layers")


def test_block_patches_are_called_once_per_block_and_forward(pair):
    calls = {}

    def scaled(model, name):
        model = model.clone()

        def patch(args, extra):
            calls[name] = calls.get(name, 0) + 1
            out = extra["original_block"](args)
            out["img"] = out["img"] * 1.1
            return out

        model.set_model_patch_replace(patch, "dit", "double_block", 1)
        return model

    core, ours = kit.ksample(scaled(pair[0], "core")), kit.ksample(scaled(pair[1], "ours"))
    assert calls["ours"] == calls["core"] == 2
    close(ours, core)


def test_attention_override(pair):
    calls = {}

    def overridden(model, name):
        def override(func, q, k, v, *args, heads, **kwargs):
            calls.setdefault(name, []).append((tuple(q.shape), tuple(k.shape), heads))
            return func(q * 0.5, k, v, *args, heads=heads, **kwargs)

        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model

    core, ours = kit.ksample(overridden(pair[0], "core")), kit.ksample(overridden(pair[1], "ours"))
    assert sorted(calls["ours"]) == sorted(calls["core"])
    close(ours, core)
    assert kit.distance(ours, kit.ksample(pair[1])) > 1e-3


@pytest.mark.parametrize("name", ["attn1_patch", "attn2_patch", "double_block", "made_up"])
def test_patches_that_we_do_not_call_are_refused(pair, name):
    model = pair[1].clone()
    model.set_model_patch(lambda *a: None, name)
    refused(model, name)


@pytest.mark.parametrize("path", ["blocks.0.cross_attn.forward", "blocks.0.cross_attn", "blocks.1", "forward"])
def test_object_patches_below_the_model_are_refused(pair, path):
    model = pair[1].clone()
    model.add_object_patch(f"diffusion_model.{path}", lambda x, context, **kw: x)
    refused(model, path)
    kit.ksample(pair[1])


def test_injections_are_refused(pair):
    from comfy.patcher_extension import PatcherInjection

    model = pair[1].clone()
    model.set_injections("bypass_lora", [PatcherInjection(lambda p: None, lambda p: None)])
    refused(model, "bypass_lora")


def test_inputs_of_other_models_are_refused(pair):
    class Control:
        previous_controlnet = extra_hooks = None

        def get_models(self):
            return []

        def get_extra_hooks(self):
            return []

        def inference_memory_requirements(self, dtype):
            return 0

        def pre_run(self, *args):
            pass

        def get_control(self, *args):
            return {"output": []}

        def cleanup(self):
            pass

    refused(pair[1], "'control'", positive=[[rows, {"control": Control()}] for rows, _ in kit.prompt(1)])


def test_inputs_that_core_ignores_are_ignored_aloud(pair, caplog):
    class Vision:
        penultimate_hidden_states = torch.zeros(1, 257, 1280)

    conditioning = [[rows, {"clip_vision_output": Vision()}] for rows, _ in kit.prompt(1)]
    kit.engine()
    hosted_model = __import__(f"{kit.PACKAGE}.nodes.bridge.hosted_model", fromlist=["x"])
    hosted_model._warn_once.cache_clear()
    close(kit.ksample(pair[1], positive=conditioning), kit.ksample(pair[0], positive=conditioning))
    assert "CLIP vision has no effect" in caplog.text


# ---- prompts -------------------------------------------------------------------------------------------------------


def count_text_projections(model, monkeypatch):
    net, calls = model.model.diffusion_model, []
    original = net.project_context
    monkeypatch.setattr(net, "project_context", lambda *a: calls.append(1) or original(*a), raising=False)
    return calls


def test_text_is_projected_once_per_run(pair, monkeypatch):
    calls = count_text_projections(pair[1], monkeypatch)
    kit.ksample(pair[1], steps=4)
    assert len(calls) == 1  # cond and uncond in one batch
    assert not pair[1].model.diffusion_model._text_cache
    kit.ksample(pair[1], steps=4)
    assert len(calls) == 2


def test_prompts_are_compared_only_where_a_node_can_change_them(pair, monkeypatch):
    """A comparison waits for the GPU, at the start of every forward."""
    hosted_model = __import__(f"{kit.PACKAGE}.nodes.bridge.hosted_model", fromlist=["x"])
    compared, original = [], torch.equal
    monkeypatch.setattr(hosted_model.torch, "equal", lambda *a: compared.append(1) or original(*a))
    kit.ksample(pair[1], steps=3)
    assert not compared
    for wrapped in ("apply_model", "diffusion_model", "predict_noise", "calc_cond_batch"):
        model = pair[1].clone()
        model.add_wrapper_with_key(wrapped, "foreign", lambda executor, *args, **kwargs: executor(*args, **kwargs))
        kit.ksample(model, steps=3)
        assert compared, wrapped
        compared.clear()
    model = pair[1].clone()
    model.set_model_unet_function_wrapper(lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
    kit.ksample(model, steps=3)
    assert compared


@pytest.mark.parametrize("event", ["load", "detach"])
def test_nothing_of_a_prompt_outlives_its_weights(event):
    model = kit.own_model()
    net = model.model.diffusion_model
    options = {"uuids": ["one"]}
    x, rows = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 8, kit.TEXT_DIM)
    net(x, torch.tensor([500.0]), rows, transformer_options=options)
    assert net._text_cache and net._prompts and net._rope_cache
    if event == "load":
        model.load(torch.device("cpu"), full_load=True)
    else:
        model.detach()
    assert not (net._text_cache or net._prompts or net._rope_cache)


@pytest.mark.parametrize("kind", ["outer", "apply_model", "diffusion_model"])
def test_a_node_that_changes_the_prompt_mid_run_is_honoured(pair, kind):
    def travelling(model):
        state = {"step": 0}

        def wrapper(executor, *args, **kwargs):
            state["step"] += 1
            if kind == "diffusion_model":
                x, t, context, *rest = args
                return executor(x, t, context * state["step"], *rest, **kwargs)
            x, t, concat, cross, *rest = args
            return executor(x, t, concat, cross * state["step"], *rest, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key("apply_model" if kind == "outer" else kind, "travel", wrapper)
        return model

    core, ours = (kit.ksample(travelling(m), steps=3) for m in pair)
    close(ours, core)


def test_interrupt_mid_forward_leaves_nothing_and_the_next_run_works(pair):
    import comfy.model_management as management

    expected = kit.ksample(pair[1])
    model = pair[1].clone()
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            management.interrupt_current_processing(True)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("diffusion_model", "cancel", wrapper)
    with pytest.raises(management.InterruptProcessingException):
        kit.ksample(model, steps=4)
    assert len(calls) == 2
    net = model.model.diffusion_model
    assert not net._text_cache and not net._prompts and not net._rope_cache
    assert torch.equal(kit.ksample(pair[1]), expected)


# ---- weights -------------------------------------------------------------------------------------------------------


def lowvram(model):
    """Force core's path where every leaf stays in host memory and is cast (and patched) for each forward."""
    return model.load(torch.device("cpu"), lowvram_model_memory=1)


def velocity(model, seed=3):
    """One forward outside of a sampling run."""
    generator = torch.Generator().manual_seed(seed)
    net = model.model.diffusion_model
    x = torch.randn(1, net.in_dim, 2, 4, 4, generator=generator)
    return net(x, torch.tensor([500.0]), torch.randn(1, 8, kit.TEXT_DIM, generator=generator), transformer_options={})


@pytest.mark.parametrize("with_lora", [False, True])
def test_partial_load_is_bit_equal_to_the_full_load(with_lora):
    model = kit.own_model()
    if with_lora:
        pairs = kit.lora_pairs(kit.core_weights())
        file = {**kit.core_lora(pairs), "diffusion_model.blocks.0.modulation.diff": 0.1 * torch.ones(1, 6, 128)}
        model = kit.with_core_lora(model, file)
    model.load(torch.device("cpu"), full_load=True)
    full = velocity(model)
    model.unpatch_model(torch.device("cpu"))
    lowvram(model)
    cast = [m for m in model.model.diffusion_model.modules() if getattr(m, "comfy_cast_weights", False)]
    assert len(cast) == sum(
        isinstance(m, kit.engine("models.layers").Leaf) for m in model.model.diffusion_model.modules()
    )
    assert torch.equal(velocity(model), full)
    model.unpatch_model(torch.device("cpu"))
    assert kit.same_bytes(kit.state_bytes(model), kit.state_bytes(kit.own_model()))


def test_partial_load_follows_core(pair):
    core, ours = (m.clone() for m in pair)
    for model in (core, ours):
        lowvram(model)
    close(velocity(ours), velocity(core))
    for model in (core, ours):
        model.unpatch_model(torch.device("cpu"))


def test_partially_unload_and_back():
    model = kit.with_core_lora(kit.own_model(), kit.core_lora(kit.lora_pairs(kit.core_weights())))
    model.load(torch.device("cpu"), full_load=True)
    full = velocity(model)
    assert model.partially_unload(torch.device("cpu"), model.model_size() // 2) > 0
    assert any(m.comfy_cast_weights for m in model.model.diffusion_model.modules() if hasattr(m, "comfy_cast_weights"))
    assert torch.equal(velocity(model), full)
    model.unpatch_model(torch.device("cpu"))
    assert kit.same_bytes(kit.state_bytes(model), kit.state_bytes(kit.own_model()))


def save_and_reload(model, folder):
    import comfy.utils
    from comfy_extras.nodes_model_merging import save_checkpoint

    save_checkpoint(model, filename_prefix="saved", output_dir=str(folder))
    return comfy.utils.load_torch_file(str(next(folder.glob("*.safetensors"))))


def test_model_save_and_reload_by_core(pair, tmp_path):
    import comfy.sd

    expected = kit.ksample(pair[0])
    saved = save_and_reload(pair[1], tmp_path)
    weights = kit.core_weights()
    assert {k.removeprefix("model.diffusion_model.") for k in saved} == weights.keys()
    assert all(torch.equal(saved[f"model.diffusion_model.{k}"], v) for k, v in weights.items())
    assert torch.equal(kit.ksample(comfy.sd.load_diffusion_model_state_dict(saved)), expected)


@pytest.mark.parametrize("make", [kit.own_model, kit.own_fp8_model, lambda: kit.own_fp8_model(rows=False)])
@pytest.mark.parametrize("with_lora", [False, True])
def test_model_save_and_reload_by_our_loader(make, with_lora, tmp_path):
    bridge, load = kit.bridge(), kit.engine("checkpoint.load").load_transformer
    model = make()
    if with_lora:
        model = bridge.load_lora(model, kit.core_lora(kit.lora_pairs(kit.core_weights()))).model
    expected = kit.ksample(model)
    save_and_reload(model, tmp_path)
    again = bridge.build_model_patcher(load(next(tmp_path.glob("*.safetensors")), dtype=None))
    assert kit.same_bytes(kit.state_bytes(model), kit.state_bytes(again))
    assert torch.equal(kit.ksample(again), expected)


@pytest.mark.parametrize("form", ["scaled_fp8", "mixed"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_model_save_of_fp8_keeps_bytes_scales_and_marks(form, with_lora, tmp_path):
    bridge, model = kit.bridge(), kit.quantised_core_model(form)
    ours = bridge.fork(model)
    if with_lora:
        ours = kit.with_core_lora(ours, kit.core_lora(kit.lora_pairs(kit.core_weights())))
    expected = kit.ksample(ours)
    saved = save_and_reload(ours, tmp_path)
    layer = "model.diffusion_model.blocks.0.self_attn.q"
    assert bytes(saved[f"{layer}.comfy_quant"].tolist()) == b'{"format": "float8_e4m3fn"}'
    assert saved[f"{layer}.weight"].dtype == torch.float8_e4m3fn
    assert "model.diffusion_model.scaled_fp8" not in saved and "scaled_fp8" not in saved
    weights = {k.removeprefix("model.diffusion_model."): v for k, v in saved.items() if not k.endswith("comfy_quant")}
    again = bridge.fork(model)
    again.patches.clear()
    __import__(f"{kit.PACKAGE}.nodes.bridge.core_weights", fromlist=["x"]).assign_weights(
        again.model.diffusion_model, weights
    )
    assert torch.equal(kit.ksample(again), expected)


@pytest.mark.parametrize("make", [kit.own_model, kit.own_fp8_model])
def test_model_merge_simple(make):
    """Core's merge node reads the other model's weights through ``convert_weight``; modulation is merged too, which
    core does not do to its own model."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    one, two, net = kit.core_weights(seed=0), kit.core_weights(seed=1), kit.own_net()
    net.load_state_dict({k: 0.3 * one[k] + 0.7 * two[k] for k in one}, assign=True)
    expected = kit.ksample(kit.bridge().build_model_patcher(net))
    first, second = make(seed=0), make(seed=1)
    before, plain = kit.state_bytes(first), kit.ksample(first)
    merged = kit.ksample(ModelMergeSimple().merge(first, second, 0.3)[0])
    close(merged, expected, 1e-5 if make is kit.own_model else 0.1)
    assert kit.distance(plain, expected) > 0.15
    assert torch.equal(kit.ksample(first), plain)
    kit.unload_everything()
    assert kit.same_bytes(before, kit.state_bytes(first))


# ---- hooks ---------------------------------------------------------------------------------------------------------


def hooked(file, keyframes=False):
    """A LoRA on the positive conditioning only, optionally with a strength schedule."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(file, 1.0, 0.0)
    if keyframes:
        group = comfy.hooks.HookKeyframeGroup()
        group.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        group.add(comfy.hooks.HookKeyframe(strength=0.3, start_percent=0.5))
        hooks.set_keyframes_on_hooks(group)
    return comfy.hooks.set_hooks_for_conditioning(kit.prompt(1), hooks)


@pytest.mark.parametrize("keyframes", [False, True])
def test_hooked_lora(pair, keyframes):
    file = kit.core_lora(kit.lora_pairs(kit.core_weights()))
    before = kit.state_bytes(pair[1])
    plain = kit.ksample(pair[1], steps=4)
    core, ours = (kit.ksample(m, steps=4, positive=hooked(file, keyframes)) for m in pair)
    close(ours, core)
    assert kit.distance(ours, plain) > 1e-2
    assert torch.equal(kit.ksample(pair[1], steps=4), plain)
    kit.unload_everything()
    assert kit.same_bytes(before, kit.state_bytes(pair[1]))


def test_hooked_lora_on_fp8_is_restored():
    import comfy.hooks

    model = kit.bridge().fork(kit.quantised_core_model("scaled_fp8"))
    assert model.hook_mode == comfy.hooks.EnumHookMode.MinVram
    file = kit.core_lora(kit.lora_pairs(kit.core_weights()))
    exact = kit.ksample(kit.own_model(), steps=4, positive=hooked(file, True))
    before, plain = kit.state_bytes(model), kit.ksample(model, steps=4)
    ours = kit.ksample(model, steps=4, positive=hooked(file, True))
    assert kit.distance(ours, exact) < 0.12
    assert torch.equal(kit.ksample(model, steps=4), plain)
    kit.unload_everything()
    assert kit.same_bytes(before, kit.state_bytes(model))


# ---- construction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v"])
def test_own_model_has_cores_classes_and_config(kind):
    core, ours = kit.core_model(kind), kit.own_model(kind)
    assert isinstance(ours.model, type(core.model)) and type(ours.model).__name__ == type(core.model).__name__
    assert type(ours.model.latent_format) is type(core.model.latent_format)
    assert ours.model.image_to_video == core.model.image_to_video
    assert ours.get_model_object("model_sampling").shift == 8.0
    assert ours.model_size() == core.model_size()
    close(kit.ksample(ours), kit.ksample(core))


def test_lora_keys_are_cores():
    import comfy.lora

    core, ours = kit.core_model(), kit.own_model()
    assert comfy.lora.model_lora_keys_unet(ours.model, {}) == comfy.lora.model_lora_keys_unet(core.model, {})


def test_memory_estimate_of_the_real_model():
    specs = kit.engine("models.specs")
    kit.bridge()
    memory = kit.engine("models.memory")

    def gib(batch, fused=True, dtype=torch.bfloat16):
        return memory.forward_needs(specs.T2V_A14B, [batch, 16, 21, 90, 160], dtype, fused=fused).total / 2**30

    assert 4 < gib(1) < 10
    assert gib(1) < gib(2) < 2 * gib(1)
    assert gib(1, fused=False) > gib(1) + 3
    assert gib(1, dtype=torch.float32) > 1.5 * gib(1)


@pytest.mark.parametrize(("size", "attention"), [("1280x720", "fa3"), ("1280x720", "fa3-fp8"), ("832x480", "fa3-fp8")])
def test_memory_estimate_against_measured_peaks(size, attention):
    """Six blocks of A14B with one prompt on an H200."""
    memory = kit.engine("models.memory")
    spec = dataclasses.replace(kit.engine("models.specs").I2V_A14B, num_layers=6)
    results = kit.PACK / "benchmarks" / "results" / f"dit_i2v-a14b_{size}_h200.json"
    rows = json.loads(results.read_text())["rows"]
    (row,) = [row for row in rows if (row["attention"], row["stream"], row["recipe"]) == (attention, "float32", "none")]
    width, height = (int(number) for number in size.split("x"))
    told = memory.forward_needs(
        spec, [1, 16, 21, height // 8, width // 8], torch.bfloat16, low_precision_attention=attention == "fa3-fp8"
    ).total
    peak = row["peak_gib"] - row["weights_gib"]
    assert peak < told / 2**30 < 1.35 * peak


def test_memory_is_estimated_for_the_kernels_that_run():
    model = kit.own_model(dtype=torch.bfloat16)
    told = model.model.memory_required([1, 16, 21, 90, 160])
    model.model.diffusion_model.fused_kernels = "eager"
    assert model.model.memory_required([1, 16, 21, 90, 160]) == told, "on the CPU the eager kernels run in any case"


def settings_seen(monkeypatch):
    """What each self-attention call is asked for."""
    core = kit.engine("attention.core").AttentionCore
    original, seen = core.forward, []

    def spy(self, q, k, v, setting=None, step=None):
        seen.append((setting, step))
        return original(self, q, k, v, setting, step)

    monkeypatch.setattr(core, "forward", spy)
    return seen


def test_settings_travel_on_the_clone(monkeypatch):
    bridge, model, seen = kit.bridge(), kit.own_model(), settings_seen(monkeypatch)
    attention = kit.engine("attention").Attention("reference")
    chosen = bridge.with_settings(model, attention=attention)
    assert bridge.settings_of(model).attention is None and bridge.settings_of(chosen).attention == attention
    assert chosen.model is model.model
    plain = kit.ksample(model)
    assert {s for s, _ in seen} == {None}
    seen.clear()
    close(kit.ksample(chosen), plain)
    assert {s for s, _ in seen} == {attention}
    assert torch.equal(kit.ksample(model), plain)


def test_attention_knows_its_step_of_the_whole_run(monkeypatch):
    bridge, seen = kit.bridge(), settings_seen(monkeypatch)
    attention = kit.engine("attention").Attention("reference-fp8", bound=None)
    high, low = (bridge.with_settings(kit.own_model(seed=s), attention=attention) for s in (0, 1))
    bridge.run_stages(
        [bridge.Stage(model=high, cfg=1.0), bridge.Stage(model=low, cfg=1.0, first_step=2)],
        positive=kit.prompt(1),
        negative=kit.prompt(2),
        latent=kit.empty_latent(),
        sigmas=kit.engine("sampling").sigmas(5, 5.0, "unipc"),
        sampler=bridge.make_sampler("unipc"),
        seed=1,
    )
    steps = [(step.index, step.total) for _, step in seen[:: len(seen) // 5]]
    assert steps == [(i, 5) for i in range(5)]
    seen.clear()
    kit.ksample(high, steps=3)
    assert {(step.index, step.total) for _, step in seen} == {(i, 3) for i in range(3)}
