"""Live LoRAs inside core: every format against a float64 merge, strengths that alternate without loading, FP8, offload,
core's own loaders before and after, and what a run leaves behind."""

from __future__ import annotations

import copy

import bridge_kit as kit
import nodes_kit
import pytest
import torch
from safetensors.torch import save_file
from test_lora import ALPHA, FORMATS, STRENGTH, as_keys, file_of, full_rank_extras, lowvram, merged_by_hand
from test_nodes_recipe import NAMES, with_recipe

pytestmark = pytest.mark.usefixtures("comfy_core")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield
    kit.unload_everything()


def live(model, file, strength: float = STRENGTH, **options):
    return kit.bridge().load_lora(model, file, strength, live=True, **options)


def branches(model) -> int:
    """Linears that carry a branch at this moment."""
    return sum("low_rank" in vars(module) for module in model.model.diffusion_model.modules())


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(form):
    model = kit.own_model()
    pairs = kit.lora_pairs(kit.core_weights())
    expected = kit.ksample(merged_by_hand(pairs, STRENGTH * (ALPHA / 4 if "kohya" in form else 1)))
    plain, before = kit.ksample(model), kit.state_bytes(model)
    result = live(model, file_of(form, pairs))
    assert result.changed == result.live == len(pairs) == 20 and result.notes == () and result.model.patches == {}
    assert kit.distance(kit.ksample(result.model), expected) < 1e-5
    assert kit.distance(kit.ksample(lowvram(result.model)), expected) < 1e-5
    assert kit.same_bytes(before, kit.state_bytes(model)), "no weight was touched"
    assert branches(model) == 0, "nothing stays after a run"
    assert torch.equal(kit.ksample(model), plain)


def test_strengths_alternate_without_loading(monkeypatch):
    import comfy.model_patcher

    core, file = kit.core_model(), file_of("bare", kit.lora_pairs(kit.core_weights()))
    low, high = (live(core, file, strength).model for strength in (0.2, 1.0))
    plain = kit.bridge().hosted(core)
    assert low.model is high.model is plain.model
    assert low.patches_uuid == high.patches_uuid == plain.patches_uuid
    first = [kit.ksample(model) for model in (plain, low, high)]
    assert kit.distance(first[2], first[0]) > 2 * kit.distance(first[1], first[0]) > 0.02
    loads = []
    monkeypatch.setattr(
        comfy.model_patcher.ModelPatcher,
        "load",
        lambda *a, load=comfy.model_patcher.ModelPatcher.load, **k: loads.append(a) or load(*a, **k),
    )
    for _ in range(2):
        for model, expected in zip((low, plain, high), (first[1], first[0], first[2]), strict=True):
            assert torch.equal(kit.ksample(model), expected)
    assert loads == []
    kit.ksample(kit.bridge().load_lora(core, file, 0.2).model)
    assert loads, "a merged one is loaded anew"


def test_strength_zero_is_the_model_itself():
    model = kit.own_model()
    result = live(model, file_of("bare", kit.lora_pairs(kit.core_weights())), 0.0)
    assert (result.changed, result.live) == (0, 0) and kit.bridge().settings_of(result.model).lora is None
    assert torch.equal(kit.ksample(result.model), kit.ksample(model))


def test_what_cannot_run_beside_the_weights_is_merged_and_named():
    model = kit.own_model()
    pairs, diffs = kit.lora_pairs(kit.core_weights()), full_rank_extras()
    plain, before = kit.ksample(model), kit.state_bytes(model)
    expected = kit.ksample(merged_by_hand(pairs, STRENGTH, diffs))
    result = live(model, {**file_of("official", pairs), **as_keys(diffs)})
    assert result.live == 20 and result.changed == 20 + len(diffs)
    assert {name.removeprefix("diffusion_model.") for name in result.model.patches} == set(diffs)
    assert len(result.notes) == 1 and f"{len(diffs)} parameters cannot be changed by a live branch" in result.notes[0]
    assert "blocks.0.modulation" in result.notes[0]
    assert kit.distance(kit.ksample(result.model), expected) < 1e-5
    assert kit.distance(kit.ksample(lowvram(result.model)), expected) < 1e-5
    assert torch.equal(kit.ksample(model), plain)
    kit.unload_everything()
    assert kit.same_bytes(before, kit.state_bytes(model))


