"""Names of one naming scheme in another, as pure functions of the name.

Official names are those of Wan-Video/Wan2.2 and of ComfyUI's repackaged files. Each table row is a pair of exact
patterns with the placeholder ``{i}`` for the block's number; what follows the module (``.weight``, ``.weight_scale``,
...) is kept. Mind the norms: the official ``norm3`` (the affine one before cross-attention) is diffusers' ``norm2``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

_ATTENTION = (
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("o", "to_out.0"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
)
_IMAGE_ATTENTION = (("k_img", "add_k_proj"), ("v_img", "add_v_proj"), ("norm_k_img", "norm_added_k"))

_MOTION = "motion_encoder.enc.net_app.convs"
_MOTION_BLOCK = (
    ("conv1.0", "conv1"),
    ("conv1.1", "conv1.act_fn"),
    ("conv2.1", "conv2"),
    ("conv2.2", "conv2.act_fn"),
    ("skip.1", "conv_skip"),
)
_FUSER = (
    ("linear1_kv", "to_kv"),
    ("linear1_q", "to_q"),
    ("linear2", "to_out"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
)
_ANIMATE = (
    ("pose_patch_embedding", "pose_patch_embedding"),
    (f"{_MOTION}.0.0", "motion_encoder.conv_in"),
    (f"{_MOTION}.0.1", "motion_encoder.conv_in.act_fn"),
    *(
        (f"{_MOTION}.{k + 1}.{ours}", f"motion_encoder.res_blocks.{k}.{theirs}")
        for k in range(7)
        for ours, theirs in _MOTION_BLOCK
    ),
    (f"{_MOTION}.8", "motion_encoder.conv_out"),
    ("motion_encoder.enc.fc.{i}", "motion_encoder.motion_network.{i}"),
    *((f"face_encoder.{name}.conv", f"face_encoder.{name}") for name in ("conv1_local", "conv2", "conv3")),
    ("face_encoder.out_proj", "face_encoder.out_proj"),
    *((f"face_adapter.fuser_blocks.{{i}}.{ours}", f"face_adapter.{{i}}.{theirs}") for ours, theirs in _FUSER),
)
"""Animate's own modules. Diffusers' ``to_kv`` is two tensors in its files (see ``diffusers_animate``)."""

DIT_MODULES: tuple[tuple[str, str], ...] = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    *((f"blocks.{{i}}.self_attn.{ours}", f"blocks.{{i}}.attn1.{theirs}") for ours, theirs in _ATTENTION),
    *((f"blocks.{{i}}.cross_attn.{ours}", f"blocks.{{i}}.attn2.{theirs}") for ours, theirs in _ATTENTION),
    *((f"blocks.{{i}}.cross_attn.{ours}", f"blocks.{{i}}.attn2.{theirs}") for ours, theirs in _IMAGE_ATTENTION),
    ("blocks.{i}.norm3", "blocks.{i}.norm2"),
    ("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj"),
    ("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2"),
    ("head.head", "proj_out"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    *_ANIMATE,
)
"""Modules of the transformer: official, diffusers. The image ones belong to Wan2.1 I2V and Animate."""

DIT_PARAMETERS: tuple[tuple[str, str], ...] = (
    ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
    ("head.modulation", "scale_shift_table"),
    ("motion_encoder.dec.direction.weight", "motion_encoder.motion_synthesis_weight"),
    ("face_encoder.padding_tokens", "face_encoder.padding_tokens"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
)
"""Parameters that are no module's weight or bias."""

_T5_MODULES: tuple[tuple[str, str], ...] = (
    ("token_embedding", "shared"),
    ("blocks.{i}.norm1", "encoder.block.{i}.layer.0.layer_norm"),
    *((f"blocks.{{i}}.attn.{n}", f"encoder.block.{{i}}.layer.0.SelfAttention.{n}") for n in "qkvo"),
    ("blocks.{i}.pos_embedding.embedding", "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias"),
    ("blocks.{i}.norm2", "encoder.block.{i}.layer.1.layer_norm"),
    ("blocks.{i}.ffn.gate.0", "encoder.block.{i}.layer.1.DenseReluDense.wi_0"),
    ("blocks.{i}.ffn.fc1", "encoder.block.{i}.layer.1.DenseReluDense.wi_1"),
    ("blocks.{i}.ffn.fc2", "encoder.block.{i}.layer.1.DenseReluDense.wo"),
    ("norm", "encoder.final_layer_norm"),
)

_RESIDUAL = (
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)
_RESAMPLE = ("resample.1", "time_conv")


