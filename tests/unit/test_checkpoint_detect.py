"""What a file is, from names, shapes and file names: the three transformers, their relatives, the rest."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
import torch
from checkpoint_kit import (
    diffusers_folder,
    diffusers_state,
    json_tensor,
    named_like,
    official_folder,
    official_state,
    prefixed,
    quantised,
    tiny_spec,
)
from safetensors.torch import save_file

from wan_fp8.checkpoint.detect import Layout, inspect, require_expert_pair
from wan_fp8.checkpoint.listing import find_checkpoints
from wan_fp8.checkpoint.load import load_transformer, open_transformer
from wan_fp8.checkpoint.naming import expert_from_name, version_from_name
from wan_fp8.checkpoint.quantized import Storage
from wan_fp8.checkpoint.signatures import FOREIGN, PARTS, Kind
from wan_fp8.errors import CheckpointError, InputError
from wan_fp8.models.specs import SPECS, ModelSpec, Task

# ---- the three transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.model.", "net.", "model.", "diffusion_model."])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_the_wan22_transformers_in_every_naming_scheme(task: str, layout: str, prefix: str) -> None:
    spec = tiny_spec(task, dim=256, layers=3)
    state = official_state(spec)
    found = inspect(prefixed(state if layout == "official" else diffusers_state(state), prefix))
    assert found.kind is Kind.TRANSFORMER and found.supported
    assert (found.task, found.layout, found.spec, found.prefix) == (Task(task), Layout(layout), spec, prefix)
    assert found.expert is None and found.storage is Storage.FP32


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("task", ["animate", "s2v"])
def test_animate_and_s2v_have_modules_of_their_own(task: str, prefix: str) -> None:
    spec = tiny_spec(task, layers=5)
    found = inspect(prefixed(official_state(spec), prefix))
    assert (found.task, found.layout, found.spec, found.prefix) == (Task(task), Layout.OFFICIAL, spec, prefix)
    assert found.details == () and found.expert is None
    require_expert_pair(found, None, "a")
    with pytest.raises(CheckpointError, match="which has one expert"):
        require_expert_pair(found, found, "a")


@pytest.mark.parametrize("name", SPECS)
def test_released_sizes_are_called_by_their_names(name: str) -> None:
    spec = SPECS[name]
    found = inspect(on_meta(spec))
    assert found.spec == spec
    assert found.label == f"a Wan2.2 {name.upper()} transformer"


def on_meta(spec: ModelSpec) -> dict[str, torch.Tensor]:
    from wan_fp8.models.wan import build_model

    with torch.device("meta"):
        return build_model(spec).state_dict()


def test_what_tensors_cannot_tell_is_said() -> None:
    notes = " ".join(inspect(official_state(tiny_spec("t2v"))).details)
    assert "high-noise from the low-noise" in notes
    assert "Wan2.2 T2V-A14B from Wan2.1 T2V-14B" in notes
    assert "Wan2.1" not in " ".join(inspect(official_state(tiny_spec("i2v"))).details)
    assert inspect(official_state(tiny_spec("ti2v"))).details == ()


def test_a_t2v_file_whose_name_says_nothing_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = official_state(tiny_spec("t2v"))
    for name in ("mystery", "wan2.2_t2v_14B", "t2v_high_noise"):
        save_file(state, tmp_path / f"{name}.safetensors")
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="wan_fp8"):
            opened, _ = open_transformer(tmp_path / f"{name}.safetensors")
            opened.close()
        assert ("Wan2.1 T2V-14B" in caplog.text) == (name == "mystery")


def test_an_all_in_one_checkpoint_lends_its_transformer() -> None:
    spec = tiny_spec("t2v")
    state = prefixed(official_state(spec), "model.diffusion_model.") | named_like(
        ["vae.conv1.weight", "text_encoders.a.b"]
    )
    found = inspect(state)
    assert found.spec == spec
    assert any("2 tensors outside" in note for note in found.details)
    assert load_transformer(state).spec == spec


def test_a_missing_block_is_named() -> None:
    state = official_state(tiny_spec("t2v", layers=3))
    state = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
    with pytest.raises(CheckpointError, match="is incomplete: block 1 is missing"):
        inspect(state)


def test_a_width_that_is_no_multiple_of_a_head_is_refused() -> None:
    state = official_state(tiny_spec("t2v"))
    state["patch_embedding.weight"] = torch.zeros(192, 16, 1, 2, 2)
    with pytest.raises(CheckpointError, match="has width 192"):
        inspect(state)


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "high_noise"),
        ("wan2.2_i2v_low_noise_14B_fp16.safetensors", "low_noise"),
        ("Wan2_2-T2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ.safetensors", "high_noise"),
        ("Wan2_2-I2V-A14B-LOW.safetensors", "low_noise"),
        ("wan22EnhancedHighNoise_v2.safetensors", "high_noise"),
        ("smoothMixWan22I2V_i2vLow.safetensors", "low_noise"),
        ("highnoise.safetensors", "high_noise"),
        ("models/high_noise_model", "high_noise"),
        ("models/low_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", "low_noise"),
        ("repo/transformer_2", "low_noise"),
        ("repo/transformer", None),
        ("wan2.2_t2v_high_and_low.safetensors", None),
        ("wan2.2_ti2v_5B_fp16.safetensors", None),
        ("wan2.2_t2v_lowvram.safetensors", None),
        ("wan2.2_t2v_low_vram.safetensors", None),
        ("highres_fix.safetensors", None),
        ("slow_motion.safetensors", None),
        ("high_noise_collection/wan2.2_t2v.safetensors", None),
    ],
)
def test_the_expert_comes_from_the_name_and_is_never_guessed(name: str, expert: str | None) -> None:
    assert expert_from_name(name) == expert


def test_the_title_in_the_metadata_counts_where_the_name_is_silent(tmp_path: Path) -> None:
    assert expert_from_name("a.safetensors", {"modelspec.title": "Wan2.2 T2V low noise"}) == "low_noise"
    save_file(official_state(tiny_spec()), tmp_path / "m.safetensors", metadata={"modelspec.title": "t2v high_noise"})
    assert inspect(tmp_path / "m.safetensors").expert == "high_noise"


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("Wan2.1-T2V-14B", "2.1"),
        ("wan2.1_t2v_14B_fp16.safetensors", "2.1"),
        ("Wan2_1-T2V-14B_fp8_e4m3fn.safetensors", "2.1"),
        ("wan21_causvid.safetensors", "2.1"),
        ("wan2.2_t2v_14B.safetensors", "2.2"),
        ("Wan2_2-T2V-A14B.safetensors", "2.2"),
        ("Wan2_1_based_high_noise.safetensors", "2.2"),
        ("mystery_v2.safetensors", None),
    ],
)
def test_the_version_comes_from_the_name(name: str, version: str | None) -> None:
    assert version_from_name(name) == version


# ---- relatives and strangers ----------------------------------------------------------------------------------------


def wan_with(task: str = "t2v", *extra: str) -> dict[str, torch.Tensor]:
    return official_state(tiny_spec(task)) | named_like(extra)


def with_channels(inputs: int, *extra: str, outputs: int = 16) -> dict[str, torch.Tensor]:
    state = official_state(tiny_spec("ti2v" if outputs == 48 else "t2v"))
    return state | {"patch_embedding.weight": torch.zeros(128, inputs, 1, 2, 2)} | named_like(extra)


RELATIVES = {
    "Wan VACE": wan_with("t2v", "vace_patch_embedding.weight", "vace_blocks.0.after_proj.weight"),
    "Wan Fun camera-control": wan_with("i2v", "control_adapter.conv.weight"),
    "Wan2.2's S2V-14B": wan_with("i2v", "casual_audio_encoder.encoder.final_linear.weight"),
    "HuMo": wan_with("i2v", "audio_proj.audio_proj_glob_1.layer.bias"),
    "Wan2.2's ANIMATE-14B": wan_with("i2v", "img_emb.proj.0.bias", "face_adapter.fuser_blocks.0.k_norm.weight"),
    "Wan2.1 I2V-14B": wan_with("i2v", "img_emb.proj.0.bias", "blocks.0.cross_attn.k_img.weight"),
    "Wan2.1 FLF2V": wan_with("i2v", "img_emb.proj.0.bias", "img_emb.emb_pos"),
    "Wan2.1 1.3B": wan_with() | {"patch_embedding.weight": torch.zeros(1536, 16, 1, 2, 2)},
    "Wan2.1 Fun": with_channels(48, "img_emb.proj.0.bias"),
    "Wan Fun control": with_channels(52, "ref_conv.weight"),
    "Wan Fun control ": with_channels(100, outputs=48),
    "24 input": with_channels(24, outputs=48) | {"head.head.weight": torch.zeros(80, 128)},
}


@pytest.mark.parametrize("label", RELATIVES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_wan_transformers_are_refused_by_name(tmp_path: Path, label: str, prefix: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file(prefixed(RELATIVES[label], prefix), path)
    assert label.strip() in inspect(path).label and not inspect(path).supported
    with pytest.raises(
        CheckpointError, match=r"^file\.safetensors is an?\w* .*; this loader takes Wan2.2 T2V-A14B"
    ) as error:
        load_transformer(path)
    assert label.strip() in str(error.value) and "\n" not in str(error.value)


def test_a_diffusers_wan21_i2v_is_known_by_its_image_embedder() -> None:
    state = official_state(tiny_spec("i2v")) | named_like(["img_emb.proj.0.bias", "blocks.0.cross_attn.k_img.weight"])
    assert "Wan2.1 I2V-14B" in inspect(diffusers_state(state)).label


def test_a_wan21_t2v_is_refused_by_its_name_for_its_tensors_are_the_same(tmp_path: Path) -> None:
    state = official_state(tiny_spec("t2v"))
    save_file(state, tmp_path / "wan2.1_t2v_14B_fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"is a Wan2\.1 T2V-14B transformer by its name"):
        load_transformer(tmp_path / "wan2.1_t2v_14B_fp16.safetensors")
    save_file(state, tmp_path / "t2v.safetensors")
    assert load_transformer(tmp_path / "t2v.safetensors").spec.task is Task.T2V


@pytest.mark.parametrize("signature", [*PARTS, *FOREIGN], ids=lambda s: f"{s.label}:{s.names[0]}")
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_every_signature_is_found_and_none_is_hidden_by_another(signature, prefix: str) -> None:  # type: ignore[no-untyped-def]
    state = named_like([prefix + name for name in signature.names] + ["other.weight"])
    assert inspect(state).label == signature.label


FILES = {
    "a Flux transformer": (
        named_like(["double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"]),
        "Load Diffusion Model",
    ),
    "a LoRA": (named_like(["diffusion_model.blocks.0.self_attn.q.lora_A.weight"]), "with a LoRA loader"),
    "a LoRA (kohya)": (named_like(["lora_unet_blocks_0_self_attn_q.lora_down.weight"]), "with a LoRA loader"),
    "the Wan2.1 VAE": (named_like(["decoder.middle.0.residual.0.gamma"]), "as the VAE instead"),
    "a UMT5 text encoder": (named_like(["token_embedding.weight", "blocks.0.attn.q.weight"]), "as the text encoder"),
    "a T5-XXL text encoder, not UMT5": (
        named_like(
            [
                "encoder.block.0.layer.0.SelfAttention.k.weight",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
                "encoder.block.1.layer.0.SelfAttention.k.weight",
            ]
        ),
        "loader node made for it",
    ),
    "a CLIP vision encoder": (named_like(["vision_model.encoder.layers.0.self_attn.q_proj.weight"]), "CLIP vision"),
    "an SDXL model": (
        named_like(["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"]),
        "loader",
    ),
    "an unknown model": (named_like(["a.b.c"]), "loader node"),
    "a file without tensors": ({}, "loader node"),
}


@pytest.mark.parametrize("label", FILES)
def test_a_file_in_the_wrong_place_is_named_and_sent_where_it_belongs(tmp_path: Path, label: str) -> None:
    state, advice = FILES[label]
    save_file(state, tmp_path / "given.safetensors")
    with pytest.raises(CheckpointError, match=r"^given\.safetensors is ") as error:
        load_transformer(tmp_path / "given.safetensors")
    assert label.split(" (")[0] in str(error.value) and advice in str(error.value)


@pytest.mark.parametrize("name", ["wan2.2-t2v-high-Q4.gguf", "renamed.safetensors"])
def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
    assert inspect(tmp_path / name).kind is Kind.GGUF
    with pytest.raises(CheckpointError, match=f"^{name} is a GGUF file; this loader takes"):
        load_transformer(tmp_path / name)


# ---- storage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "storage"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")]
)
def test_plain_storage_is_that_of_the_bulk(dtype: torch.dtype, storage: str) -> None:
    state = official_state(tiny_spec(dim=256, layers=4), dtype=dtype)
    state["head.modulation"] = state["head.modulation"].float()
    assert inspect(state).storage == storage


@pytest.mark.parametrize(
    "convention", ["fp8", "scaled_fp8", "comfy_quant", "quantization_metadata", "lightx2v_fp8", "lightx2v_int8"]
)
def test_quantised_conventions_are_told_apart(tmp_path: Path, convention: str) -> None:
    stored, metadata, _ = quantised(official_state(tiny_spec(dim=256, layers=4)), convention)
    save_file(stored, tmp_path / "m.safetensors", metadata=metadata)
    found = inspect(tmp_path / "m.safetensors")
    assert found.storage == convention
    assert found.quantization is not None and found.quantization.unsupported is None


def test_scales_without_a_marker_are_scaled_fp8() -> None:
    stored, _, _ = quantised(official_state(tiny_spec(dim=256, layers=4)), "quantization_metadata")
    assert inspect(stored).storage is Storage.SCALED_FP8


def unsupported() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]:
    plain = official_state(tiny_spec())
    layer = "blocks.0.self_attn.q"
    block_scales = plain | {
        f"{layer}.weight": plain[f"{layer}.weight"].to(torch.float8_e4m3fn),
        f"{layer}.weight_scale": torch.ones(4, 4),
    }
    mx = block_scales | {f"{layer}.weight_scale": torch.ones(128, 4, dtype=torch.uint8)}
    metadata = {"_quantization_metadata": json.dumps({"layers": {layer: {"format": "nvfp4"}}})}
    return {
        "nvfp4": (plain | {f"{layer}.comfy_quant": json_tensor({"format": "nvfp4"})}, {}),
        "int8_tensorwise": (plain | {f"{layer}.comfy_quant": json_tensor({"format": "int8_tensorwise"})}, {}),
        "nvfp4 ": (plain, metadata),
        "nvfp4  ": (plain | {f"{layer}.weight_scale_2": torch.ones(())}, {}),
        "block-scaled f32": (block_scales, {}),
        "mxfp8": (mx, {}),
        "bitsandbytes 4-bit": (plain | {f"{layer}.weight.absmax": torch.ones(3)}, {}),
        "SVDQuant": (plain | {f"{layer}.wscales": torch.ones(3)}, {}),
    }


@pytest.mark.parametrize("name", unsupported())
def test_formats_that_cannot_be_read_are_refused_by_name(tmp_path: Path, name: str) -> None:
    state, metadata = unsupported()[name]
    save_file(state, tmp_path / "m.safetensors", metadata=metadata)
    assert inspect(tmp_path / "m.safetensors").storage is Storage.UNSUPPORTED
    with pytest.raises(
        CheckpointError, match=rf"^m\.safetensors stores its weights as {name.strip()}.*this loader takes bf16"
    ):
        load_transformer(tmp_path / "m.safetensors")


@pytest.mark.parametrize("text", [b"", b"{}", b"[[", b"\xff\xfe"])
def test_an_unreadable_layer_format_is_an_error(text: bytes) -> None:
    state = official_state(tiny_spec()) | {
        "blocks.0.self_attn.q.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)
    }
    with pytest.raises(CheckpointError, match=r"comfy_quant does not name a quantisation format"):
        inspect(state)


@pytest.mark.parametrize("name", ["blocks.0.ffn.0.weight", "patch_embedding.weight", "text_embedding.0.weight"])
def test_a_transformer_without_the_tensor_that_tells_its_size(name: str) -> None:
    state = official_state(tiny_spec())
    del state[name]
    with pytest.raises(CheckpointError, match=rf"is incomplete: it has no tensor named {name}; .*TI2V-5B.*download"):
        inspect(state)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_the_two_experts_of_a_model_are_both_needed() -> None:
    def found(task: str, expert: str | None):  # type: ignore[no-untyped-def]
        from dataclasses import replace

        return replace(inspect(official_state(tiny_spec(task))), expert=expert)

    high, low = found("t2v", "high_noise"), found("t2v", "low_noise")
    require_expert_pair(high, low, "high.safetensors")
    require_expert_pair(found("t2v", None), found("t2v", None), "a")
    require_expert_pair(found("ti2v", None), None, "5b")
    for first, second, words in (
        (high, None, "T2V-A14B needs both experts; choose the low-noise file as well"),
        (low, None, "choose the high-noise file as well"),
        (low, high, "are swapped"),
        (high, high, "both files are the high-noise expert"),
        (
            high,
            found("i2v", "low_noise"),
            "do not belong together: .*; choose the high-noise and the low-noise file of one model",
        ),
        (found("ti2v", None), low, "has one expert; leave the low-noise file empty"),
    ):
        with pytest.raises(CheckpointError, match=words):
            require_expert_pair(first, second, "given.safetensors")


def test_an_expert_must_be_one_of_two_and_agree_with_the_name(tmp_path: Path) -> None:
    path = tmp_path / "wan2.2_t2v_high_noise.safetensors"
    save_file(official_state(tiny_spec()), path)
    with pytest.raises(InputError, match="expert must be 'high_noise' or 'low_noise' or None; got 'high'"):
        load_transformer(path, "high")
    with pytest.raises(InputError, match="is the high_noise expert by its name, but low_noise was asked for"):
        load_transformer(path, "low_noise")
    assert load_transformer(path, "high_noise").spec == tiny_spec()


# ---- listing --------------------------------------------------------------------------------------------------------


def test_checkpoint_folders_are_found_by_name_and_kind(tmp_path: Path) -> None:
    official_folder(tmp_path / "Wan-AI" / "Wan2.2-T2V-A14B", tiny_spec("t2v"))
    diffusers_folder(tmp_path / "i2v-diffusers", tiny_spec("i2v"))
    (tmp_path / "5b").mkdir()
    save_file(official_state(tiny_spec("ti2v")), tmp_path / "5b" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "5b" / "config.json").write_text(json.dumps({"in_dim": 48, "out_dim": 48}))
    (tmp_path / ".cache" / "high_noise_model").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c" / "d" / "high_noise_model").mkdir(parents=True)
    found = {entry.name: (entry.kind, entry.task) for entry in find_checkpoints(tmp_path)}
    assert found == {
        "5b": ("official", Task.TI2V),
        "i2v-diffusers": ("diffusers", Task.I2V),
        "Wan-AI/Wan2.2-T2V-A14B": ("official", Task.T2V),
    }
    assert find_checkpoints(tmp_path / "nowhere") == []


def test_a_damaged_config_is_logged_and_the_folder_still_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "m" / "high_noise_model").mkdir(parents=True)
    (tmp_path / "m" / "high_noise_model" / "config.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert [(found.name, found.task) for found in find_checkpoints(tmp_path)] == [("m", None)]
    assert "config.json in high_noise_model is not JSON" in caplog.text


def test_large_folders_list_quickly_and_without_opening_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        folder = tmp_path / f"images{number}"
        folder.mkdir()
        for image in range(250):
            (folder / f"{image}.png").touch()
    official_folder(tmp_path / "wan", tiny_spec())
    opened = []
    real = __import__("wan_fp8.checkpoint.listing", fromlist=["read_json"]).read_json
    monkeypatch.setattr("wan_fp8.checkpoint.listing.read_json", lambda path: opened.append(path.name) or real(path))
    start = time.perf_counter()
    assert [found.name for found in find_checkpoints(tmp_path)] == ["wan"]
    assert time.perf_counter() - start < 1.0
    assert opened == ["config.json"]
