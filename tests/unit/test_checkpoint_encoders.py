"""Text encoder and VAE weights from official, Hugging Face, Diffusers and ComfyUI files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_kit import E4M3, diffusers_folder, named_like, official_folder, tiny_spec, write_shards
from safetensors.torch import save_file
from torch import Tensor

from wan_fp8.checkpoint.detect import inspect
from wan_fp8.checkpoint.encoders import load_text_encoder_state_dict, load_vae_state_dict, require_vae_version
from wan_fp8.checkpoint.key_maps import T5, VAE_21, VAE_22
from wan_fp8.errors import CheckpointError, InputError

LINEARS = (".SelfAttention.", ".DenseReluDense.")
PROTO = bytes(range(200))


def hf_text_encoder(layers: int = 2) -> dict[str, Tensor]:
    """Random weights of a tiny ``UMT5EncoderModel`` under its own names, without the alias of the token table."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=layers, num_heads=2)
    state = {name: value.clone() for name, value in UMT5EncoderModel(config).state_dict().items()}
    del state["encoder.embed_tokens.weight"]
    return state


HF = hf_text_encoder()


def is_linear(name: str) -> bool:
    return any(part in name for part in LINEARS) and "relative" not in name


def scaled(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """ComfyUI's scaled FP8 file of a text encoder, and what each weight is worth."""
    stored: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2).to(E4M3)}
    worth = {}
    for name, value in state.items():
        stored[name] = worth[name] = value
        if is_linear(name):
            scale = (value.abs().max() / 448).float()
            stored[name] = (value / scale).to(E4M3)
            stored[f"{name.removesuffix('.weight')}.scale_weight"] = scale
            worth[name] = stored[name].float() * scale
    return stored | {"spiece_model": torch.tensor(list(PROTO), dtype=torch.uint8)}, worth


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], value.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_official_archive(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save({T5.to_official(name): value for name, value in HF.items()}, path)
    state, spiece = load_text_encoder_state_dict(path, dtype)
    assert_same(state, HF, dtype)
    assert spiece is None


@pytest.mark.parametrize("alias", ["shared.weight", "encoder.embed_tokens.weight", "both"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_hugging_face_folder_with_either_name_of_the_token_table(tmp_path: Path, alias: str, count: int) -> None:
    state = dict(HF)
    table = state.pop("shared.weight")
    names = ["shared.weight", "encoder.embed_tokens.weight"] if alias == "both" else [alias]
    folder = write_shards(tmp_path / "te", state | {name: table.clone() for name in names}, count=count, stem="model")
    assert_same(load_text_encoder_state_dict(folder, torch.float32).state_dict, HF, torch.float32)


def test_it_fills_the_real_class() -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    result = UMT5EncoderModel(config).load_state_dict(HF, strict=False)
    assert result.missing_keys == ["encoder.embed_tokens.weight"] and not result.unexpected_keys


def test_a_decoder_is_left_out(tmp_path: Path) -> None:
    save_file(HF | named_like(["decoder.block.0.x.weight", "lm_head.weight"]), tmp_path / "umt5.safetensors")
    assert load_text_encoder_state_dict(tmp_path / "umt5.safetensors").state_dict.keys() == HF.keys()


def test_the_scaled_file_is_dequantised_and_gives_its_tokenizer(tmp_path: Path) -> None:
    stored, worth = scaled(HF)
    save_file(stored, tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    state, spiece = load_text_encoder_state_dict(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", torch.float32)
    assert_same(state, worth, torch.float32)
    assert spiece == PROTO
    assert "SentencePiece" in inspect(stored).details[0]


def test_fp8_can_be_kept_with_its_scales(tmp_path: Path) -> None:
    stored, worth = scaled(HF)
    save_file(stored, tmp_path / "t5.safetensors")
    state = load_text_encoder_state_dict(tmp_path / "t5.safetensors", dtype=None).state_dict
    scales = {name for name in state if name.endswith(".weight_scale")}
    assert state.keys() - scales == HF.keys()
    assert len(scales) == 14
    for name in scales:
        weight = name.replace("_scale", "")
        assert state[weight].dtype == E4M3
        assert torch.equal(state[weight].float() * state[name], worth[weight])


def test_plain_fp8_keeps_matrices_and_lifts_tables(tmp_path: Path) -> None:
    save_file({name: value.to(E4M3) for name, value in HF.items()}, tmp_path / "t5.safetensors")
    state = load_text_encoder_state_dict(tmp_path / "t5.safetensors", dtype=None).state_dict
    for name in HF:
        assert state[name].dtype == (E4M3 if is_linear(name) else torch.bfloat16), name


def test_what_is_no_umt5_is_named(tmp_path: Path) -> None:
    t5 = {name: value for name, value in HF.items() if "1.layer.0.SelfAttention.relative" not in name}
    strange = HF | named_like(["encoder.block.0.adapter.weight"])
    partial = {name: value for name, value in HF.items() if name != "shared.weight"}
    for state, words in (
        (t5, "is a T5-XXL text encoder, not UMT5; a UMT5 text encoder"),
        (named_like(["decoder.middle.0.residual.0.gamma"]), r"is the Wan2\.1 VAE; a UMT5 text encoder"),
        (strange, r"holds encoder\.block\.0\.adapter\.weight, which no UMT5 encoder has"),
        (partial, "lacks the token embedding"),
    ):
        save_file(state, tmp_path / "given.safetensors")
        with pytest.raises(CheckpointError, match=rf"^given\.safetensors {words}"):
            load_text_encoder_state_dict(tmp_path / "given.safetensors")
    (tmp_path / "t5.gguf").write_bytes(b"GGUF" + bytes(50))
    with pytest.raises(CheckpointError, match=r"^t5\.gguf is a GGUF file"):
        load_text_encoder_state_dict(tmp_path / "t5.gguf")


# ---- VAE ------------------------------------------------------------------------------------------------------------


def vae_state(version: str) -> dict[str, Tensor]:
    """Every official name of a VAE, with one number each."""
    from test_checkpoint_key_maps import core_vae

    return {name: torch.full((2,), float(i)) for i, name in enumerate(core_vae(version).state_dict())}


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_vaes_in_every_form(comfy_core: Path, tmp_path: Path, version: str) -> None:
    official = vae_state(version)
    table = VAE_22 if version == "2.2" else VAE_21
    torch.save(official, tmp_path / f"Wan{version}_VAE.pth")
    save_file(official, tmp_path / "vae.safetensors")
    save_file({f"first_stage_model.{name}": value for name, value in official.items()}, tmp_path / "aio.safetensors")
    diffusers = {str(table.from_official(name)): value for name, value in official.items()}
    folder = write_shards(tmp_path / "vae", diffusers, count=1, index=False)
    for path in (
        tmp_path / f"Wan{version}_VAE.pth",
        tmp_path / "vae.safetensors",
        tmp_path / "aio.safetensors",
        folder,
    ):
        state, found = load_vae_state_dict(path, expected=version)
        assert found == version
        assert_same(state, official, torch.float32)
        assert load_vae_state_dict(path, torch.bfloat16).state_dict["conv1.weight"].dtype == torch.bfloat16


def test_the_wrong_vae_is_refused_with_the_right_ones_name(comfy_core: Path, tmp_path: Path) -> None:
    for given, needed in (("2.1", "2.2"), ("2.2", "2.1")):
        torch.save(vae_state(given), tmp_path / "given.pth")
        with pytest.raises(CheckpointError) as error:
            load_vae_state_dict(tmp_path / "given.pth", expected=needed)
        assert f"given.pth is the Wan{given} VAE" in str(error.value)
        assert f"this model needs the Wan{needed} VAE" in str(error.value)
    with pytest.raises(InputError, match=r"expected must be '2\.1' or '2\.2'; got '1\.5'"):
        require_vae_version("a", "2.1", "1.5")


def test_what_is_no_wan_vae_is_named(comfy_core: Path, tmp_path: Path) -> None:
    for state, words in (
        (named_like(["decoder.mid.block_1.norm1.weight"]), "is a Stable Diffusion or Flux VAE; a Wan VAE"),
        (HF, "is a UMT5 text encoder; a Wan VAE"),
        (
            vae_state("2.1") | named_like(["decoder.extra.weight"]),
            r"holds decoder\.extra\.weight, which the Wan2\.1 VAE",
        ),
    ):
        save_file(state, tmp_path / "given.safetensors")
        with pytest.raises(CheckpointError, match=rf"^given\.safetensors {words}"):
            load_vae_state_dict(tmp_path / "given.safetensors")


# ---- from a checkpoint folder ---------------------------------------------------------------------------------------


def test_a_checkpoint_folder_lends_its_parts(comfy_core: Path, tmp_path: Path) -> None:
    official = official_folder(tmp_path / "official", tiny_spec("t2v"))
    torch.save(
        {T5.to_official(name): value for name, value in HF.items()}, official / "models_t5_umt5-xxl-enc-bf16.pth"
    )
    torch.save(vae_state("2.1"), official / "Wan2.1_VAE.pth")
    diffusers = diffusers_folder(tmp_path / "diffusers", tiny_spec("t2v"))
    write_shards(diffusers / "text_encoder", HF, count=1, index=False, stem="model")
    vae = {str(VAE_21.from_official(name)): value for name, value in vae_state("2.1").items()}
    write_shards(diffusers / "vae", vae, count=1, index=False)
    for folder in (official, diffusers):
        assert_same(load_text_encoder_state_dict(folder, torch.float32).state_dict, HF, torch.float32)
        assert_same(load_vae_state_dict(folder).state_dict, vae_state("2.1"), torch.float32)
    (official / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    with pytest.raises(
        CheckpointError, match=r"official has no text encoder: models_t5_umt5-xxl-enc-bf16\.pth is missing"
    ):
        load_text_encoder_state_dict(official)
