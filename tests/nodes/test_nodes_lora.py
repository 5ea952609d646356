"""Load Wan2.2 LoRA, as the executor runs it: files in models/loras, one expert or both, every format."""

from __future__ import annotations

import bridge_kit as kit
import pytest
import torch
from nodes_kit import call
from safetensors.torch import save_file
from test_lora import FORMATS, file_of

pytestmark = pytest.mark.usefixtures("comfy_core")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield
    kit.unload_everything()


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """A models/loras of this test."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    yield tmp_path
    folder_paths.filename_list_cache.pop("loras", None)


def pair(seed: int):
    generator = torch.Generator().manual_seed(seed)
    dim = kit.core_model().model.diffusion_model.dim
    return torch.randn(4, dim, generator=generator), torch.randn(dim, 4, generator=generator)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_changes_the_same_weights(loras, form) -> None:
    pairs = {"blocks.0.self_attn.q": pair(1), "blocks.1.cross_attn.o": pair(2)}
    save_file(file_of(form, pairs), loras / "file.safetensors")
    output = call("WanFP8LoadLora", model=kit.core_model(), lora="file.safetensors", strength=0.7)
    changed = {key.removeprefix("diffusion_model.") for key in output.args[0].patches}
    assert changed == {f"{layer}.weight" for layer in pairs}
    assert "changes 2 parameters" in str(output.ui.as_dict())


def test_both_experts_and_what_comes_out(loras) -> None:
    for name, layer in (("high", "blocks.0.self_attn.q"), ("low", "blocks.1.self_attn.k")):
        save_file(file_of("official", {layer: pair(3)}), loras / f"{name}.safetensors")
    high, low = kit.core_model(), kit.core_model()
    output = call(
        "WanFP8LoadLora",
        model=high,
        lora="high.safetensors",
        model_low=low,
        lora_low="low.safetensors",
        strength_low=0.5,
    )
    assert list(output.args[0].patches) == ["diffusion_model.blocks.0.self_attn.q.weight"]
    assert list(output.args[1].patches) == ["diffusion_model.blocks.1.self_attn.k.weight"]
    assert not high.patches and not low.patches, "what came in stays as it was"


def test_nothing_chosen_changes_nothing(loras) -> None:
    model = kit.core_model()
    assert call("WanFP8LoadLora", model=model).args[0] is model


def test_a_low_file_without_a_low_model_is_refused(loras) -> None:
    save_file(file_of("official", {"blocks.0.self_attn.q": pair(3)}), loras / "low.safetensors")
    with pytest.raises(Exception, match="connect the low-noise expert"):
        call("WanFP8LoadLora", model=kit.core_model(), lora_low="low.safetensors")


def test_a_file_of_something_else_is_named(loras) -> None:
    save_file(
        {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.zeros(4, 8)}, loras / "flux.safetensors"
    )
    with pytest.raises(Exception, match=r"flux\.safetensors"):
        call("WanFP8LoadLora", model=kit.core_model(), lora="flux.safetensors")
