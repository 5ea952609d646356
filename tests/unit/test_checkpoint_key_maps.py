"""Name maps against the real classes: names map one to one over a whole model, and shapes are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import tiny_spec

from wan_fp8.checkpoint.key_maps import DIT, T5, VAE_21, VAE_22, NameMap
from wan_fp8.models.wan import build_model

Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: torch.nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def assert_same_model(table: NameMap, official: Shapes, other: Shapes) -> None:
    """Both directions: names one to one over the whole key set, shapes equal."""
    renamed = {table.to_official(name): shape for name, shape in other.items()}
    assert renamed == official
    assert {table.from_official(name): shape for name, shape in official.items()} == other
    assert all(table.from_official(str(table.to_official(name))) == name for name in other)


@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_transformer(comfy_core: Path, task: str) -> None:
    import comfy.ldm.wan.model
    import comfy.ops
    from diffusers import WanTransformer3DModel

    spec = tiny_spec(task, dim=256, layers=11)
    with torch.device("meta"):
        ours = shapes_of(build_model(spec))
        theirs = shapes_of(
            WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=128,
                in_channels=spec.in_dim,
                out_channels=spec.out_dim,
                text_dim=spec.text_dim,
                ffn_dim=spec.ffn_dim,
                num_layers=11,
                cross_attn_norm=True,
            )
        )
        core = shapes_of(
            comfy.ldm.wan.model.WanModel(
                model_type="t2v",
                dim=256,
                ffn_dim=spec.ffn_dim,
                num_heads=2,
                num_layers=11,
                in_dim=spec.in_dim,
                out_dim=spec.out_dim,
                text_dim=spec.text_dim,
                operations=comfy.ops.disable_weight_init,
            )
        )
    assert ours == core
    assert_same_model(DIT, core, theirs)


def test_transformer_with_an_image_branch(comfy_core: Path) -> None:
    """Wan2.1 I2V: its names must be known to be recognised, and its LoRAs to be read."""
    import comfy.ldm.wan.model
    import comfy.ops
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=1,
            attention_head_dim=128,
            in_channels=36,
            text_dim=64,
            ffn_dim=256,
            num_layers=2,
            image_dim=1280,
            added_kv_proj_dim=128,
            pos_embed_seq_len=514,
        )
        core = comfy.ldm.wan.model.WanModel(
            model_type="i2v",
            dim=128,
            ffn_dim=256,
            num_heads=1,
            num_layers=2,
            in_dim=36,
            text_dim=64,
            flf_pos_embed_token_number=514,
            operations=comfy.ops.disable_weight_init,
        )
    official = shapes_of(core)
    # The position table may differ by a leading axis of one.
    assert_same_model(DIT, _without_axis(official), _without_axis(shapes_of(theirs)))


def _without_axis(shapes: Shapes) -> Shapes:
    return {name: shape if "emb" not in name.split(".")[-1] else shape[-2:] for name, shape in shapes.items()}


def test_the_norm_before_cross_attention_has_another_number() -> None:
    assert DIT.to_official("blocks.7.norm2.weight") == "blocks.7.norm3.weight"
    assert DIT.from_official("blocks.7.norm3.bias") == "blocks.7.norm2.bias"
    assert DIT.to_official("blocks.7.norm3.weight") is None
    assert DIT.from_official("blocks.7.norm2.weight") is None


def test_what_follows_a_module_is_kept_and_strangers_have_no_name() -> None:
    assert DIT.to_official("blocks.3.attn2.to_out.0.weight_scale") == "blocks.3.cross_attn.o.weight_scale"
    assert DIT.to_official("scale_shift_table") == "head.modulation"
    assert DIT.to_official("blocks.3.scale_shift_table") == "blocks.3.modulation"
    for name in ("", "blocks.x.norm2.weight", "blocks.3.attn3.to_q.weight", "scale_shift_table.weight", "proj_out"):
        assert DIT.to_official(name) is None


def build_text_encoder(layers: int = 12) -> torch.nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=layers, num_heads=2)
    with torch.device("meta"):
        return UMT5EncoderModel(config)


def official_text_encoder(layers: int = 12) -> Shapes:
    """The shapes of Wan-Video/Wan2.2 ``wan/modules/t5.py`` for the sizes above."""
    shapes: Shapes = {"token_embedding.weight": (40, 16), "norm.weight": (16,)}
    for i in range(layers):
        block = f"blocks.{i}"
        shapes |= {f"{block}.norm1.weight": (16,), f"{block}.norm2.weight": (16,)}
        shapes |= {f"{block}.attn.{n}.weight": (16, 16) for n in "qkvo"}
        shapes |= {f"{block}.pos_embedding.embedding.weight": (32, 2)}
        shapes |= {f"{block}.ffn.gate.0.weight": (24, 16), f"{block}.ffn.fc1.weight": (24, 16)}
        shapes |= {f"{block}.ffn.fc2.weight": (16, 24)}
    return shapes


def test_text_encoder() -> None:
    theirs = shapes_of(build_text_encoder())
    assert theirs.pop("encoder.embed_tokens.weight") == theirs["shared.weight"]
    assert_same_model(T5, official_text_encoder(), theirs)


def core_vae(version: str) -> torch.nn.Module:
    import comfy.ldm.wan.vae
    import comfy.ldm.wan.vae2_2

    shared: dict[str, Any] = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    order = {"temperal_downsample": [False, True, True]}
    with torch.device("meta"):
        if version == "2.1":
            return comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, **shared, **order)
        return comfy.ldm.wan.vae2_2.WanVAE(dim=8, dec_dim=12, z_dim=48, **shared, **order)


def diffusers_vae(version: str) -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        if version == "2.1":
            return AutoencoderKLWan(base_dim=8, z_dim=16)
        return AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=12,
            z_dim=48,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=[0.0] * 48,
            latents_std=[1.0] * 48,
        )


@pytest.mark.parametrize(("version", "table"), [("2.1", VAE_21), ("2.2", VAE_22)])
def test_vae(comfy_core: Path, version: str, table: NameMap) -> None:
    assert_same_model(table, shapes_of(core_vae(version)), shapes_of(diffusers_vae(version)))
