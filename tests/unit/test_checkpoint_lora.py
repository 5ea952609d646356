"""LoRA files of every format become the same changes, exactly; what does not belong is reported, never dropped."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_kit import named_like, official_state, tiny_spec
from safetensors.torch import save_file
from torch import Tensor

from wan_fp8.checkpoint.key_maps import DIT
from wan_fp8.checkpoint.lora import Diff, LowRank, delta, fit, read_lora, to_comfy_state_dict
from wan_fp8.errors import CheckpointError, InputError

SPEC = tiny_spec("t2v", dim=256)
WEIGHTS = official_state(SPEC)
SHAPES = {name: tuple(value.shape) for name, value in WEIGHTS.items()}
RANK = 4
MODULES = (
    "blocks.0.self_attn.q",
    "blocks.0.self_attn.norm_q",
    "blocks.1.cross_attn.o",
    "blocks.1.ffn.0",
    "blocks.1.ffn.2",
    "head.head",
    "text_embedding.0",
    "time_embedding.2",
    "time_projection.1",
)
LINEARS = tuple(name for name in MODULES if "norm" not in name)


def pairs(seed: int = 0, alpha: float | None = None) -> dict[str, LowRank]:
    """One low-rank change for each of LINEARS."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for module in LINEARS:
        out, inner = SHAPES[f"{module}.weight"]
        down, up = torch.randn(RANK, inner, generator=generator), torch.randn(out, RANK, generator=generator)
        changes[module] = LowRank(down, up, alpha)
    return changes


def flat(module: str) -> str:
    return module.replace(".", "_")


def diffusers(module: str) -> str:
    return str(DIT.from_official(f"{module}.weight")).removesuffix(".weight")


Name = Callable[[str], str]
FORMATS: dict[str, tuple[Name, str, str]] = {
    "official": (lambda m: f"diffusion_model.{m}", "lora_down.weight", "lora_up.weight"),
    "official PEFT": (lambda m: f"diffusion_model.{m}", "lora_A.weight", "lora_B.weight"),
    "bare": (lambda m: m, "lora_A.weight", "lora_B.weight"),
    "bare with an adapter name": (lambda m: m, "lora_A.default.weight", "lora_B.default.weight"),
    "bare parameters": (lambda m: m, "lora_A", "lora_B"),
    "kohya": (lambda m: f"lora_unet_{flat(m)}", "lora_down.weight", "lora_up.weight"),
    "Wan-Fun": (lambda m: f"lora_unet__{flat(m)}", "lora_down.weight", "lora_up.weight"),
    "half-converted": (
        lambda m: "lora_unet_" + m.replace(".", "_", 1 if m.startswith("blocks") else 0),
        "lora_down.weight",
        "lora_up.weight",
    ),
    "diffusers": (lambda m: f"transformer.{diffusers(m)}", "lora_A.weight", "lora_B.weight"),
    "diffusers low noise": (lambda m: f"transformer_2.{diffusers(m)}", "lora_A.weight", "lora_B.weight"),
    "PEFT wrapper": (lambda m: f"base_model.model.{m}", "lora_A.weight", "lora_B.weight"),
    "PEFT wrapper, diffusers names": (
        lambda m: f"base_model.model.{diffusers(m)}",
        "lora_A.default.weight",
        "lora_B.default.weight",
    ),
    "nested prefixes": (lambda m: f"base_model.model.diffusion_model.{m}", "lora_A.weight", "lora_B.weight"),
    "old diffusers": (lambda m: f"transformer.{diffusers(m)}", "lora.down.weight", "lora.up.weight"),
    "kohya, diffusers names": (lambda m: f"lora_unet_{flat(diffusers(m))}", "lora_down.weight", "lora_up.weight"),
    "OneTrainer": (lambda m: f"lora_transformer_{flat(diffusers(m))}", "lora_down.weight", "lora_up.weight"),
}


