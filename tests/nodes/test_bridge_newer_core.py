"""Other versions of core, by fakes: what moved, appeared or went away since the pinned host must be found, not
assumed."""

from __future__ import annotations

import copy

import bridge_kit as kit
import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfy_core")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield
    kit.unload_everything()


def lowvram_sample(model):
    """A run in which every leaf is cast (and patched) for each forward."""
    patched = model.clone()
    load = type(patched).load
    patched.load = lambda device, **kw: load(patched, device, lowvram_model_memory=1)
    return kit.ksample(patched)


def lora_file():
    return kit.core_lora(kit.lora_pairs(kit.core_weights()))


# ---- comfy.ops -----------------------------------------------------------------------------------------------------


def test_cast_without_offloadable(monkeypatch):
    import comfy.ops

    current, calls = comfy.ops.cast_bias_weight, []

    def older(s, input=None, dtype=None, device=None, bias_dtype=None):
        calls.append(s)
        return current(s, input, dtype, device, bias_dtype)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", older)
    monkeypatch.delattr(comfy.ops, "uncast_bias_weight")
    model = kit.with_core_lora(kit.own_model(), lora_file())
    assert kit.distance(lowvram_sample(model), kit.ksample(model)) < 1e-6
    assert calls


def test_cast_of_a_core_that_pages_weights(monkeypatch):
    """It reads more attributes of a module, returns another handle, and wants that handle back once for each cast."""
    import comfy.ops

    current, open_handles, casts = comfy.ops.cast_bias_weight, [], []

    class CastWeightBiasOp:
        comfy_cast_weights = False
        weight_function = []  # noqa: RUF012
        bias_function = []  # noqa: RUF012
        weight_lowvram_function = None
        bias_lowvram_function = None
        _v = None
        _prefetch = None
        made_later = property(lambda self: None)

    def newer(
        s,
        input=None,
        dtype=None,
        device=None,
        bias_dtype=None,
        offloadable=False,
        compute_dtype=None,
        want_requant=False,
    ):
        assert s._v is None and s._prefetch is None and s.weight_lowvram_function is None
        assert offloadable
        weight, bias, stream = current(s, input, dtype, device, bias_dtype, offloadable=True)
        handle = (stream, weight, bias)
        open_handles.append(id(weight))
        casts.append(s)
        return weight, bias, handle

    def uncast(s, weight, bias, handle):
        stream, original, _ = handle
        assert stream is None
        open_handles.remove(id(original))

    monkeypatch.setattr(comfy.ops, "CastWeightBiasOp", CastWeightBiasOp)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", newer)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", uncast)
    for model in (kit.own_model(), kit.own_fp8_model()):
        model = kit.with_core_lora(model, lora_file())
        leaf = model.model.diffusion_model.blocks[0].self_attn.q
        assert leaf.weight_function is not CastWeightBiasOp.weight_function, "lists must not be shared between modules"
        assert not hasattr(leaf, "made_later")
        casts.clear()
        assert kit.distance(lowvram_sample(model), kit.ksample(model)) < 0.08  # on the fly FP8 is not rounded again
        assert casts and not open_handles


@pytest.mark.parametrize("form", ["pinned", "newer"])
def test_lora_on_fp8_on_the_fly(monkeypatch, form):
    """Newer patches know no ``convert_weight``: core would add the LoRA to the stored bytes."""
    import comfy.lora
    import comfy.model_patcher

    class NewerPatch:
        is_lowvram_patch = True

        def __init__(self, key, patches, convert_func=None, set_func=None):
            self.key, self.patches, self.prepared_patches = key, patches, None

        def __call__(self, weight):
            return comfy.lora.calculate_weight(
                self.patches[self.key], weight, self.key, intermediate_dtype=weight.dtype
            )

    if form == "newer":
        monkeypatch.setattr(comfy.model_patcher, "LowVramPatch", NewerPatch)
    exact = kit.ksample(kit.with_core_lora(kit.own_model(), lora_file()))
    model = kit.with_core_lora(kit.own_fp8_model(), lora_file())
    assert kit.distance(lowvram_sample(model), exact) < 0.12
    assert kit.distance(kit.ksample(model), exact) < 0.12
    assert kit.distance(kit.ksample(kit.own_fp8_model()), exact) > 0.15, "the LoRA matters more than the quantisation"


