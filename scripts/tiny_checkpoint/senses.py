"""A CLIP vision encoder and a wav2vec2 of the published widths with little inside: shapes, and how they are written.

Source: Wan-Video/Wan2.2 ``wan/modules/animate/clip.py``; transformers ``Wav2Vec2ForCTC``.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
CLIP_WIDTH, CLIP_LAYERS, CLIP_MLP, CLIP_SIDE = 1280, 2, 64, 2
"""Published: 1280, 32, 5120 and 16 patches a side."""
AUDIO_FOLDER = "wav2vec2-large-xlsr-53-english"
AUDIO_WIDTH, AUDIO_LAYERS, AUDIO_FFN, AUDIO_CONV = 1024, 24, 32, 16
"""Published: 1024, 24, 4096 and 512."""


def clip_shapes() -> Shapes:
    """The vision tower under its official names, and one tensor of the text tower beside it."""
    d = CLIP_WIDTH
    out: Shapes = {
        "log_scale": (),
        "textual.token_embedding.weight": (4, 8),
        "visual.cls_embedding": (1, 1, d),
        "visual.pos_embedding": (1, 1 + CLIP_SIDE**2, d),
        "visual.patch_embedding.weight": (d, 3, 14, 14),
        "visual.head": (d, 1024),
    }
    norms = ["visual.pre_norm", "visual.post_norm"]
    for i in range(CLIP_LAYERS):
        layer = f"visual.transformer.{i}"
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
        for name, shape in (
            ("attn.to_qkv", (3 * d, d)),
            ("attn.proj", (d, d)),
            ("mlp.0", (CLIP_MLP, d)),
            ("mlp.2", (d, CLIP_MLP)),
        ):
            out[f"{layer}.{name}.weight"] = shape
            out[f"{layer}.{name}.bias"] = shape[:1]
    for norm in norms:
        out[f"{norm}.weight"] = out[f"{norm}.bias"] = (d,)
    return out


def audio_shapes() -> Shapes:
    """Everything of wav2vec2 but the four matrices of each attention, under Hugging Face's names."""
    d, c = AUDIO_WIDTH, AUDIO_CONV
    out: Shapes = {"wav2vec2.masked_spec_embed": (d,), "lm_head.weight": (33, d), "lm_head.bias": (33,)}

    def pair(name: str, *shape: int) -> None:
        out[f"wav2vec2.{name}.weight"] = shape
        out[f"wav2vec2.{name}.bias"] = shape[:1]

    for i, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        pair(f"feature_extractor.conv_layers.{i}.conv", c, 1 if i == 0 else c, kernel)
        pair(f"feature_extractor.conv_layers.{i}.layer_norm", c)
    pair("feature_projection.layer_norm", c)
    pair("feature_projection.projection", d, c)
    out["wav2vec2.encoder.pos_conv_embed.conv.weight_g"] = (1, 1, 128)
    out["wav2vec2.encoder.pos_conv_embed.conv.weight_v"] = (d, d // 16, 128)
    out["wav2vec2.encoder.pos_conv_embed.conv.bias"] = (d,)
    pair("encoder.layer_norm", d)
    for i in range(AUDIO_LAYERS):
        layer = f"encoder.layers.{i}"
        pair(f"{layer}.layer_norm", d)
        pair(f"{layer}.final_layer_norm", d)
        pair(f"{layer}.feed_forward.intermediate_dense", AUDIO_FFN, d)
        pair(f"{layer}.feed_forward.output_dense", d, AUDIO_FFN)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out[f"wav2vec2.{layer}.attention.{name}.bias"] = (d,)
    return out


def audio_zeros() -> Shapes:
    """The matrices that are left at zero: 200 MB that take no room in a file with holes."""
    return {
        f"wav2vec2.encoder.layers.{i}.attention.{name}.weight": (AUDIO_WIDTH, AUDIO_WIDTH)
        for i in range(AUDIO_LAYERS)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    }


def write_with_holes(path: Path, weights: dict[str, Tensor], zeros: Shapes) -> None:
    """A safetensors file in which the tensors of ``zeros`` (fp16) are holes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in weights.items():
        size = tensor.numel() * tensor.element_size()
        kind = {torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    for name, shape in zeros.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in weights.values():
            file.write(tensor.contiguous().numpy().tobytes())
        file.truncate(8 + len(text) + offset)