def lora_state(form: str, changes: dict[str, LowRank]) -> dict[str, Tensor]:
    name, down, up = FORMATS[form]
    state = {}
    for module, change in changes.items():
        state[f"{name(module)}.{down}"] = change.down
        state[f"{name(module)}.{up}"] = change.up
        if change.alpha is not None:
            state[f"{name(module)}.alpha"] = torch.tensor(change.alpha)
    return state


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_becomes_the_same_changes(tmp_path: Path, form: str, alpha: float | None) -> None:
    changes = pairs(alpha=alpha)
    save_file(lora_state(form, changes), tmp_path / "lora.safetensors")
    lora = read_lora(tmp_path / "lora.safetensors")
    assert lora.unknown == () and lora.describe_unknown() is None
    assert lora.expert == ("low_noise" if form == "diffusers low noise" else None)
    entries = fit(lora, SHAPES).entries
    assert entries.keys() == {f"{module}.weight" for module in LINEARS}
    for module, change in changes.items():
        (entry,) = entries[f"{module}.weight"]
        factor = 1.0 if alpha is None else alpha / RANK
        exact = 0.7 * factor * (change.up.double() @ change.down.double())
        assert torch.equal(delta(entry, 0.7, torch.float64), exact)
        assert torch.allclose(delta(entry, 0.7).double(), exact, rtol=1e-5, atol=1e-5)


def test_full_rank_extras_of_distilled_loras() -> None:
    state = {
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.randn(256),
        "diffusion_model.blocks.0.norm3.diff": torch.randn(256),
        "diffusion_model.blocks.0.norm3.diff_b": torch.randn(256),
        "diffusion_model.blocks.1.self_attn.norm_q.diff": torch.randn(256),
        "diffusion_model.blocks.0.diff_m": torch.randn(1, 6, 256),
        "diffusion_model.head.diff_m": torch.randn(1, 2, 256),
        "diffusion_model.head.head.diff": torch.randn(64, 256),
        "diffusion_model.patch_embedding.diff": torch.randn(256, 16, 1, 2, 2),
        "diffusion_model.patch_embedding.diff_b": torch.randn(256),
    }
    found = fit(read_lora(state), SHAPES)
    assert found.skipped == ()
    expected = {
        "blocks.0.self_attn.q.bias": "blocks.0.self_attn.q.diff_b",
        "blocks.0.norm3.weight": "blocks.0.norm3.diff",
        "blocks.0.norm3.bias": "blocks.0.norm3.diff_b",
        "blocks.1.self_attn.norm_q.weight": "blocks.1.self_attn.norm_q.diff",
        "blocks.0.modulation": "blocks.0.diff_m",
        "head.modulation": "head.diff_m",
        "head.head.weight": "head.head.diff",
        "patch_embedding.weight": "patch_embedding.diff",
        "patch_embedding.bias": "patch_embedding.diff_b",
    }
    assert found.entries.keys() == expected.keys()
    for parameter, key in expected.items():
        (entry,) = found.entries[parameter]
        assert isinstance(entry, Diff)
        assert torch.equal(delta(entry, -0.5), -0.5 * state[f"diffusion_model.{key}"])


@pytest.mark.parametrize(
    ("key", "parameter"),
    [
        ("diffusion_model.blocks.0.modulation.diff", "blocks.0.modulation"),
        ("diffusion_model.blocks.0.norm3.bias.diff", "blocks.0.norm3.bias"),
        ("transformer.blocks.0.norm2.w_norm", "blocks.0.norm3.weight"),
        ("transformer.blocks.0.norm2.b_norm", "blocks.0.norm3.bias"),
        ("transformer.scale_shift_table.diff", "head.modulation"),
        ("transformer.blocks.0.attn1.to_q.lora_B.bias", "blocks.0.self_attn.q.bias"),
        ("blocks.0.self_attn.q.lora_B.default.bias", "blocks.0.self_attn.q.bias"),
    ],
)
def test_other_spellings_of_full_rank_changes(key: str, parameter: str) -> None:
    (name,) = read_lora({key: torch.ones(SHAPES[parameter])}).entries()
    assert name == parameter


def test_kohya_names_with_underscores_of_their_own() -> None:
    state = {
        "lora_unet_blocks_11_cross_attn_norm_k_img.diff": torch.ones(1),
        "lora_unet_blocks_11_cross_attn_v_img.diff": torch.ones(1),
        "lora_unet_img_emb_proj_3.diff": torch.ones(1),
    }
    assert list(read_lora(state).entries()) == [
        "blocks.11.cross_attn.norm_k_img.weight",
        "blocks.11.cross_attn.v_img.weight",
        "img_emb.proj.3.weight",
    ]


# ---- experts --------------------------------------------------------------------------------------------------------


