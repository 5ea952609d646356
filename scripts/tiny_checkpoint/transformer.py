"""Names and shapes of the transformer, the Diffusers names of the same tensors, and FP8 versions of them.

Source: Wan-Video/Wan2.2 ``wan/modules/model.py``; huggingface/diffusers ``scripts/convert_wan_to_diffusers.py``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HEAD_DIM = 128
FREQ_DIM = 256
TEXT_DIM = 4096
"""Width of the text rows. ComfyUI knows no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSize:
    """What differs between the tasks, and what is small here."""

    in_dim: int
    out_dim: int
    dim: int = 256
    ffn_dim: int = 512
    num_layers: int = 2

    @property
    def num_heads(self) -> int:
        """Heads of 128 channels, as in every released model."""
        return self.dim // HEAD_DIM


SIZES = {
    "t2v": TransformerSize(in_dim=16, out_dim=16),
    "i2v": TransformerSize(in_dim=36, out_dim=16),
    "ti2v": TransformerSize(in_dim=48, out_dim=48),
    "animate": TransformerSize(in_dim=36, out_dim=16, num_layers=5),
    "s2v": TransformerSize(in_dim=16, out_dim=16),
}


def shapes(size: TransformerSize) -> dict[str, tuple[int, ...]]:
    """Every tensor of one transformer under its official name."""
    d, f = size.dim, size.ffn_dim
    result: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out_features: int, in_features: int) -> None:
        result[f"{name}.weight"] = (out_features, in_features)
        result[f"{name}.bias"] = (out_features,)

    result["patch_embedding.weight"] = (d, size.in_dim, 1, 2, 2)
    result["patch_embedding.bias"] = (d,)
    linear("text_embedding.0", d, TEXT_DIM)
    linear("text_embedding.2", d, d)
    linear("time_embedding.0", d, FREQ_DIM)
    linear("time_embedding.2", d, d)
    linear("time_projection.1", 6 * d, d)
    for i in range(size.num_layers):
        block = f"blocks.{i}"
        result[f"{block}.modulation"] = (1, 6, d)
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(f"{block}.{attention}.{name}", d, d)
            result[f"{block}.{attention}.norm_q.weight"] = (d,)
            result[f"{block}.{attention}.norm_k.weight"] = (d,)
        result[f"{block}.norm3.weight"] = (d,)
        result[f"{block}.norm3.bias"] = (d,)
        linear(f"{block}.ffn.0", f, d)
        linear(f"{block}.ffn.2", d, f)
    result["head.modulation"] = (1, 2, d)
    linear("head.head", 4 * size.out_dim, d)
    return result


def config(size: TransformerSize, task: str, class_name: str = "WanModel") -> dict[str, Any]:
    """``config.json`` beside official weights."""
    return {
        "_class_name": class_name,
        "_diffusers_version": "0.33.0",
        "dim": size.dim,
        "eps": 1e-06,
        "ffn_dim": size.ffn_dim,
        "freq_dim": FREQ_DIM,
        "in_dim": size.in_dim,
        "model_type": task,
        "num_heads": size.num_heads,
        "num_layers": size.num_layers,
        "out_dim": size.out_dim,
        "text_len": 512,
    }


def diffusers_config(size: TransformerSize) -> dict[str, Any]:
    """``transformer/config.json`` of a Diffusers folder."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.35.0",
        "added_kv_proj_dim": None,
        "attention_head_dim": HEAD_DIM,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "ffn_dim": size.ffn_dim,
        "freq_dim": FREQ_DIM,
        "image_dim": None,
        "in_channels": size.in_dim,
        "num_attention_heads": size.num_heads,
        "num_layers": size.num_layers,
        "out_channels": size.out_dim,
        "patch_size": [1, 2, 2],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": TEXT_DIM,
    }


_DIFFUSERS_TOP = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
_DIFFUSERS_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def diffusers_name(name: str) -> str:
    """The Diffusers name of an official one."""
    if name == "head.modulation":
        return "scale_shift_table"
    if name.startswith("patch_embedding."):
        return name
    if match := re.fullmatch(r"(blocks\.\d+)\.modulation", name):
        return f"{match[1]}.scale_shift_table"
    if match := re.fullmatch(r"(blocks\.\d+)\.(.+)\.(weight|bias)", name):
        return f"{match[1]}.{_DIFFUSERS_BLOCK[match[2]]}.{match[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_DIFFUSERS_TOP[stem]}.{kind}"


FP8_FORMATS = ("scaled_fp8", "comfy_quant", "metadata")


def to_fp8(weights: dict[str, Tensor], fp8_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The linears of the blocks in e4m3 with one scale per tensor, as ComfyUI's files keep them.

    Args:
        weights: A transformer under official names.
        fp8_format: "scaled_fp8" (the first convention: a marker, ``X.scale_weight``), "comfy_quant" (JSON in a tensor
            beside each layer, ``X.weight_scale``) or "metadata" (the same JSON in the file's header).
    Returns:
        The tensors, and the metadata of the file.
    """
    result, layers = dict(weights), {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if not name.startswith("blocks.") or not name.endswith(".weight") or weight.ndim != 2:
            continue
        scale = weight.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
        result[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
        result[f"{layer}.{'scale_weight' if fp8_format == 'scaled_fp8' else 'weight_scale'}"] = scale
        layers[layer] = {"format": "float8_e4m3fn"}
        if fp8_format == "comfy_quant":
            result[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(layers[layer]).encode()), dtype=torch.uint8)
    if fp8_format == "scaled_fp8":
        # Two elements: products are taken in full precision.
        result["scaled_fp8"] = torch.zeros(2, dtype=torch.float32).to(torch.float8_e4m3fn)
    if fp8_format == "metadata":
        return result, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return result, {}
