"""Animate-14B and S2V-14B checkpoints: official and Diffusers folders, single files, FP8, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from checkpoint_kit import (
    E4M3,
    diffusers_state,
    json_tensor,
    official_state,
    prefixed,
    quantised,
    tiny_spec,
    write_shards,
)
from safetensors.torch import save_file
from torch import Tensor

from wan_fp8.checkpoint.detect import Layout, inspect
from wan_fp8.checkpoint.folder import resolve_folder
from wan_fp8.checkpoint.load import load_transformer, open_transformer
from wan_fp8.checkpoint.reader import open_source
from wan_fp8.checkpoint.save import save_checkpoint
from wan_fp8.errors import CheckpointError, InputError
from wan_fp8.models.animate import AnimateModel
from wan_fp8.models.layers import Linear
from wan_fp8.models.s2v import S2VModel
from wan_fp8.models.specs import Task

CLASSES = {"animate": AnimateModel, "s2v": S2VModel}
OFFICIAL_NAMES = {"animate": "WanAnimateModel", "s2v": "WanModel_S2V"}


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    return {task: official_state(tiny_spec(task, layers=5), dtype=torch.bfloat16) for task in CLASSES}


@pytest.fixture(scope="module")
def diffusers(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Animate as diffusers stores it: keys and values of the fusers apart, biases of activations with one axis."""
    found = {}
    for name, value in diffusers_state(states["animate"]).items():
        if ".to_kv." in name:
            found[name.replace("to_kv", "to_k")], found[name.replace("to_kv", "to_v")] = value.chunk(2)
        else:
            found[name] = value.flatten() if name.endswith("act_fn.bias") else value
    return found


def assert_loaded(model: torch.nn.Module, task: str, state: dict[str, Tensor]) -> None:
    assert type(model) is CLASSES[task]
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("task", CLASSES)
def test_official_folders(tmp_path: Path, states: dict[str, dict[str, Tensor]], task: str) -> None:
    folder = write_shards(tmp_path / "Wan2.2-X-14B", states[task])
    channels = {"in_dim": 36 if task == "animate" else 16, "out_dim": 16}
    (folder / "config.json").write_text(json.dumps({"_class_name": OFFICIAL_NAMES[task], **channels}))
    (folder / "Wan2.1_VAE.pth").touch()
    found = resolve_folder(folder)
    assert found.task is Task(task) and found.require_vae().name == "Wan2.1_VAE.pth"
    assert_loaded(load_transformer(folder), task, states[task])
    with pytest.raises(InputError, match="has one transformer, no 'high_noise' expert"):
        load_transformer(folder, "high_noise")


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_files(tmp_path: Path, states: dict[str, dict[str, Tensor]], task: str, prefix: str) -> None:
    path = tmp_path / "wan.safetensors"
    save_file(prefixed(states[task], prefix), path)
    assert_loaded(load_transformer(path), task, states[task])
    with pytest.raises(InputError, match="which has one expert; leave expert at None"):
        load_transformer(path, "low_noise")


def test_blur_kernels_of_official_animate_files_are_left_out(states: dict[str, dict[str, Tensor]]) -> None:
    extra = {
        f"motion_encoder.enc.net_app.convs.{k}.{part}.0.kernel": torch.zeros(4, 4)
        for k in range(1, 8)
        for part in ("conv2", "skip")
    }
    assert_loaded(load_transformer(states["animate"] | extra), "animate", states["animate"])
    with pytest.raises(CheckpointError, match=r"14 unexpected \(motion_encoder"):
        load_transformer(states["s2v"] | extra)


@pytest.mark.parametrize(
    ("task", "outside"), [("animate", "face_adapter.fuser_blocks.0.linear1_kv"), ("s2v", "audio_injector.injector.0.q")]
)
@pytest.mark.parametrize("convention", ["scaled_fp8", "comfy_quant"])
def test_fp8_single_files(
    tmp_path: Path, states: dict[str, dict[str, Tensor]], task: str, outside: str, convention: str
) -> None:
    """ComfyUI's files hold linears outside the blocks in FP8 as well."""
    stored, metadata, worth = quantised(states[task], convention)
    name = f"{outside}.weight"
    stored[name] = (stored[name].float() / 0.01).to(E4M3)
    worth[name] = stored[name].float() * 0.01
    stored[f"{outside}.{'scale_weight' if convention == 'scaled_fp8' else 'weight_scale'}"] = torch.tensor(0.01)
    if convention == "comfy_quant":
        stored[f"{outside}.comfy_quant"] = json_tensor({"format": "float8_e4m3fn"})
    save_file(stored, tmp_path / "wan_fp8_scaled.safetensors", metadata=metadata)
    model = load_transformer(tmp_path / "wan_fp8_scaled.safetensors", dtype=torch.float32)
    assert all(torch.equal(value, worth[name]) for name, value in model.state_dict().items())
    kept = load_transformer(tmp_path / "wan_fp8_scaled.safetensors", keep_fp8=True)
    linear = kept.get_submodule(outside)
    assert isinstance(linear, Linear) and linear.weight.dtype == E4M3
    assert torch.equal(linear.dequantized(linear.weight, torch.float32), worth[name])


