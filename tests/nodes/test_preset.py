"""A preset is the settings nodes, one after the other."""

from __future__ import annotations

import bridge_kit as kit
import nodes_kit
import pytest
import torch
from bridge_kit import core_model, ksample

pytestmark = pytest.mark.usefixtures("comfy_core")


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield
    kit.unload_everything()


def engine(name: str):
    return nodes_kit.module(f"wan_fp8.{name}")


def carried(model) -> tuple:
    bridge = nodes_kit.module("nodes.bridge")
    return bridge.settings_of(model), bridge.recipe_of(model)


@pytest.mark.parametrize("name", ["lossless", "balanced", "few-step"])
def test_on_a_cpu_it_computes_as_without_the_node(name: str) -> None:
    """Nothing multiplies in FP8 here and nothing is short of memory: every preset says so and is the exact run."""
    model = core_model()
    output = nodes_kit.call("WanFP8Preset", model=model, preset=name)
    shown = output.ui.as_dict()["text"][0]
    assert f"preset {name} on cpu" in shown and "Wan2.2 FP8 Recipe: recipe none" in shown
    attention = nodes_kit.call("WanFP8Attention", model=model)
    assert torch.equal(ksample(output.args[0]), ksample(attention.args[0]))
    if name != "lossless":
        assert "it needs an NVIDIA GPU; the tensors are on cpu" in shown


def test_it_comes_to_the_same_as_the_nodes_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """With backends that run here in the place of a GPU's."""
    presets = engine("presets")
    window = {"skip_first_steps": 1, "skip_last_steps": 0, "skip_first_blocks": 0}
    setting = presets.Preset(
        name="fast",
        recipe=engine("quant").Recipe("rowwise", backend="reference"),
        attention=engine("attention").Attention("reference-fp8", **window),
        cache=None,
        reasons=(),
    )
    monkeypatch.setattr(presets, "choose", lambda *_: setting)
    high, low = core_model(seed=0), core_model(seed=1)
    preset = nodes_kit.call("WanFP8Preset", model=high, preset="fast", model_low=low)
    recipe = nodes_kit.call("WanFP8Recipe", model=high, model_low=low, recipe="rowwise", backend="reference")
    one_by_one = nodes_kit.call(
        "WanFP8Attention", model=recipe.args[0], model_low=recipe.args[1], backend="reference-fp8", **window
    )
    for made, wanted in zip(preset.args[:2], one_by_one.args[:2], strict=True):
        assert carried(made) == carried(wanted)
        assert torch.equal(ksample(made), ksample(wanted))
    assert carried(high) == carried(core_model(seed=0)), "the MODEL that came in is unchanged"


def test_the_cache_of_fast_is_that_of_the_cache_node(monkeypatch: pytest.MonkeyPatch) -> None:
    node = nodes_kit.module("nodes.preset")
    monkeypatch.setattr(node, "find_curve", lambda model, choice: (None, "published"))
    caching = nodes_kit.module("nodes.caching")
    monkeypatch.setattr(caching, "find_curve", lambda model, choice: (None, "published"))
    model = core_model()
    preset = nodes_kit.call("WanFP8Preset", model=model, preset="fast")
    cached = nodes_kit.call("WanFP8MagCache", model=model)
    assert carried(preset.args[0])[0].cache == carried(cached.args[0])[0].cache is not None


def test_where_there_is_no_curve_it_says_so_and_goes_on() -> None:
    output = nodes_kit.call("WanFP8Preset", model=core_model(), preset="fast")
    assert carried(output.args[0])[0].cache is None
    assert "Wan2.2 MagCache: none, because" in output.ui.as_dict()["text"][0]


def test_a_distilled_lora_keeps_fast_from_skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    node = nodes_kit.module("nodes.preset")
    monkeypatch.setattr(node, "distilled_names", lambda prompt, node_id: ["wan2.2_i2v_lightx2v_4steps.safetensors"])
    shown = nodes_kit.call("WanFP8Preset", model=core_model(), preset="fast").ui.as_dict()["text"][0]
    assert "wan2.2_i2v_lightx2v_4steps.safetensors is distilled by its name: choose preset few-step" in shown


def test_another_name_is_refused_in_one_sentence() -> None:
    with pytest.raises(Exception, match="preset must be one of lossless, balanced, fast, few-step; got 'turbo'"):
        nodes_kit.call("WanFP8Preset", model=core_model(), preset="turbo")