@pytest.mark.parametrize("order", ["core first", "core last"])
def test_beside_cores_own_loader_and_several_at_once(order):
    weights = kit.core_weights()
    files = [kit.lora_pairs(weights, seed=seed, rank=rank) for seed, rank in ((5, 4), (6, 8), (7, 3))]
    by_hand = merged_by_hand(files[0], STRENGTH)
    net = by_hand.model.diffusion_model
    for pairs, strength in ((files[1], 0.4), (files[2], -0.3)):
        for layer, (down, up) in pairs.items():
            weight = net.get_parameter(f"{layer}.weight")
            weight.data = (weight.double() + strength * up.double() @ down.double()).float()
    expected = kit.ksample(by_hand)
    model = kit.core_model()

    def cores(given):
        return kit.with_core_lora(given, kit.core_lora(files[0]), STRENGTH)

    given = cores(model) if order == "core first" else model
    given = live(
        live(given, file_of("bare", files[1]), 0.4).model,
        file_of("kohya", {k: v for k, v in files[2].items()}),
        -0.3 * 3 / ALPHA,
    ).model
    given = given if order == "core first" else cores(given)
    assert kit.distance(kit.ksample(given), expected) < 1e-5
    assert kit.distance(kit.ksample(kit.bridge().fork(given)), expected) < 1e-5, "a fork keeps both"


@pytest.mark.parametrize("seed", [0, 1], ids=["high", "low"])
def test_cores_loader_and_ours_agree(seed):
    model, pairs = kit.own_model(seed=seed), kit.lora_pairs(kit.core_weights(seed=seed))
    theirs = kit.ksample(kit.with_core_lora(model, kit.core_lora(pairs), STRENGTH))
    assert kit.distance(kit.ksample(live(model, kit.core_lora(pairs)).model), theirs) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_on_fp8(name):
    """Before and after the recipe; offloaded; against the exact merge, and against what merging gives."""
    model, pairs = kit.core_model(), kit.lora_pairs(kit.core_weights())
    file = file_of("bare", pairs)
    exact = kit.ksample(merged_by_hand(pairs, STRENGTH))
    fp8 = with_recipe(model, name)
    before, plain = kit.state_bytes(fp8), kit.ksample(fp8)
    after = live(fp8, file).model
    assert after.model is fp8.model
    result = kit.ksample(after)
    merged = kit.distance(kit.ksample(kit.bridge().load_lora(fp8, file, STRENGTH).model), exact)
    assert 0.005 < kit.distance(result, exact) < 1.2 * merged < 0.15
    assert kit.distance(result, plain) > 0.05
    assert torch.equal(kit.ksample(with_recipe(live(model, file).model, name)), result), "the order does not matter"
    assert torch.equal(kit.ksample(lowvram(after)), result)
    assert torch.equal(kit.ksample(fp8), plain)
    kit.unload_everything()
    assert kit.same_bytes(before, kit.state_bytes(fp8)), "the bytes are those of before"


@pytest.mark.parametrize("form", ["scaled_fp8", "fp8", "mixed"])
def test_on_files_in_fp8(form):
    model = kit.bridge().fork(kit.quantised_core_model(form))
    plain, pairs = kit.ksample(model), kit.lora_pairs(kit.core_weights())
    exact = kit.ksample(merged_by_hand(pairs, STRENGTH))
    assert 0.005 < kit.distance(kit.ksample(live(model, file_of("bare", pairs)).model), exact) < 0.12
    assert kit.distance(plain, exact) > 0.15
    assert torch.equal(kit.ksample(model), plain)


def test_it_travels_by_reference_and_counts_as_memory():
    bridge, model = kit.bridge(), kit.own_model()
    with_it = live(model, file_of("bare", kit.lora_pairs(kit.core_weights()))).model
    carried = bridge.settings_of(with_it).lora
    assert bridge.settings_of(with_it.clone()).lora is carried
    assert copy.deepcopy(bridge.settings_of(with_it)).lora is carried
    assert bridge.settings_of(bridge.set_shift(with_it, 3.0)).lora is carried
    shape, seen = (1, 16, 2, 4, 4), {}
    for name, given in (("without", model), ("with", with_it)):

        def note(executor, *args, name=name, given=given, **kwargs):
            seen[name] = given.model.memory_required(shape), branches(given)
            return executor(*args, **kwargs)

        import comfy.patcher_extension

        watched = given.clone()
        watched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", note)
        kit.ksample(watched, steps=2, cfg=1.0)
    assert seen["with"][0] - seen["without"][0] == carried.device_bytes(torch.float32) > 0
    assert seen["with"][1] == 20 and seen["without"][1] == branches(with_it) == 0


def test_another_strength_compiles_nothing():
    bridge, model = kit.bridge(), kit.own_model()
    compiled = bridge.with_settings(model, compile=kit.engine("compile").Compile(backend="eager"))
    file = file_of("bare", kit.lora_pairs(kit.core_weights()))
    graphs = []
    for strength in (1.0, 0.3, -0.5):
        expected = kit.ksample(live(model, file, strength).model)
        assert torch.equal(kit.ksample(live(compiled, file, strength).model), expected)
        graphs.append(sum(parts.graphs for parts in model.model.diffusion_model.compiled_parts.values()))
    assert graphs[0] == graphs[1] == graphs[2] > 0