def test_a_diffusers_file_for_both_experts() -> None:
    high, low = pairs(seed=1), pairs(seed=2)
    lora = read_lora(lora_state("diffusers", high) | lora_state("diffusers low noise", low))
    for expert, changes in (("high_noise", high), ("low_noise", low)):
        (entry,) = fit(lora, SHAPES, expert).entries["blocks.1.ffn.2.weight"]
        assert isinstance(entry, LowRank) and torch.equal(entry.up, changes["blocks.1.ffn.2"].up)
    with pytest.raises(InputError, match="the state dict has changes for both experts; say which"):
        lora.entries()


def test_what_has_no_prefix_is_for_both_experts() -> None:
    state = lora_state("diffusers", pairs()) | lora_state("diffusers low noise", pairs())
    lora = read_lora(state | {"diffusion_model.head.diff_m": torch.ones(1, 2, 256)})
    assert all("head.modulation" in lora.entries(expert) for expert in ("high_noise", "low_noise"))


def test_the_expert_of_a_file_comes_from_its_name(tmp_path: Path) -> None:
    path = tmp_path / "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors"
    save_file(lora_state("official", pairs()), path)
    assert read_lora(path).expert == "high_noise"


# ---- alpha beside the tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_in_diffusers_metadata(tmp_path: Path, rslora: bool) -> None:
    config = {
        "transformer.lora_alpha": 8,
        "transformer.r": RANK,
        "transformer.use_rslora": rslora,
        "transformer.alpha_pattern": {"blocks.1.ffn.net.2": 2},
    }
    save_file(
        lora_state("diffusers", pairs()),
        tmp_path / "lora.safetensors",
        metadata={"lora_adapter_metadata": json.dumps(config)},
    )
    entries = read_lora(tmp_path / "lora.safetensors").entries()
    for name, alpha in (("blocks.0.self_attn.q.weight", 8), ("blocks.1.ffn.2.weight", 2)):
        (entry,) = entries[name]
        assert isinstance(entry, LowRank)
        assert entry.factor == pytest.approx(alpha / math.sqrt(RANK) if rslora else alpha / RANK)