def _vae_common() -> list[tuple[str, str]]:
    rows = [("conv1", "quant_conv"), ("conv2", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        rows += [(f"{side}.conv1", f"{side}.conv_in"), (f"{side}.head.0", f"{side}.norm_out")]
        rows += [(f"{side}.head.2", f"{side}.conv_out")]
        for ours, theirs in (("0", "resnets.0"), ("2", "resnets.1")):
            rows += [(f"{side}.middle.{ours}.{a}", f"{side}.mid_block.{theirs}.{b}") for a, b in _RESIDUAL]
        attention = f"{side}.mid_block.attentions.0"
        rows += [(f"{side}.middle.1.{n}", f"{attention}.{n}") for n in ("norm", "to_qkv", "proj")]
    return rows


def _resnet(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in _RESIDUAL]


def _resampler(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [(f"{ours}.{n}", f"{theirs}.{n}") for n in _RESAMPLE]


def _vae_21() -> list[tuple[str, str]]:
    """Flat lists: encoder 0..10 with resamplers at 2, 5, 8; decoder 0..14 with resamplers at 3, 7, 11."""
    rows = _vae_common()
    for k in range(11):
        pair = (f"encoder.downsamples.{k}", f"encoder.down_blocks.{k}")
        rows += _resampler(*pair) if k in (2, 5, 8) else _resnet(*pair)
    for k in range(15):
        block, inner = divmod(k, 4)
        ours = f"decoder.upsamples.{k}"
        if inner == 3:
            rows += _resampler(ours, f"decoder.up_blocks.{block}.upsamplers.0")
        else:
            rows += _resnet(ours, f"decoder.up_blocks.{block}.resnets.{inner}")
    return rows


def _vae_22() -> list[tuple[str, str]]:
    """Nested lists: four levels of two (encoder) or three (decoder) blocks, each but the last with a resampler."""
    rows = _vae_common()
    for level in range(4):
        for side, down, count in (("encoder", "down", 2), ("decoder", "up", 3)):
            ours = f"{side}.{down}samples.{level}.{down}samples"
            theirs = f"{side}.{down}_blocks.{level}"
            for k in range(count):
                rows += _resnet(f"{ours}.{k}", f"{theirs}.resnets.{k}")
            if level < 3:
                rows += _resampler(f"{ours}.{count}", f"{theirs}.{down}sampler")
    return rows


class NameMap:
    """A table of module (and lone parameter) pairs, usable in both directions. Names outside the table map to None."""

    def __init__(self, modules: Iterable[tuple[str, str]], parameters: Iterable[tuple[str, str]] = ()) -> None:
        self._modules, self._parameters = tuple(modules), tuple(parameters)

    @functools.cached_property
    def _to(self) -> Rules:
        # Compiled when first asked for: all maps together cost more than the rest of the package's import.
        flipped = (tuple((b, a) for a, b in rows) for rows in (self._modules, self._parameters))
        return _rules(*flipped)

    @functools.cached_property
    def _from(self) -> Rules:
        return _rules(self._modules, self._parameters)

    def to_official(self, name: str) -> str | None:
        """The official name of a parameter; None for a name that the scheme does not have."""
        return _apply(self._to, name)

    def from_official(self, name: str) -> str | None:
        """The other scheme's name of an official parameter."""
        return _apply(self._from, name)


Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(modules: Iterable[tuple[str, str]], parameters: Iterable[tuple[str, str]]) -> Rules:
    """A module's pattern takes one more name component (weight, bias, a scale); a parameter's pattern is exact."""
    return (
        *((_pattern(source, r"(?P<suffix>\.[A-Za-z_]\w*)"), _template(target, True)) for source, target in modules),
        *((_pattern(source, ""), _template(target, False)) for source, target in parameters),
    )


def _pattern(source: str, suffix: str) -> re.Pattern[str]:
    return re.compile(re.escape(source).replace(r"\{i\}", r"(?P<i>\d+)") + suffix)


def _template(target: str, suffix: bool) -> str:
    return target.replace("{i}", r"\g<i>") + (r"\g<suffix>" if suffix else "")


def _apply(rules: Rules, name: str) -> str | None:
    for pattern, template in rules:
        match = pattern.fullmatch(name)
        if match is not None:
            return match.expand(template)
    return None


DIT = NameMap(DIT_MODULES, DIT_PARAMETERS)
"""Transformer: official <-> diffusers ``WanTransformer3DModel``."""
T5 = NameMap(_T5_MODULES)
"""Text encoder: official <-> transformers ``UMT5EncoderModel`` (its ``encoder.embed_tokens`` is ``shared``)."""
VAE_21 = NameMap(_vae_21())
"""VAE 2.1: official <-> diffusers ``AutoencoderKLWan``."""
VAE_22 = NameMap(_vae_22())
"""VAE 2.2: official <-> diffusers ``AutoencoderKLWan`` with ``is_residual``."""
