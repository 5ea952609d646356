"""Names that give away models other than the Wan2.2 transformers, so that messages can say what a file really is.

Each signature lists tensor names that all have to be there (after the prefix is taken off). The first match wins, so
the narrow ones come first. Sources: ComfyUI ``comfy/model_detection.py``, ``comfy/sd.py``; diffusers
``single_file_utils.py``; the released checkpoints' own names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum

from ..models.specs import Task


class Kind(StrEnum):
    """What a file is for."""

    TRANSFORMER = "transformer"
    TEXT_ENCODER = "text_encoder"
    VAE = "vae"
    CLIP_VISION = "clip_vision"
    AUDIO_ENCODER = "audio_encoder"
    LORA = "lora"
    GGUF = "gguf"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Signature:
    """Names that identify a model family."""

    label: str
    """Completes the sentence "this is ..."."""
    names: tuple[str, ...]
    kind: Kind = Kind.OTHER

    def matches(self, names: Collection[str], prefix: str = "") -> bool:
        return all(prefix + name in names for name in self.names)


PREFIXES = ("model.diffusion_model.", "model.model.", "net.", "diffusion_model.", "model.", "")
"""What may stand before a transformer's names; the empty one is tried last."""

_CLIP_LAYER = "vision_model.encoder.layers.0.self_attn.q_proj.weight"

PARTS = (
    Signature("an open-CLIP ViT-H vision encoder", ("visual.transformer.0.attn.to_qkv.weight",), Kind.CLIP_VISION),
    Signature("a CLIP vision encoder", (_CLIP_LAYER,), Kind.CLIP_VISION),
    Signature(
        "a wav2vec2 audio encoder",
        ("feature_extractor.conv_layers.0.conv.weight", "encoder.layer_norm.bias"),
        Kind.AUDIO_ENCODER,
    ),
    Signature("a Whisper audio encoder", ("encoder.conv1.weight", "encoder.embed_positions.weight"), Kind.OTHER),
)
"""Encoders that stand beside a Wan transformer."""

WAN_RELATIVES = (
    Signature("a Wan VACE transformer", ("vace_patch_embedding.weight",)),
    Signature("a Wan Fun camera-control transformer", ("control_adapter.conv.weight",)),
    Signature("a HuMo transformer", ("audio_proj.audio_proj_glob_1.layer.bias",)),
    Signature("a MultiTalk or InfiniteTalk transformer", ("audio_proj.proj1.weight",)),
    Signature("a Wan Fun control transformer", ("ref_conv.weight",)),
    Signature("a Wan2.1 FLF2V transformer", ("img_emb.emb_pos",)),
    Signature("a Wan2.1 FLF2V transformer", ("condition_embedder.image_embedder.pos_embed",)),
)
"""Models with Wan blocks and something more."""

WAN_EXTENDED = (
    (Task.S2V, Signature("a Wan2.2 S2V-14B transformer", ("casual_audio_encoder.encoder.final_linear.weight",))),
    (Task.ANIMATE, Signature("a Wan2.2 Animate-14B transformer", ("face_adapter.fuser_blocks.0.k_norm.weight",))),
    (Task.ANIMATE, Signature("a Wan2.2 Animate-14B transformer", ("motion_encoder.dec.direction.weight",))),
    (Task.ANIMATE, Signature("a Wan2.2 Animate-14B transformer", ("face_adapter.0.norm_k.weight",))),
)
"""Wan2.2 transformers that channels do not tell."""

FOREIGN = (
    Signature("a Flux.2 transformer", ("double_stream_modulation_img.lin.weight",)),
    Signature("a Chroma transformer", ("distilled_guidance_layer.norms.0.scale",)),
    Signature("a Flux transformer", ("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight")),
    Signature("a HunyuanVideo transformer", ("txt_in.individual_token_refiner.blocks.0.norm1.weight",)),
    Signature("a HunyuanVideo transformer", ("context_embedder.token_refiner.refiner_blocks.0.norm1.weight",)),
    Signature(
        "a Flux transformer",
        ("single_transformer_blocks.0.attn.norm_k.weight", "transformer_blocks.0.attn.norm_added_k.weight"),
    ),
    Signature("a Qwen-Image transformer", ("txt_norm.weight", "transformer_blocks.0.attn.add_q_proj.weight")),
    Signature("a PixArt transformer", ("adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias")),
    Signature("an LTX-Video transformer", ("adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj.weight")),
    Signature("an LTX-Video transformer", ("time_embed.emb.timestep_embedder.linear_1.bias", "proj_in.weight")),
    Signature("a Stable Diffusion 3 transformer", ("joint_blocks.0.context_block.attn.qkv.weight",)),
    Signature(
        "a Stable Diffusion 3 transformer", ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight")
    ),
    Signature("a CogVideoX transformer", ("transformer_blocks.0.norm1.linear.weight", "patch_embed.proj.weight")),
    Signature("a Mochi transformer", ("t5_yproj.weight",)),
    Signature("a Cosmos transformer", ("blocks.0.mlp.layer1.weight",)),
    Signature("a Cosmos transformer", ("blocks.block0.blocks.0.block.attn.to_q.0.weight",)),
    Signature("a Lumina or Z-Image transformer", ("cap_embedder.1.weight",)),
    Signature("a HiDream transformer", ("caption_projection.0.linear.weight",)),
    Signature("an AuraFlow transformer", ("double_layers.0.attn.w1q.weight",)),
    Signature("an SDXL model", ("input_blocks.0.0.weight", "label_emb.0.0.weight")),
    Signature("a Stable Diffusion model", ("input_blocks.0.0.weight",)),
    Signature("a Stable Diffusion UNet", ("down_blocks.0.resnets.0.norm1.weight", "time_embedding.linear_1.weight")),
    Signature("a ControlNet", ("control_model.input_hint_block.0.weight",)),
    Signature("a ControlNet", ("controlnet_cond_embedding.conv_in.weight",)),
    Signature("a Stable Diffusion or Flux VAE", ("decoder.mid.block_1.norm1.weight",)),
    Signature("a Stable Diffusion or Flux VAE", ("decoder.mid_block.resnets.0.norm1.weight",)),
    Signature("a HunyuanVideo VAE", ("decoder.mid.block_1.conv1.conv.weight",)),
    Signature("an LTX-Video VAE", ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",)),
    Signature("a tiny preview decoder (TAE)", ("decoder.1.weight", "decoder.3.conv.0.weight")),
    Signature("a T5-XXL text encoder, not UMT5", ("encoder.block.0.layer.0.SelfAttention.k.weight",)),
    Signature("a CLIP text encoder", ("text_model.encoder.layers.0.mlp.fc1.weight",)),
    Signature("a language model", ("model.layers.0.self_attn.q_proj.weight",)),
    Signature("a language model", ("layers.0.self_attn.q_proj.weight",)),
    Signature("an upscaler", ("conv_first.weight", "conv_last.weight")),
    Signature("an upscaler", ("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight")),
)
"""Everything else that people keep in a models folder."""

_SEARCH_PREFIXES = (*PREFIXES, "first_stage_model.", "wav2vec2.", "transformer.")


def first_match(
    signatures: Iterable[Signature], names: Collection[str], prefixes: Iterable[str] = _SEARCH_PREFIXES
) -> Signature | None:
    """The first signature that matches under any prefix."""
    prefixes = tuple(prefixes)
    return next((s for s in signatures if any(s.matches(names, prefix) for prefix in prefixes)), None)