def test_an_interrupted_run_leaves_nothing_behind():
    import comfy.model_management
    import comfy.patcher_extension

    model = kit.own_model()
    plain = kit.ksample(model)
    with_it = live(model, file_of("bare", kit.lora_pairs(kit.core_weights()))).model
    expected = kit.ksample(with_it)

    def stop(executor, *args, **kwargs):
        executor(*args, **kwargs)
        raise comfy.model_management.InterruptProcessingException

    broken = with_it.clone()
    broken.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        kit.ksample(broken)
    assert branches(model) == 0
    assert torch.equal(kit.ksample(model), plain) and torch.equal(kit.ksample(with_it), expected)


def test_saving_is_refused(tmp_path):
    import comfy.sd

    errors, model = kit.engine("errors"), kit.own_model()
    with_it = live(model, file_of("bare", kit.lora_pairs(kit.core_weights()))).model
    kit.ksample(with_it)
    with pytest.raises(errors.InputError, match=r"live LoRAs.*'merged'"):
        comfy.sd.save_checkpoint(str(tmp_path / "a.safetensors"), with_it)
    kit.unload_everything()
    with pytest.raises(errors.InputError, match="live LoRAs"):
        comfy.sd.save_checkpoint(str(tmp_path / "a.safetensors"), with_it)
    with pytest.raises(errors.InputError, match=r"live LoRAs.*'merged'"):
        kit.bridge().save_model(with_it, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    kit.ksample(with_it)
    comfy.sd.save_checkpoint(str(tmp_path / "b.safetensors"), model)
    assert (tmp_path / "b.safetensors").is_file()


def test_one_that_the_engine_set_comes_along(tmp_path):
    import comfy.sd

    bridge, live_lora, net = kit.bridge(), kit.engine("checkpoint.live_lora"), kit.own_net()
    pairs, more = (kit.lora_pairs(kit.core_weights(), seed=seed) for seed in (5, 6))
    live_lora.set_lora(net, live_lora.Lora(file_of("bare", pairs), STRENGTH))
    model = bridge.build_model_patcher(net)
    expected = kit.ksample(merged_by_hand(pairs, STRENGTH))
    assert kit.distance(kit.ksample(model), expected) < 1e-5
    assert kit.distance(kit.ksample(bridge.fork(model)), expected) < 1e-5
    by_hand = merged_by_hand(pairs, STRENGTH)
    for layer, (down, up) in more.items():
        weight = by_hand.model.diffusion_model.get_parameter(f"{layer}.weight")
        weight.data = (weight.double() + 0.4 * up.double() @ down.double()).float()
    assert kit.distance(kit.ksample(live(model, file_of("bare", more), 0.4).model), kit.ksample(by_hand)) < 1e-5
    with pytest.raises(kit.engine("errors").InputError, match="live LoRAs"):
        comfy.sd.save_checkpoint(str(tmp_path / "a.safetensors"), model)


def test_two_experts_in_one_diffusers_file():
    high, low = (kit.lora_pairs(kit.core_weights(), seed=s) for s in (5, 6))
    file = file_of("diffusers", high)
    file |= {k.replace("transformer.", "transformer_2."): v for k, v in file_of("diffusers", low).items()}
    model = kit.own_model()
    for pairs, expert in ((high, "high_noise"), (low, "low_noise")):
        expected = kit.ksample(merged_by_hand(pairs, STRENGTH))
        assert kit.distance(kit.ksample(live(model, file, expert=expert).model), expected) < 1e-5


# ---- the node --------------------------------------------------------------------------------------------------------


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """A models/loras of this test, with a pair of files."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    pairs = {name: kit.lora_pairs(kit.core_weights(), seed=seed) for name, seed in (("high", 5), ("low", 6))}
    for name, given in pairs.items():
        extra = as_keys({"blocks.0.modulation": torch.full((1, 6, 128), 0.1)}) if name == "low" else {}
        save_file({**file_of("official", given), **extra}, tmp_path / f"{name}.safetensors")
    yield pairs
    folder_paths.filename_list_cache.pop("loras", None)


def test_the_node_on_both_experts(loras):
    high, low = kit.core_model(), kit.core_model(seed=1)
    inputs = dict(model=high, lora="high.safetensors", model_low=low, lora_low="low.safetensors", strength_low=0.5)
    output = nodes_kit.call("WanFP8LoadLora", strength=0.7, mode="live", **inputs)
    assert output.args[0].patches == {} and set(output.args[1].patches) == {"diffusion_model.blocks.0.modulation"}
    text = str(output.ui.as_dict())
    assert "changes 20 parameters at strength 0.7, 20 of them live" in text
    assert "changes 21 parameters at strength 0.5, 20 of them live" in text
    assert "1 parameters cannot be changed by a live branch and are merged instead (full-rank differences" in text
    merged = nodes_kit.call("WanFP8LoadLora", strength=0.7, **inputs)
    assert len(merged.args[0].patches) == 20, "merged is the default"
    for ours, theirs in zip(output.args, merged.args, strict=True):
        assert kit.distance(kit.ksample(ours), kit.ksample(theirs)) < 1e-5
    assert not high.patches and not low.patches