def test_weight_wrappers_see_real_values():
    """``add_weight_wrapper``: functions on weights that are no LoRA."""
    model, seen = kit.own_fp8_model(), []

    def doubled(weight):
        seen.append(weight.dtype)
        return weight * 2

    model.add_weight_wrapper("diffusion_model.blocks.0.ffn.2.weight", doubled)
    twice = lowvram_sample(model)
    assert set(seen) == {torch.float32}
    plain = kit.own_fp8_model()
    plain.model.diffusion_model.blocks[0].ffn[2].weight_scale.data.mul_(2)
    assert kit.distance(twice, kit.ksample(plain)) < 1e-5


# ---- patchers ------------------------------------------------------------------------------------------------------


def rehoused(model, patcher_class, **kw):
    """The same MODEL in another patcher class."""
    new = patcher_class.__new__(patcher_class)
    new.__dict__.update(model.__dict__)
    new.__dict__.update(kw)
    return new


def expect_fork(model, expected):
    import comfy.model_patcher

    ours = kit.bridge().fork(model)
    assert type(ours) is comfy.model_patcher.ModelPatcher
    assert kit.distance(kit.ksample(ours), expected) < 1e-5
    return ours


def test_patcher_with_other_constructor_arguments():
    import comfy.model_patcher

    class Patcher(comfy.model_patcher.ModelPatcher):
        def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False, *, recipe):
            super().__init__(model, load_device, offload_device, size, weight_inplace_update)
            self.recipe = recipe

    core = kit.with_core_lora(kit.core_model(), lora_file(), 0.5)
    core.set_attachments("mine", "kept")
    core.hook_mode = "kept too"
    expected = kit.ksample(core.clone())
    ours = expect_fork(rehoused(core, Patcher, recipe="x"), expected)
    assert ours.get_attachment("mine") == "kept" and ours.hook_mode == "kept too"
    before = copy.copy(ours.patches)
    kit.with_core_lora(core, lora_file())
    assert ours.patches == before


def test_dynamic_patcher_is_made_classic():
    import comfy.model_patcher

    core = kit.core_model()
    expected, asked = kit.ksample(core), []

    class ModelPatcherDynamic(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self):
            return True

        def clone(self, disable_dynamic=False, model_override=None, force_deepcopy=False):
            asked.append(disable_dynamic)
            assert disable_dynamic, "a dynamic patcher cloned as it is would page our modules"
            return core.clone()

    expect_fork(rehoused(core, ModelPatcherDynamic), expected)
    assert asked == [True]


def test_dynamic_patcher_that_cannot_be_made_classic_is_refused():
    import comfy.model_patcher

    class ModelPatcherDynamic(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self):
            return True

    with pytest.raises(kit.engine("errors").UnsupportedPatchError, match=r"ModelPatcherDynamic.*disable-dynamic-vram"):
        kit.bridge().fork(rehoused(kit.core_model(), ModelPatcherDynamic))


def splits_guidance(model):
    """What core's node MultiGPU CFG Split returns: a clone that knows a second MODEL, of another GPU, by this key."""
    split = model.clone()
    split.set_additional_models("multigpu", [kit.core_model()])
    return split


def test_guidance_split_by_core_is_refused_before_and_after_our_nodes():
    """Its copies are loaded from the file, as core's transformer: they would take half of guidance without a word."""
    error, words = kit.engine("errors").UnsupportedPatchError, r"MultiGPU CFG Split.*Wan2\.2 Multi-GPU"
    with pytest.raises(error, match=words):
        kit.bridge().fork(splits_guidance(kit.core_model()))
    ours = kit.bridge().fork(kit.core_model())
    with pytest.raises(error, match=words):
        kit.ksample(splits_guidance(ours))
    kit.ksample(ours)


def test_bookkeeping_that_newer_patchers_add_is_not_shared():
    """A deep copy or a reload through ``cached_patcher_init`` would bring core's own transformer back."""
    core = kit.core_model()
    core.backup_buffers, core.cached_patcher_init, core.clone_base_uuid = {"x": 1}, (print, ()), "same"
    core.pinned.add("something")
    clone = type(core).clone

    def newer_clone(self, disable_dynamic=False):
        new = clone(self)
        for name in ("backup_buffers", "cached_patcher_init", "clone_base_uuid"):
            setattr(new, name, getattr(self, name))
        return new

    core.clone = newer_clone.__get__(core)
    ours = kit.bridge().fork(core)
    assert ours.backup_buffers == {} and ours.cached_patcher_init is None and ours.clone_base_uuid != "same"
    assert ours.pinned == set() and core.pinned == {"something"} and core.backup_buffers == {"x": 1}
    core.pinned.clear()