def test_alpha_in_the_config_of_a_peft_folder(tmp_path: Path) -> None:
    save_file(lora_state("PEFT wrapper", pairs()), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": RANK}))
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        (entry,) = read_lora(source).entries()["head.head.weight"]
        assert isinstance(entry, LowRank) and entry.factor == 4.0


def test_alpha_in_the_file_wins(tmp_path: Path) -> None:
    save_file(
        lora_state("diffusers", pairs(alpha=1.0)),
        tmp_path / "lora.safetensors",
        metadata={"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})},
    )
    (entry,) = read_lora(tmp_path / "lora.safetensors").entries()["head.head.weight"]
    assert isinstance(entry, LowRank) and entry.factor == 0.25


# ---- closed forms ---------------------------------------------------------------------------------------------------


def test_a_decomposed_convolution() -> None:
    out, inner, rank, kernel = 8, 5, 3, (1, 2, 2)
    up, mid = torch.randn(out, rank, 1, 1, 1), torch.randn(rank, rank, *kernel)
    down = torch.randn(rank, inner, 1, 1, 1)
    exact = torch.einsum("oa,abtyx,bi->oityx", up[..., 0, 0, 0], mid, down[..., 0, 0, 0])
    entry = LowRank(down, up, alpha=6.0, mid=mid)
    assert entry.shape == (out, inner, *kernel)
    assert torch.allclose(delta(entry, 0.5), exact, atol=1e-5)
    plain = LowRank(torch.randn(rank, inner, *kernel), up)
    exact = torch.einsum("oa,aityx->oityx", up[..., 0, 0, 0], plain.down)
    assert torch.allclose(delta(plain, 1.0), exact, atol=1e-5)


@pytest.mark.parametrize("columns", [False, True])
def test_dora_keeps_the_magnitudes_it_was_trained_to(columns: bool) -> None:
    weight = torch.randn(6, 5)
    magnitude = torch.rand(1, 5) + 1 if columns else torch.rand(6) + 1
    entry = LowRank(torch.randn(2, 5), torch.randn(6, 2), alpha=1.0, dora_scale=magnitude)
    changed = weight + delta(entry, 1.0, weight=weight)
    assert torch.allclose(changed.norm(dim=0 if columns else 1), magnitude.flatten(), atol=1e-5)
    half = weight + delta(entry, 0.5, weight=weight)
    assert torch.allclose(half, (weight + changed) / 2, atol=1e-5)
    with pytest.raises(InputError, match="needs the weight itself"):
        delta(entry, 1.0)


def test_the_result_is_rounded_once() -> None:
    entry = LowRank(torch.randn(4, 64).bfloat16(), torch.randn(32, 4).bfloat16(), alpha=3.0)
    exact = (entry.up.double() @ entry.down.double() * 0.75 * 0.3).to(torch.bfloat16)
    assert (delta(entry, 0.3, torch.bfloat16) == exact).float().mean() > 0.999


# ---- what does not belong -------------------------------------------------------------------------------------------


def test_the_image_branch_of_wan21_is_left_out_with_a_count() -> None:
    state = lora_state("official", pairs())
    for block in range(2):
        state[f"diffusion_model.blocks.{block}.cross_attn.k_img.lora_down.weight"] = torch.ones(2, 256)
        state[f"diffusion_model.blocks.{block}.cross_attn.k_img.lora_up.weight"] = torch.ones(256, 2)
    state["diffusion_model.img_emb.proj.0.diff"] = torch.ones(1280)
    found = fit(read_lora(state), SHAPES)
    assert len(found.entries) == len(LINEARS)
    (sentence,) = found.skipped
    assert "3 changes of the CLIP image branch, which only Wan2.1 I2V has" in sentence


def test_a_patch_embedding_of_other_channels_is_left_out_and_named() -> None:
    state = lora_state("official", pairs()) | {"diffusion_model.patch_embedding.diff": torch.ones(256, 36, 1, 2, 2)}
    found = fit(read_lora(state), SHAPES)
    assert "patch_embedding.weight" not in found.entries
    assert "patch_embedding.weight [256, 36, 1, 2, 2] instead of [256, 16, 1, 2, 2]" in found.skipped[0]


def test_layers_that_the_model_has_not_are_left_out_and_counted() -> None:
    state = lora_state("official", pairs()) | {"diffusion_model.blocks.39.self_attn.q.diff_b": torch.ones(256)}
    found = fit(read_lora(state), SHAPES)
    assert "1 changes are for layers that this model has not" in found.skipped[0]
    assert "blocks.39.self_attn.q.bias" in found.skipped[0]


def test_a_lora_of_another_size_is_refused() -> None:
    shapes = {name: tuple(value.shape) for name, value in official_state(tiny_spec("t2v")).items()}
    with pytest.raises(
        CheckpointError, match=r"is made for another model: it changes .* \[256, 256\], which is \[128, 128\]"
    ):
        fit(read_lora(lora_state("official", pairs())), shapes)


def test_a_lora_of_which_nothing_fits_is_refused() -> None:
    lora = read_lora({"diffusion_model.img_emb.proj.0.diff": torch.ones(1280)})
    with pytest.raises(CheckpointError, match="changes nothing in this model"):
        fit(lora, SHAPES)


def test_unknown_keys_are_reported_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    strangers = named_like(
        [
            "text_encoder.layer.q.lora_A.weight",
            "diffusion_model.vace_blocks.0.self_attn.q.lora_A.weight",
            "note",
            "diffusion_model.blocks.0.self_attn.k.alpha",
        ]
    )
    with caplog.at_level(logging.WARNING):
        lora = read_lora(lora_state("official", pairs()) | strangers)
    assert set(lora.unknown) == set(strangers)
    assert "4 keys are no change of a Wan transformer and are left out" in caplog.text


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (named_like(["double_blocks.0.img_attn.qkv.lora_A.weight"]), "is no LoRA of a Wan transformer"),
        ({}, r"is no LoRA of a Wan transformer \(it holds nothing\)"),
        (named_like(["diffusion_model.blocks.0.self_attn.q.lokr_w1"]), "belong to a LoKr adapter"),
        (named_like(["lora_unet_blocks_0_self_attn_q.hada_w1_a"]), "belong to a LoHa adapter"),
        ({"blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 4)}, r"q\.weight has no lora_up"),
        ({"blocks.0.self_attn.q.lora_B.weight": torch.ones(4, 2)}, r"q\.weight has no lora_down"),
        (
            {
                "blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 4),
                "blocks.0.self_attn.q.lora_B.weight": torch.ones(4, 3),
            },
            "inner sizes must be the rank",
        ),
        (
            {"blocks.0.self_attn.q.diff": torch.ones(1), "transformer.blocks.0.attn1.to_q.diff": torch.ones(1)}
            | {"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(1)},
            r"changes blocks\.0\.self_attn\.q\.weight twice",
        ),
    ],
)
def test_bad_files_are_named(state: dict[str, Tensor], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_lora(state)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    save_file(lora_state("official", pairs()), tmp_path / "lora.safetensors")
    content = (tmp_path / "lora.safetensors").read_bytes()
    (tmp_path / "lora.safetensors").write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"^lora\.safetensors is truncated"):
        read_lora(tmp_path / "lora.safetensors")


# ---- ComfyUI --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def core_model(comfy_core: Path):  # type: ignore[no-untyped-def]
    """Core's own MODEL with the tiny weights (text rows of 4096, the only width that it knows)."""
    import comfy.sd

    state = official_state(tiny_spec("t2v", dim=256, text_dim=4096))
    return comfy.sd.load_diffusion_model_state_dict(dict(state), model_options={"dtype": torch.float32})


def applied_by_core(model, state: dict[str, Tensor], strength: float) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """What core's loader adds to each weight; every key must be understood."""
    import comfy.lora

    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(state, keys, log_missing=True)
    weights = model.model.state_dict()
    changed = {}
    for key, patch in patches.items():
        before = weights[key].clone()
        patched = comfy.lora.calculate_weight([(strength, patch, 1.0, None, None)], before.clone(), key)
        changed[key.removeprefix("diffusion_model.")] = patched - before
    return changed


def test_core_applies_the_same_changes(core_model, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    shapes = {
        name.removeprefix("diffusion_model."): tuple(value.shape)
        for name, value in core_model.model.state_dict().items()
    }
    state = lora_state("diffusers", {m: c for m, c in pairs(alpha=2.0).items() if m != "text_embedding.0"})
    state |= {
        "diffusion_model.blocks.1.self_attn.norm_q.diff": torch.randn(256),
        "diffusion_model.blocks.0.diff_m": torch.randn(1, 6, 256),
        "diffusion_model.head.diff_m": torch.randn(1, 2, 256),
        "diffusion_model.blocks.0.norm3.diff_b": torch.randn(256),
        "diffusion_model.head.head.diff": torch.randn(64, 256),
        "diffusion_model.blocks.1.ffn.2.diff_b": torch.randn(256),
        "diffusion_model.patch_embedding.diff": torch.randn(256, 16, 1, 2, 2),
    }
    entries = fit(read_lora(state), shapes).entries
    assert len(entries["head.head.weight"]) == 2
    with caplog.at_level(logging.WARNING):
        changed = applied_by_core(core_model, to_comfy_state_dict(entries), 0.6)
    assert "lora key not loaded" not in caplog.text
    assert changed.keys() == entries.keys()
    for name, found in entries.items():
        exact = sum(delta(entry, 0.6, torch.float64, shape=shapes[name]) for entry in found)
        assert torch.allclose(changed[name].double(), exact, rtol=1e-4, atol=1e-5), name


def test_core_applies_convolution_cores_and_magnitudes(core_model) -> None:  # type: ignore[no-untyped-def]
    mid = LowRank(torch.randn(2, 16, 1, 1, 1), torch.randn(256, 2, 1, 1, 1), 1.0, mid=torch.randn(2, 2, 1, 2, 2))
    changed = applied_by_core(core_model, to_comfy_state_dict({"patch_embedding.weight": (mid,)}), 0.5)
    assert torch.allclose(changed["patch_embedding.weight"], delta(mid, 0.5), atol=1e-5)
    name = "blocks.0.self_attn.q.weight"
    dora = LowRank(torch.zeros(2, 256), torch.zeros(256, 2), dora_scale=torch.rand(256) + 1)
    weight = core_model.model.state_dict()[f"diffusion_model.{name}"]
    changed = applied_by_core(core_model, to_comfy_state_dict({name: (dora,)}), 1.0)
    assert torch.allclose(changed[name], delta(dora, 1.0, weight=weight), atol=1e-5)


def test_a_dora_together_with_a_difference_cannot_be_handed_to_core() -> None:
    dora = LowRank(torch.ones(2, 4), torch.ones(4, 2), dora_scale=torch.ones(4))
    with pytest.raises(CheckpointError, match="by a DoRA together with"):
        to_comfy_state_dict({"blocks.0.self_attn.q.weight": (dora, Diff(torch.ones(4, 4)))})
