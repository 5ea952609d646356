"""Transformers from every layout, naming scheme and storage; and what happens when a part is missing or wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_kit import (
    E4M3,
    diffusers_folder,
    diffusers_state,
    is_linear,
    named_like,
    official_folder,
    official_state,
    prefixed,
    quantised,
    tiny_spec,
    write_shards,
)
from safetensors.torch import save_file

import wan_fp8
from wan_fp8.checkpoint.folder import resolve_folder
from wan_fp8.checkpoint.load import load_transformer
from wan_fp8.checkpoint.reader import open_source
from wan_fp8.errors import CheckpointError, InputError
from wan_fp8.models.layers import Linear
from wan_fp8.models.specs import Task
from wan_fp8.models.wan import WanModel

SPEC = tiny_spec("t2v")


def assert_state(model: WanModel, expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Exactly these values in exactly this type."""
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == dtype, name
        assert torch.equal(found[name], value.to(dtype)), name


# ---- layouts --------------------------------------------------------------------------------------------------------


def test_the_public_name_is_this_function() -> None:
    assert wan_fp8.load_transformer is load_transformer


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_folders_with_two_experts(tmp_path: Path, layout: str, expert: str) -> None:
    make = official_folder if layout == "official" else diffusers_folder
    folder = make(tmp_path / "wan", SPEC)
    model = load_transformer(folder, expert)
    assert model.spec == SPEC and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert_state(model, official_state(SPEC, seed=int(expert == "low_noise")), torch.bfloat16)


def test_a_folder_with_two_experts_needs_to_know_which(tmp_path: Path) -> None:
    folder = official_folder(tmp_path / "wan", SPEC)
    with pytest.raises(InputError, match="wan has two experts; expert must be 'high_noise' or 'low_noise', got None"):
        load_transformer(folder)


@pytest.mark.parametrize("layout", ["official", "diffusers", "shards"])
def test_folders_with_one_transformer(tmp_path: Path, layout: str) -> None:
    spec = tiny_spec("ti2v")
    if layout == "diffusers":
        folder = diffusers_folder(tmp_path / "5b", spec, two=False)
    else:
        folder = write_shards(tmp_path / "5b", official_state(spec))
        if layout == "official":
            (folder / "Wan2.2_VAE.pth").touch()
    assert_state(load_transformer(folder), official_state(spec), torch.bfloat16)
    with pytest.raises(InputError, match="leave expert at None"):
        load_transformer(folder, "high_noise")


