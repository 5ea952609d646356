"""Forking a MODEL: core's results with our transformer, and nothing done to the MODEL that came in."""

from __future__ import annotations

import gc
import itertools
import weakref

import bridge_kit as kit
import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfy_core")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield
    kit.unload_everything()


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v"])
def test_fork_gives_cores_latents(kind):
    model = kit.core_model(kind)
    expected = kit.ksample(model)
    ours = kit.bridge().fork(model)
    assert kit.distance(kit.ksample(ours), expected) < 1e-5
    assert torch.equal(kit.ksample(model), expected)


@pytest.mark.parametrize(
    ("form", "tolerance"),
    [("fp32", 1e-5), ("bf16", 2e-2), ("fp16", 4e-3), ("fp8", 1e-5), ("scaled_fp8", 1e-5), ("mixed", 2e-2)],
)
def test_every_storage_format_of_core(form, tolerance):
    model = kit.quantised_core_model(form)
    expected = kit.ksample(model)
    ours = kit.bridge().fork(model)
    assert kit.distance(kit.ksample(ours), expected) < tolerance
    fp8 = [m for m in ours.model.diffusion_model.modules() if getattr(m, "weight_scale", None) is not None]
    assert bool(fp8) == (form in ("scaled_fp8", "mixed"))
    assert torch.equal(kit.ksample(model), expected)


def test_storage_is_shared_and_parameters_are_not():
    model = kit.core_model()
    ours = kit.bridge().fork(model)
    theirs = dict(model.model.diffusion_model.named_parameters())
    for name, parameter in ours.model.diffusion_model.named_parameters():
        assert parameter is not theirs[name]
        assert parameter.untyped_storage().data_ptr() == theirs[name].untyped_storage().data_ptr()
    assert ours.model is not model.model
    assert ours.model.model_config is not model.model.model_config
    assert ours.loaded_size() == 0
    assert ours.model_size() == model.model_size()


def graph(order, model, lora, bridge):
    """One MODEL through LoRA nodes and ours in the given order."""
    for step in order:
        model = bridge.fork(model) if step == "ours" else kit.with_core_lora(model, lora[step], 0.8)
    return model


@pytest.mark.parametrize("order", list(itertools.permutations(["ours", "a", "b"])))
def test_lora_before_and_after_in_every_order(order):
    bridge, model = kit.bridge(), kit.core_model()
    before = kit.state_bytes(model)
    weights = kit.core_weights()
    lora = {"a": kit.core_lora(kit.lora_pairs(weights, seed=5)), "b": kit.core_lora(kit.lora_pairs(weights, seed=6))}
    plain = kit.ksample(model)
    expected = kit.ksample(kit.with_core_lora(kit.with_core_lora(model, lora["a"], 0.8), lora["b"], 0.8))
    assert kit.distance(expected, plain) > 0.05
    ours = graph(order, model, lora, bridge)
    assert kit.distance(kit.ksample(ours), expected) < 1e-5
    assert torch.equal(kit.ksample(model), plain), "the MODEL that came in is changed"
    assert kit.distance(kit.ksample(ours), expected) < 1e-5
    kit.unload_everything()
    assert kit.same_bytes(before, kit.state_bytes(model))


def test_alternating_with_lora_leaves_everything_bit_equal():
    """The sequence that a whole-module object patch gets wrong: it bakes the LoRA into the user's MODEL."""
    bridge, model = kit.bridge(), kit.core_model()
    before = kit.state_bytes(model)
    lora = kit.core_lora(kit.lora_pairs(kit.core_weights()))
    with_lora = kit.with_core_lora(model, lora)
    core_result = kit.ksample(with_lora)  # core merges now, and its weights are the merged ones when we fork
    ours = bridge.fork(with_lora)
    assert kit.distance(kit.ksample(ours), core_result) < 1e-5
    plain = kit.ksample(model)
    assert kit.distance(plain, core_result) > 0.05
    assert torch.equal(kit.ksample(with_lora), core_result)
    own_plain = kit.ksample(bridge.fork(model))
    assert kit.distance(own_plain, plain) < 1e-5
    kit.unload_everything()
    assert kit.same_bytes(before, kit.state_bytes(model))


@pytest.mark.parametrize("form", ["bf16", "fp8", "scaled_fp8", "mixed"])
def test_fork_while_the_original_has_a_lora_merged(form):
    bridge, model = kit.bridge(), kit.quantised_core_model(form)
    with_lora = kit.with_core_lora(model, kit.core_lora(kit.lora_pairs(kit.core_weights())))
    plain = kit.ksample(model)
    merged = kit.ksample(with_lora)
    ours = bridge.fork(with_lora)
    assert kit.distance(kit.ksample(ours), merged) < {"bf16": 0.03}.get(form, 0.12)
    assert torch.equal(kit.ksample(model), plain)
    assert torch.equal(kit.ksample(with_lora), merged)


def test_fork_while_a_lora_is_merged_behind_cores_back():
    """Loaded by hand, so that core's list of loaded models does not know it: the clean weights are in its backup."""
    bridge, model = kit.bridge(), kit.core_model()
    plain = kit.ksample(model)
    with_lora = kit.with_core_lora(model, kit.core_lora(kit.lora_pairs(kit.core_weights())))
    merged = kit.ksample(with_lora)
    kit.unload_everything()
    with_lora.patch_model(torch.device("cpu"))
    ours = bridge.fork(with_lora)
    assert kit.distance(kit.ksample(ours), merged) < 1e-5
    with_lora.unpatch_model(torch.device("cpu"))
    assert torch.equal(kit.ksample(model), plain)


