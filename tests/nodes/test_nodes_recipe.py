"""FP8 recipes on core's MODELs: forks, LoRAs merged from the original weights, offload, and the node itself."""

from __future__ import annotations

import gc

import bridge_kit as kit
import nodes_kit
import pytest
import torch
from bridge_kit import bridge, core_model, distance, engine, ksample

pytestmark = pytest.mark.usefixtures("comfy_core")

NAMES = ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "rowwise", "MXFP8BlockScaling"]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield
    kit.unload_everything()


def recipe(name: str, **options):
    return engine("quant").Recipe(name, backend="reference", **options)


def with_recipe(model, name: str, **options):
    return bridge().with_recipe(model, recipe(name, **options))[0]


def weights_of(model) -> dict[str, torch.Tensor]:
    net = model.model.diffusion_model
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value.float(), b[name].float()) for name, value in a.items())


def lora(scale: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    layers = {"blocks.0.self_attn.q": (128, 128), "blocks.1.ffn.0": (256, 128), "blocks.1.ffn.2": (128, 256)}
    file = {}
    for name, (rows, columns) in layers.items():
        file[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
        file[f"diffusion_model.{name}.lora_up.weight"] = scale * torch.randn(rows, 4, generator=generator)
    return file


def with_lora(model, strength: float = 1.0):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora(), strength, 0)[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_makes_a_fork_and_leaves_the_model_alone(name: str) -> None:
    model = core_model()
    before, exact = weights_of(model), ksample(model)
    fp8 = with_recipe(model, name)
    assert bridge().recipe_of(fp8) == recipe(name) and bridge().recipe_of(model) is None
    assert bridge().fp8_layers(fp8) == 20
    first = ksample(fp8)
    assert 0.002 < distance(first, exact) < 0.1
    assert torch.equal(ksample(model), exact), "alternating with the original"
    assert torch.equal(ksample(fp8), first), "a second run gives the same bits"
    assert same(weights_of(model), before)


def test_none_brings_the_original_back() -> None:
    model = core_model()
    plain = bridge().fork(model)
    fp8 = with_recipe(plain, "rowwise")
    back = with_recipe(fp8, "none")
    assert bridge().recipe_of(fp8) is not None and bridge().recipe_of(back) is None
    assert torch.equal(ksample(back), ksample(plain))
    assert with_recipe(model, "none") is model


def test_a_second_recipe_starts_from_the_original_weights() -> None:
    model = core_model()
    direct = with_recipe(model, "rowwise")
    detour = with_recipe(with_recipe(model, "Float8BlockScaling"), "rowwise")
    assert same(weights_of(direct), weights_of(detour))
    forked = bridge().fork(direct)
    assert torch.equal(ksample(forked), ksample(direct)), "a fork of an FP8 MODEL is one"
    assert bridge().recipe_of(forked) == recipe("rowwise")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [True, False])
def test_lora_is_merged_from_the_original_weights(name: str, before: bool) -> None:
    model = core_model()
    exact = with_lora(model)
    fp8 = with_recipe(model, name)
    bytes_before, plain = weights_of(fp8), ksample(fp8)
    changed = with_recipe(exact, name) if before else with_lora(fp8)
    result = ksample(changed)
    layer = changed.model.diffusion_model.blocks[1].ffn[0]
    changed.patch_model()
    merged = layer.dequantized(layer.weight, torch.float32)
    exact.patch_model()
    want = exact.model.diffusion_model.blocks[1].ffn[0].weight.float()
    assert 0.02 < distance(merged, want) < 0.03, "one rounding"
    changed.unpatch_model()
    exact.unpatch_model()
    assert distance(result, ksample(exact)) < 0.1
    assert distance(result, plain) > 0.02, "the LoRA does something"
    assert torch.equal(ksample(fp8), plain) and same(weights_of(fp8), bytes_before), "removed: bit-equal"
    assert torch.equal(ksample(with_lora(fp8, 0.0)), plain), "strength 0 is no LoRA"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("patched", [False, True])
def test_offloaded_weights_give_the_same(name: str, patched: bool) -> None:
    fp8 = with_recipe(core_model(), name)
    fp8 = with_lora(fp8) if patched else fp8
    whole = ksample(fp8)
    fp8.detach()
    fp8.load(torch.device("cpu"), lowvram_model_memory=1)
    net = fp8.model.diffusion_model
    assert all(m.comfy_cast_weights for m in net.modules() if isinstance(m, engine("quant.linear").FP8Linear))
    fp8.model.current_patcher = fp8
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    context = torch.randn(1, 8, 4096, generator=torch.Generator().manual_seed(3))
    net.forget_run()
    cast = net(x, torch.tensor([500.0]), context)
    fp8.detach()
    fp8.load(torch.device("cpu"), full_load=True)
    net.forget_run()
    assert torch.equal(net(x, torch.tensor([500.0]), context), cast)
    fp8.detach()
    assert torch.equal(ksample(fp8), whole)


@pytest.mark.parametrize("small", [False, True], ids=["whole", "forced-offload"])
def test_a_hooked_lora_adds_to_an_ordinary_one(small: bool, monkeypatch) -> None:
    """Merged before, patched on the way, and then written into the bytes: each starts from what is there by then."""
    import comfy.hooks
    import comfy.model_patcher

    first, second = (kit.core_lora(kit.lora_pairs(kit.core_weights(), seed=seed)) for seed in (5, 9))
    model = with_recipe(core_model(), "rowwise")
    alone = [kit.ksample(kit.with_core_lora(model, lora)) for lora in (first, second)]
    both = kit.ksample(kit.with_core_lora(kit.with_core_lora(model, first), second))
    kit.unload_everything()
    if small:
        load = comfy.model_patcher.ModelPatcher.load

        def partly(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
            return load(self, device_to, lowvram_model_memory=1, force_patch_weights=force_patch_weights)

        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", partly)

    def hooked(seed: int):
        return comfy.hooks.set_hooks_for_conditioning(kit.prompt(seed), comfy.hooks.create_hook_lora(second, 1.0, 0.0))

    patched = kit.with_core_lora(model, first)
    results = [kit.ksample(patched, positive=hooked(1), negative=hooked(2)) for _ in range(2)]
    assert torch.equal(*results)
    assert kit.distance(results[0], both) < 0.15
    assert min(kit.distance(results[0], one) for one in alone) > 0.3


def test_hooks_restore_fp8_bytes() -> None:
    import comfy.hooks

    assert with_recipe(core_model(), "rowwise").hook_mode == comfy.hooks.EnumHookMode.MinVram


def test_memory_returns() -> None:
    model = core_model()

    def alive() -> int:
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == torch.float8_e4m3fn)

    def parameters() -> int:
        gc.collect()
        kind = torch.nn.Parameter
        return sum(1 for o in gc.get_objects() if type(o) is kind and o.dtype == torch.float8_e4m3fn)

    start = alive(), parameters()
    for _ in range(3):
        fp8 = with_recipe(model, "rowwise")
        ksample(fp8, steps=1)
        ksample(model, steps=1)
        assert parameters() > start[1]
        del fp8
        kit.unload_everything()
    assert (alive(), parameters()) == start


def test_a_clone_that_goes_during_a_run_leaves_its_history_alone() -> None:
    """Core detaches a MODEL that is collected, and a collector may run at any time."""
    fp8 = with_recipe(core_model(), "DelayedScaling")
    whole = ksample(fp8, steps=3)
    clones = [fp8.clone() for _ in range(3)]

    def drop(*_) -> None:
        clones.pop()
        gc.collect()

    assert torch.equal(ksample(fp8, steps=3, callback=drop), whole) and not clones


def test_saved_files() -> None:
    for name in NAMES:
        fp8 = with_recipe(core_model(), name)
        saved = fp8.model.state_dict_for_saving()
        assert sum(key.endswith(".comfy_quant") for key in saved) == 20
        prefix = "model.diffusion_model."
        for key, value in fp8.model.diffusion_model.state_dict().items():
            assert torch.equal(saved[prefix + key].float(), value.float()), key


# ---- the node ------------------------------------------------------------------------------------------------------


def test_the_node_changes_one_model_or_both() -> None:
    high, low = core_model(), core_model(seed=1)
    out = nodes_kit.call("WanFP8Recipe", model=high, backend="reference", model_low=low, keep="blocks.0., ffn.2")
    loaded = nodes_kit.module("nodes.bridge")
    assert [loaded.fp8_layers(model) for model in out.args] == [9, 9]
    assert loaded.recipe_of(out.args[0]).keep == ("blocks.0.", "ffn.2") and loaded.recipe_of(high) is None
    assert not ksample(out.args[0]).isnan().any()
    text = out.ui.value
    assert "rowwise: 9 linears in FP8, multiplied by reference" in text
    alone = nodes_kit.call("WanFP8Recipe", model=high, backend="reference", recipe="DelayedScaling", margin=1)
    assert loaded.recipe_of(alone.args[0]).margin == 1
    twice = nodes_kit.call("WanFP8Recipe", model=high, model_low=high, backend="reference")
    assert twice.args[0] is twice.args[1]
    light = nodes_kit.call("WanFP8Recipe", model=high, backend="weight-only")
    assert "20 linears in FP8, multiplied by weight-only: weights in FP8, products of dequantised" in light.ui.value
    assert 0.001 < distance(ksample(light.args[0]), ksample(high)) < 0.05
    back = nodes_kit.call("WanFP8Recipe", model=out.args[0], recipe="none")
    assert loaded.recipe_of(back.args[0]) is None


def test_the_node_says_why_not() -> None:
    errors = nodes_kit.module("wan_fp8.errors")
    model = core_model()
    for inputs, kind, words in (
        ({}, "BackendUnavailableError", r"torch: it needs an NVIDIA GPU.*never chosen automatically"),
        ({"backend": "torch"}, "BackendUnavailableError", r"backend 'torch' cannot run here"),
        ({"backend": "transformer_engine"}, "BackendUnavailableError", r"no row scales; use backend torch"),
        ({"backend": "reference", "keep": "block.0"}, "InputError", r"keep names 'block.0'"),
        (
            {"recipe": "MXFP8BlockScaling"},
            "BackendUnavailableError",
            r"torch: it needs an NVIDIA GPU.*weight-only: never",
        ),
    ):
        with pytest.raises(getattr(errors, kind), match=words):
            nodes_kit.call("WanFP8Recipe", model=model, **inputs)


def test_menus_are_those_of_the_engine() -> None:
    menus, gemm = nodes_kit.module("nodes.recipe"), nodes_kit.module("wan_fp8.gemm")
    gemm.register_backends()
    assert set(menus.RECIPES) == set(nodes_kit.module("wan_fp8.quant").RECIPES)
    assert set(menus.BACKENDS) == set(gemm.GEMM.names)