def test_the_folder_of_one_expert_can_be_given_by_itself(tmp_path: Path) -> None:
    folder = official_folder(tmp_path / "wan", SPEC) / "low_noise_model"
    for expert in (None, "low_noise"):
        assert_state(load_transformer(folder, expert), official_state(SPEC, seed=1), torch.bfloat16)
    with pytest.raises(InputError, match="is the low_noise expert by its name"):
        load_transformer(folder, "high_noise")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("scheme", ["official", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_files_and_state_dicts(tmp_path: Path, scheme: str, prefix: str, dtype: torch.dtype) -> None:
    expected = official_state(SPEC, dtype=dtype)
    given = prefixed(expected if scheme == "official" else diffusers_state(expected), prefix)
    path = tmp_path / "wan2.2_t2v_high_noise_14B.safetensors"
    save_file(given, path)
    for source in (path, str(path), given):
        assert_state(load_transformer(source, dtype=torch.float32), expected, torch.float32)
        assert_state(load_transformer(source, dtype=None), expected, dtype)


def test_an_archive_of_plain_tensors_is_a_checkpoint_too(tmp_path: Path) -> None:
    torch.save(official_state(SPEC), tmp_path / "t2v_high_noise.pth")
    assert_state(load_transformer(tmp_path / "t2v_high_noise.pth"), official_state(SPEC), torch.bfloat16)


def test_files_may_be_copied_instead_of_mapped(tmp_path: Path) -> None:
    path = tmp_path / "t2v_high_noise.safetensors"
    save_file(official_state(SPEC), path)
    model = load_transformer(path, dtype=torch.float32, map_files=False)
    path.write_bytes(b"")
    assert_state(model, official_state(SPEC), torch.float32)


def test_a_source_that_the_caller_opened_stays_open(tmp_path: Path) -> None:
    save_file(official_state(SPEC), tmp_path / "t2v_high_noise.safetensors")
    with open_source(tmp_path / "t2v_high_noise.safetensors") as source:
        load_transformer(source)
        with pytest.raises(InputError):
            load_transformer(source, "high")
        assert_state(load_transformer(source), official_state(SPEC), torch.bfloat16)


def test_tensors_of_a_state_dict_are_shared_where_nothing_changes() -> None:
    state = {name: value.to(torch.bfloat16) for name, value in official_state(SPEC).items()}
    for given, shared in ((state, True), ({name: value.clone() for name, value in state.items()}, False)):
        loaded = load_transformer(given).state_dict()
        assert all((loaded[name].data_ptr() == state[name].data_ptr()) is shared for name in state)


def test_a_subclass_and_a_device_can_be_chosen() -> None:
    class Mine(WanModel):
        pass

    model = load_transformer(official_state(SPEC), model_class=Mine, device="meta")
    assert type(model) is Mine
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
def test_a_type_that_cannot_be_computed_in_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"dtype must be one of .* or None"):
        load_transformer(official_state(SPEC), dtype=dtype)


# ---- quantised files ------------------------------------------------------------------------------------------------

CONVENTIONS = ["fp8", "scaled_fp8", "comfy_quant", "quantization_metadata", "lightx2v_fp8", "lightx2v_int8"]
BIG = tiny_spec("t2v", dim=256, layers=3)


def quantised_file(tmp_path: Path, convention: str, prefix: str = "") -> tuple[Path, dict[str, torch.Tensor]]:
    stored, metadata, worth = quantised(official_state(BIG), convention)
    path = tmp_path / "t2v_low_noise.safetensors"
    save_file(prefixed(stored, prefix), path, metadata=metadata)
    return path, worth


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_files_are_dequantised_exactly(tmp_path: Path, convention: str, prefix: str, dtype: torch.dtype) -> None:
    path, worth = quantised_file(tmp_path, convention, prefix)
    assert_state(load_transformer(path, dtype=dtype), worth, dtype)


@pytest.mark.parametrize("convention", [name for name in CONVENTIONS if "int8" not in name])
def test_fp8_files_keep_their_bytes_when_asked(tmp_path: Path, convention: str) -> None:
    path, worth = quantised_file(tmp_path, convention)
    stored, _, _ = quantised(official_state(BIG), convention)
    model = load_transformer(path, dtype=None)
    kept = 0
    for name, module in model.named_modules():
        if not isinstance(module, Linear):
            continue
        expected = stored[f"{name}.weight"]
        assert module.weight.dtype == expected.dtype
        if expected.dtype == E4M3:
            kept += 1
            assert torch.equal(module.weight.view(torch.uint8), expected.view(torch.uint8))
            assert isinstance(module.weight_scale, torch.nn.Parameter) and module.weight_scale.dtype == torch.float32
            assert module.weight_scale.shape in ((), (expected.shape[0], 1))
            assert torch.equal(module.dequantized(module.weight, torch.float32), worth[f"{name}.weight"])
        else:
            assert module.weight_scale is None
    assert kept == 3 * 10
    assert model.blocks[0].modulation.dtype == torch.float32


def test_fp8_that_is_no_linear_weight_becomes_bf16(tmp_path: Path) -> None:
    """Plain FP8 files have FP8 biases, norms and tables."""
    state = {name: value.to(E4M3) for name, value in official_state(BIG).items()}
    save_file(state, tmp_path / "t2v_high_noise_fp8_e4m3fn.safetensors")
    model = load_transformer(tmp_path / "t2v_high_noise_fp8_e4m3fn.safetensors", dtype=None)
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        keeps = isinstance(owner, Linear) and name.endswith(".weight")
        wanted = torch.float32 if name.endswith("_scale") else E4M3 if keeps else torch.bfloat16
        assert parameter.dtype == wanted, name
        if wanted is torch.bfloat16:
            assert torch.equal(parameter, state[name].to(torch.bfloat16))
    assert model.patch_embedding.weight.dtype == torch.bfloat16


def test_fp8_can_be_kept_while_everything_else_gets_a_type(tmp_path: Path) -> None:
    path, worth = quantised_file(tmp_path, "scaled_fp8")
    model = load_transformer(path, dtype=torch.bfloat16, keep_fp8=True)
    types = {name: parameter.dtype for name, parameter in model.named_parameters() if not name.endswith("_scale")}
    for name, dtype in types.items():
        assert dtype == (E4M3 if is_linear(name, worth[name]) else torch.bfloat16), name
    assert model.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(("rest", "wanted"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_high_precision_embeddings_do_not_make_an_fp8_file_compute_in_fp32(
    rest: torch.dtype, wanted: torch.dtype
) -> None:
    stored, _, _ = quantised(official_state(BIG, dtype=rest), "scaled_fp8")
    model = load_transformer(stored, dtype=None)
    assert model.text_embedding[0].weight.dtype == rest
    assert model.compute_dtype == wanted
    assert load_transformer(stored, dtype=torch.float32).compute_dtype == torch.float32


def test_int8_cannot_be_kept(tmp_path: Path) -> None:
    path, _ = quantised_file(tmp_path, "lightx2v_int8")
    with pytest.raises(InputError, match=r"stores int8 weights.*dtype=torch\.bfloat16"):
        load_transformer(path, dtype=None)


def test_a_scale_without_its_weight_is_not_ignored() -> None:
    stored, _, _ = quantised(official_state(SPEC), "scaled_fp8")
    stored["blocks.0.self_attn.x.scale_weight"] = torch.tensor(1.0)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(blocks\.0\.self_attn\.x\.scale_weight\)"):
        load_transformer(stored)


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshaped_names_are_counted_and_the_first_named() -> None:
    state = official_state(SPEC)
    for name in [name for name in state if ".ffn.0." in name]:
        del state[name]
    state["blocks.0.ffn.0.weight"] = torch.zeros(256, 128)
    state["blocks.0.self_attn.q.weight"] = torch.zeros(3, 128)
    state |= named_like(["extra.weight"])
    with pytest.raises(CheckpointError) as error:
        load_transformer(state)
    message = str(error.value)
    assert "3 missing (blocks.0.ffn.0.bias, blocks.1.ffn.0.weight, blocks.1.ffn.0.bias)" in message
    assert "1 unexpected (extra.weight)" in message
    assert "1 misshaped (blocks.0.self_attn.q.weight [3, 128] instead of [128, 128])" in message


def test_long_lists_are_cut() -> None:
    state = {name: value for name, value in official_state(SPEC).items() if "bias" not in name}
    with pytest.raises(CheckpointError, match=r"\d\d missing \(.*, \.\.\.\)"):
        load_transformer(state)


def test_nothing_is_read_before_every_name_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = official_state(SPEC)
    del state["blocks.1.ffn.2.bias"]
    save_file(state, tmp_path / "t2v_high_noise.safetensors")
    monkeypatch.setattr(
        "wan_fp8.checkpoint.reader.SafetensorsSource.read",
        lambda *args, **kwargs: pytest.fail("a tensor was read"),
    )
    with pytest.raises(CheckpointError, match=r"1 missing \(blocks\.1\.ffn\.2\.bias\)"):
        load_transformer(tmp_path / "t2v_high_noise.safetensors")


@pytest.mark.parametrize(("present", "absent"), [("high_noise", "low_noise"), ("low_noise", "high_noise")])
def test_one_official_expert_alone_is_not_enough(tmp_path: Path, present: str, absent: str) -> None:
    folder = official_folder(tmp_path / "wan", SPEC, experts=[present])
    words = f"wan has {present}_model/ but no {absent}_model/: T2V-A14B needs both experts; download {absent}_model/"
    for call in (lambda: load_transformer(folder, present), lambda: resolve_folder(folder)):
        with pytest.raises(CheckpointError, match=words):
            call()


@pytest.mark.parametrize("absent", ["transformer", "transformer_2"])
def test_one_diffusers_expert_alone_is_not_enough(tmp_path: Path, absent: str) -> None:
    folder = diffusers_folder(tmp_path / "wan", SPEC)
    shutil.rmtree(folder / absent)
    with pytest.raises(CheckpointError, match=f"wan has no {absent}/ with weights: WanPipeline needs both experts"):
        load_transformer(folder, "high_noise")


def test_a_missing_shard_and_a_truncated_one_are_named(tmp_path: Path) -> None:
    folder = official_folder(tmp_path / "wan", SPEC)
    shard = folder / "high_noise_model" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is truncated"):
        load_transformer(folder, "high_noise")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"high_noise_model is incomplete: {shard.name} of 2 shards is missing"):
        load_transformer(folder, "high_noise")


# ---- folders and their parts ----------------------------------------------------------------------------------------


def test_the_parts_of_an_official_folder(tmp_path: Path) -> None:
    folder = official_folder(tmp_path / "wan", SPEC)
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        (folder / name).touch()
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    found = resolve_folder(folder)
    assert (found.layout, found.task, found.boundary) == ("official", Task.T2V, None)
    assert found.transformers == {
        "high_noise": folder / "high_noise_model",
        "low_noise": folder / "low_noise_model",
    }
    assert found.require_text_encoder() == folder / "models_t5_umt5-xxl-enc-bf16.pth"
    assert found.require_vae() == folder / "Wan2.1_VAE.pth"
    assert found.tokenizer == folder / "google" / "umt5-xxl"
    assert found.config["in_dim"] == 16


def test_the_parts_of_a_diffusers_folder(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "wan", tiny_spec("i2v"))
    for name in ("text_encoder", "vae"):
        write_shards(folder / name, {"a": torch.zeros(1)}, count=1, stem="model")
    (folder / "tokenizer").mkdir()
    found = resolve_folder(folder)
    assert (found.layout, found.task, found.boundary) == ("diffusers", Task.I2V, 0.875)
    assert found.require_text_encoder() == folder / "text_encoder"
    assert found.require_vae() == folder / "vae"
    assert found.tokenizer == folder / "tokenizer"
    assert found.transformers["low_noise"] == folder / "transformer_2"
    assert found.model_index["_class_name"] == "WanPipeline"


@pytest.mark.parametrize(
    ("task", "there", "wanted"), [("t2v", "Wan2.2_VAE.pth", "2.1"), ("ti2v", "Wan2.1_VAE.pth", "2.2")]
)
def test_the_vae_of_another_model_is_not_taken(tmp_path: Path, task: str, there: str, wanted: str) -> None:
    spec = tiny_spec(task)
    folder = official_folder(tmp_path / "wan", spec) if task == "t2v" else write_shards(tmp_path / "wan", {})
    if task == "ti2v":
        write_shards(folder, official_state(spec))
        (folder / "config.json").write_text(json.dumps({"in_dim": 48, "out_dim": 48}))
    (folder / there).touch()
    found = resolve_folder(folder)
    assert found.vae is None
    with pytest.raises(CheckpointError, match=f"has no Wan{wanted}_VAE.pth and {there} is the VAE of other models"):
        found.require_vae()


def test_missing_parts_are_named_when_they_are_needed(tmp_path: Path) -> None:
    for folder in (official_folder(tmp_path / "a", SPEC), diffusers_folder(tmp_path / "b", SPEC)):
        found = resolve_folder(folder)
        with pytest.raises(CheckpointError, match="has no text encoder"):
            found.require_text_encoder()
        with pytest.raises(CheckpointError, match=r"has no (Wan2\.1_VAE\.pth|vae/ with weights); download"):
            found.require_vae()


def test_folders_that_are_no_checkpoint_say_what_is_in_them(tmp_path: Path) -> None:
    (tmp_path / "stuff").mkdir()
    (tmp_path / "stuff" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"stuff is no checkpoint folder \(it holds notes\.txt\)"):
        load_transformer(tmp_path / "stuff")
    with pytest.raises(CheckpointError, match="there is no"):
        load_transformer(tmp_path / "nowhere")
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(CheckpointError, match="flux is a Diffusers folder of FluxPipeline"):
        load_transformer(tmp_path / "flux")
    (tmp_path / "flux" / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"model_index\.json in flux is not a JSON object"):
        load_transformer(tmp_path / "flux")


def test_a_wan21_folder_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "Wan2.1-T2V-14B", official_state(SPEC))
    with pytest.raises(CheckpointError, match=r"is a Wan2\.1 T2V-14B transformer by its name"):
        load_transformer(folder)


def test_no_expert_file_stays_open_after_an_error(tmp_path: Path) -> None:
    save_file(named_like(["double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"]), tmp_path / "f.safetensors")
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("counts open files in /proc")
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        with pytest.raises(CheckpointError, match="is a Flux transformer"):
            load_transformer(tmp_path / "f.safetensors")
    assert len(list(descriptors.iterdir())) <= before


def test_helpers_see_block_linears() -> None:
    assert sum(is_linear(name, value) for name, value in official_state(BIG).items()) == 3 * 10