@pytest.mark.parametrize(
    "missing", [["injections", "hook_patches"], ["weight_wrapper_patches", "cached_hook_patches", "pinned"]]
)
def test_attributes_that_a_patcher_lacks(missing):
    import comfy.model_patcher

    class Sparse(comfy.model_patcher.ModelPatcher):
        pass

    core = kit.core_model()
    expected = kit.ksample(core)
    sparse = rehoused(core, Sparse)
    for name in missing:
        del sparse.__dict__[name]
    Sparse.__del__ = lambda self: None
    expect_fork(sparse, expected)


def test_shell_attributes_that_another_core_does_not_have():
    core = kit.core_model()
    expected = kit.ksample(core)
    kit.unload_everything()
    del core.model.model_offload_buffer_memory
    ours = kit.bridge().fork(core)
    core.model.model_offload_buffer_memory = 0
    assert kit.distance(kit.ksample(ours), expected) < 1e-5


# ---- base model ----------------------------------------------------------------------------------------------------


def test_saving_with_other_arguments(monkeypatch):
    import comfy.model_base

    original = comfy.model_base.BaseModel.state_dict_for_saving

    def newer(self, unet_state_dict, clip_state_dict=None, vae_state_dict=None, clip_vision_state_dict=None):
        assert unet_state_dict is not None
        return original(self, clip_state_dict, vae_state_dict, clip_vision_state_dict)

    monkeypatch.setattr(comfy.model_base.BaseModel, "state_dict_for_saving", newer)
    saved = kit.own_fp8_model().model.state_dict_for_saving({})
    assert sum(key.endswith(".comfy_quant") for key in saved) == 20


def test_memory_is_asked_for_with_or_without_conditioning_shapes():
    model = kit.own_model().model
    assert model.memory_required([1, 16, 2, 4, 4]) == model.memory_required(
        input_shape=[1, 16, 2, 4, 4], cond_shapes={"x": []}
    )


def test_forward_takes_arguments_of_later_cores():
    """Transformer options that we have no use for are left alone; an input that changes the result is refused."""
    model = kit.own_model()
    net = model.model.diffusion_model
    x, t, rows = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 8, kit.TEXT_DIM)
    plain = net(x, t, rows)
    assert torch.equal(net(x, t, rows, transformer_options={"block_index": 3, "total_blocks": 2}), plain)
    assert torch.equal(net(x, timestep=t, context=rows, control=None, brand_new_input=None), plain)
    with pytest.raises(kit.engine("errors").UnsupportedPatchError, match="'brand_new_input'"):
        net(x, t, rows, brand_new_input=torch.ones(1))


def quantised_tensor(weight, scale, style):
    """Core's QuantizedTensor in the shapes that it has had."""
    parameters = {"scale": scale, "orig_dtype": torch.bfloat16}
    value = weight.clone()
    value._qdata = weight
    if style == "dict":
        value._layout_params = parameters
    else:
        value._params = type("Params", (), parameters)()
    return value


@pytest.mark.parametrize("style", ["dict", "dataclass"])
def test_quantised_tensors_of_either_api(style):
    kit.bridge()
    read = __import__(f"{kit.PACKAGE}.nodes.bridge.core_weights", fromlist=["x"])._plain_parts
    weight = torch.randn(4, 8).to(torch.float8_e4m3fn)
    data, scale = read("x.weight", quantised_tensor(weight, torch.tensor(0.5), style))
    assert data.dtype == torch.float8_e4m3fn and scale.shape == () and float(scale) == 0.5
    _, scale = read("x.weight", quantised_tensor(weight, torch.rand(4), style))
    assert scale.shape == (4, 1)


def test_a_quantisation_that_we_do_not_read_is_refused_by_name():
    kit.bridge()
    read = __import__(f"{kit.PACKAGE}.nodes.bridge.core_weights", fromlist=["x"])._plain_parts
    value = quantised_tensor(torch.zeros(4, 8, dtype=torch.uint8), torch.rand(4), "dict")
    value._layout_type = "TensorCoreNVFP4Layout"
    with pytest.raises(
        kit.engine("errors").UnsupportedPatchError,
        match=r"blocks\.0\.ffn\.0\.weight is stored as TensorCoreNVFP4Layout",
    ):
        read("blocks.0.ffn.0.weight", value)