def test_fork_of_a_fork():
    bridge, model = kit.bridge(), kit.own_model()
    plain = kit.ksample(model)
    before = kit.state_bytes(model)
    again = bridge.fork(model)
    assert type(again.model) is type(model.model)
    lora = kit.with_core_lora(again, kit.core_lora(kit.lora_pairs(kit.core_weights())))
    assert kit.distance(kit.ksample(lora), plain) > 0.05
    assert torch.equal(kit.ksample(model), plain)
    assert torch.equal(kit.ksample(again), plain)
    callbacks = again.get_all_callbacks("on_load_after")
    assert len(callbacks) == 1, "our callbacks must not pile up"
    kit.unload_everything()
    assert kit.same_bytes(before, kit.state_bytes(model))


def tensor_bytes():
    """Bytes of distinct storages that are alive in this process."""
    seen = {}
    for item in gc.get_objects():
        if (
            isinstance(item, torch.Tensor)
            and type(item) in (torch.Tensor, torch.nn.Parameter)
            and item.device.type == "cpu"
        ):
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def test_host_memory_returns():
    bridge, model = kit.bridge(), kit.core_model()
    lora = kit.core_lora(kit.lora_pairs(kit.core_weights()))
    kit.ksample(model)
    kit.unload_everything()
    gc.collect()
    before, size = tensor_bytes(), model.model_size()
    ours = bridge.fork(kit.with_core_lora(model, lora))
    gc.collect()
    assert tensor_bytes() - before < 0.1 * size, "a fork must not copy weights"
    kit.ksample(ours)
    net, shell = weakref.ref(ours.model.diffusion_model), weakref.ref(ours.model)
    del ours
    kit.unload_everything()
    gc.collect()
    assert net() is None and shell() is None
    assert abs(tensor_bytes() - before) < 0.02 * size


def test_forks_die_without_the_cycle_collector():
    bridge, model = kit.bridge(), kit.core_model()
    ours = bridge.fork(model)
    net = weakref.ref(ours.model.diffusion_model)
    gc.collect()
    gc.disable()
    try:
        del ours
        assert net() is None
    finally:
        gc.enable()


def test_fork_unloads_a_model_that_lies_on_the_device(monkeypatch):
    import comfy.model_management as management

    bridge, model = kit.bridge(), kit.core_model()
    kit.ksample(model)
    assert any(m.model is not None and m.model.is_clone(model) for m in management.current_loaded_models)
    bridge.fork(model)
    assert not any(m.model is not None and m.model.is_clone(model) for m in management.current_loaded_models)
    assert model.loaded_size() == 0


def test_attachments_come_along_and_stay_separate():
    bridge, model = kit.bridge(), kit.core_model()
    model = bridge.set_shift(model, 3.0)
    model.set_attachments("mine", "kept")
    model.add_wrapper_with_key("outer_sample", "other", lambda executor, *a, **k: executor(*a, **k))
    expected = kit.ksample(model)
    ours = bridge.fork(model)
    assert ours.get_attachment("mine") == "kept"
    assert kit.distance(kit.ksample(ours), expected) < 1e-5
    assert ours.get_model_object("model_sampling").shift == 3.0
    assert "wan_fp8" not in model.wrappers.get("outer_sample", {})
    assert ours.patches_uuid != model.patches_uuid
    # The shift was applied to the model that the shell was copied from; without the patch the default is back.
    bare = bridge.fork(model)
    bare.object_patches.clear()
    assert bare.get_model_object("model_sampling").shift == 8.0


def refused(model, match):
    errors = kit.engine("errors")
    with pytest.raises(errors.UnsupportedPatchError, match=match):
        kit.bridge().fork(model)


def test_other_models_are_refused_by_name():
    import comfy.ldm.wan.model as wan
    import comfy.ops
    import comfy.sd

    class Other(torch.nn.Linear):
        pass

    model = kit.core_model()
    net, kwargs = (
        model.model.diffusion_model,
        dict(dim=128, ffn_dim=256, num_heads=1, num_layers=1, operations=comfy.ops.disable_weight_init),
    )
    cases = {
        "VACE": lambda: wan.VaceWanModel(vace_layers=1, vace_in_dim=96, in_dim=16, **kwargs),
        "Wan2.1 image-to-video": lambda: wan.WanModel(model_type="i2v", in_dim=36, **kwargs),
        "ref_conv": lambda: wan.WanModel(in_dim=16, in_dim_ref_conv=16, **kwargs),
        "48 input and 16 output": lambda: wan.WanModel(in_dim=48, **kwargs),
        "Other": lambda: Other(1, 1),
    }
    for match, make in cases.items():
        with torch.device("meta"):
            model.model.diffusion_model = make()
        refused(model, match)
    model.model.diffusion_model = net


def test_foreign_patches_are_refused_by_name():
    model = kit.core_model().clone()
    model.add_object_patch("diffusion_model.blocks.0.cross_attn.forward", lambda *a: None)
    refused(model, "blocks.0.cross_attn.forward")
