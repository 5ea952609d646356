"""CLIP of Animate and wav2vec2 of S2V: every form that they come in, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

PACK = Path(__file__).resolve().parents[2]
sys.path.append(str(PACK / "scripts"))

from tiny_checkpoint import senses  # noqa: E402
from tiny_checkpoint.weights import random_weights  # noqa: E402

from wan_fp8.checkpoint.folder import resolve_folder  # noqa: E402
from wan_fp8.checkpoint.senses import (  # noqa: E402
    audio_encoder_file,
    load_audio_encoder_state_dict,
    load_clip_vision_state_dict,
)
from wan_fp8.errors import CheckpointError  # noqa: E402


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    weights = random_weights(senses.clip_shapes(), seed=0, part="clip", dtype=torch.float16)
    path = tmp_path_factory.mktemp("clip") / senses.CLIP_FILE
    torch.save(weights, path)
    return path, weights


def test_clip_under_both_names(clip: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    path, weights = clip
    state = load_clip_vision_state_dict(path)
    q, k, v = weights["visual.transformer.1.attn.to_qkv.weight"].chunk(3)
    layer = "vision_model.encoder.layers.1"
    for name, value in (
        (f"{layer}.self_attn.q_proj.weight", q),
        (f"{layer}.self_attn.k_proj.weight", k),
        (f"{layer}.self_attn.v_proj.weight", v),
        (f"{layer}.self_attn.out_proj.bias", weights["visual.transformer.1.attn.proj.bias"]),
        (f"{layer}.layer_norm2.weight", weights["visual.transformer.1.norm2.weight"]),
        (f"{layer}.mlp.fc2.weight", weights["visual.transformer.1.mlp.2.weight"]),
        ("vision_model.embeddings.class_embedding", weights["visual.cls_embedding"][0, 0]),
        ("vision_model.embeddings.position_embedding.weight", weights["visual.pos_embedding"][0]),
        ("vision_model.pre_layrnorm.bias", weights["visual.pre_norm.bias"]),
        ("visual_projection.weight", weights["visual.head"].T),
    ):
        assert torch.equal(state[name], value), name
    assert not any("textual" in name or "log_scale" in name for name in state)
    hf = {name: value.contiguous() for name, value in state.items()}
    folder = tmp_path / "image_encoder"
    folder.mkdir()
    save_file({**hf, "vision_model.embeddings.position_ids": torch.arange(5)}, folder / "model.safetensors")
    again = load_clip_vision_state_dict(folder)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_another_clip_or_no_clip_is_refused(clip: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    state = load_clip_vision_state_dict(clip[0])
    narrow = {name: value[..., :1024].contiguous() for name, value in state.items()}
    save_file(narrow, tmp_path / "clip_l.safetensors")
    with pytest.raises(CheckpointError, match="width 1024; Animate-14B was trained with ViT-H, of width 1280"):
        load_clip_vision_state_dict(tmp_path / "clip_l.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"an unknown model .*; a CLIP vision encoder is needed here"):
        load_clip_vision_state_dict(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="an open-CLIP ViT-H vision encoder; a wav2vec2 audio encoder is needed"):
        load_audio_encoder_state_dict(clip[0])


def test_wav2vec2_as_folder_file_and_under_newer_names(tmp_path: Path) -> None:
    weights = random_weights(senses.audio_shapes(), seed=0, part="wav2vec2", dtype=torch.float16)
    folder = tmp_path / senses.AUDIO_FOLDER
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    assert audio_encoder_file(folder).name == "pytorch_model.bin"
    state = load_audio_encoder_state_dict(folder)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert not any(name.startswith(("wav2vec2.", "lm_head.")) for name in state)
    conv = "encoder.pos_conv_embed.conv"
    assert torch.equal(state[f"{conv}.parametrizations.weight.original0"], weights[f"wav2vec2.{conv}.weight_g"].float())
    newer = {
        name.removeprefix("wav2vec2.")
        .replace("conv.weight_g", "conv.parametrizations.weight.original0")
        .replace("conv.weight_v", "conv.parametrizations.weight.original1"): value
        for name, value in weights.items()
    }
    save_file(newer, folder / "model.safetensors")
    assert audio_encoder_file(folder) == folder
    again = load_audio_encoder_state_dict(folder)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    base = {name: value[..., :768].contiguous() if "layer_norm" in name else value for name, value in newer.items()}
    save_file(base, tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match="width 768; S2V-14B was trained with a large one"):
        load_audio_encoder_state_dict(tmp_path / "base.safetensors")


def test_folders_name_their_encoders(tmp_path: Path) -> None:
    official, diffusers = tmp_path / "official", tmp_path / "diffusers"
    for folder in (official, official / senses.AUDIO_FOLDER, diffusers, diffusers / "image_encoder"):
        folder.mkdir()
    (official / "config.json").write_text(json.dumps({"_class_name": "WanModel_S2V"}))
    (official / "diffusion_pytorch_model.safetensors").touch()
    (official / senses.CLIP_FILE).touch()
    found = resolve_folder(official)
    assert found.audio_encoder == official / senses.AUDIO_FOLDER and found.clip_vision == official / senses.CLIP_FILE
    (diffusers / "model_index.json").write_text(json.dumps({"_class_name": "WanAnimatePipeline"}))
    (diffusers / "transformer").mkdir()
    (diffusers / "transformer" / "diffusion_pytorch_model.safetensors").touch()
    (diffusers / "image_encoder" / "model.safetensors").touch()
    assert resolve_folder(diffusers).clip_vision == diffusers / "image_encoder"