def test_diffusers_animate(tmp_path: Path, states: dict[str, dict[str, Tensor]], diffusers: dict[str, Tensor]) -> None:
    found = inspect(diffusers)
    assert (found.task, found.layout, found.spec) == (Task.ANIMATE, Layout.DIFFUSERS, tiny_spec("animate", layers=5))
    folder = tmp_path / "Wan2.2-Animate-14B-Diffusers"
    write_shards(folder / "transformer", diffusers)
    config = {"_class_name": "WanAnimateTransformer3DModel", "in_channels": 36, "out_channels": 16}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    index = {"_class_name": "WanAnimatePipeline", "transformer": ["diffusers", "WanAnimateTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert resolve_folder(folder).task is Task.ANIMATE
    assert_loaded(load_transformer(folder), "animate", states["animate"])
    assert_loaded(load_transformer(prefixed(diffusers, "model.")), "animate", states["animate"])


def test_a_diffusers_source_that_the_caller_opened_stays_open(
    tmp_path: Path, states: dict[str, dict[str, Tensor]], diffusers: dict[str, Tensor]
) -> None:
    save_file(diffusers, tmp_path / "animate.safetensors")
    with open_source(tmp_path / "animate.safetensors") as source:
        opened, _ = open_transformer(source)
        opened.close()
        assert_loaded(load_transformer(source), "animate", states["animate"])


KEYS, VALUES = "face_adapter.0.to_k.weight", "face_adapter.0.to_v.weight"


def test_fusers_that_cannot_be_joined_are_refused(diffusers: dict[str, Tensor]) -> None:
    for change, words in (
        (
            {KEYS: diffusers[KEYS].to(E4M3)},
            r"stores face_adapter\.0\.to_k\.weight as float8_e4m3fn.*cannot join: use the bf16",
        ),
        (
            {VALUES: torch.zeros(128, 64, dtype=torch.bfloat16)},
            r"is damaged: face_adapter\.0\.to_k\.weight is \[128, 128\]",
        ),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_transformer(diffusers | change)
    missing = {name: value for name, value in diffusers.items() if name != VALUES}
    with pytest.raises(CheckpointError, match=r"face_adapter\.0\.to_v\.weight"):
        load_transformer(missing)


@pytest.mark.parametrize("task", CLASSES)
def test_incomplete_files_are_refused(states: dict[str, dict[str, Tensor]], task: str) -> None:
    gone = {"animate": "motion_encoder.enc.fc.0.weight", "s2v": "frame_packer.proj_2x.bias"}[task]
    state = {name: value for name, value in states[task].items() if name != gone}
    with pytest.raises(CheckpointError, match=rf"does not fit a Wan2\.2 transformer: 1 missing \({gone}\)"):
        load_transformer(state)


def test_an_animate_transformer_has_a_fuser_for_five_blocks(states: dict[str, dict[str, Tensor]]) -> None:
    state = {name: value for name, value in states["animate"].items() if not name.startswith("blocks.4.")}
    with pytest.raises(
        CheckpointError, match=r"another model than Wan2\.2's ANIMATE-14B transformer .* and 4 blocks\)"
    ):
        load_transformer(state)


@pytest.mark.parametrize("task", CLASSES)
def test_what_is_saved_loads_again(tmp_path: Path, states: dict[str, dict[str, Tensor]], task: str) -> None:
    save_checkpoint(load_transformer(states[task]), tmp_path / "again.safetensors")
    assert_loaded(load_transformer(tmp_path / "again.safetensors"), task, states[task])


def test_the_released_models_are_called_by_their_names() -> None:
    small = tiny_spec("s2v", layers=5)
    assert (
        inspect(official_state(dataclasses.replace(small))).label == "a Wan2.2 S2V transformer (5 layers of width 128)"
    )
