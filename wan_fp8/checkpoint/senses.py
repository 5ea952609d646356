"""Weights of the encoders that see and hear: CLIP ViT-H of Animate-14B, wav2vec2 of S2V-14B.

CLIP comes as the official ``models_clip_open-clip-*.pth`` (text tower beside it, which nothing here needs), as
ComfyUI's ``clip_vision_h.safetensors`` or as a Diffusers ``image_encoder`` folder; wav2vec2 as a Hugging Face folder or
as one file.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .detect import Detected, detect
from .reader import open_source
from .signatures import Kind
from .tensors import TensorSource

CLIP_WIDTH = 1280
AUDIO_WIDTH = 1024
_CLIP_TOP = {
    "visual.cls_embedding": "vision_model.embeddings.class_embedding",
    "visual.pos_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.patch_embedding.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.pre_norm.weight": "vision_model.pre_layrnorm.weight",
    "visual.pre_norm.bias": "vision_model.pre_layrnorm.bias",
    "visual.post_norm.weight": "vision_model.post_layernorm.weight",
    "visual.post_norm.bias": "vision_model.post_layernorm.bias",
    "visual.head": "visual_projection.weight",
}
_CLIP_LAYER = re.compile(
    r"visual\.transformer\.(\d+)\.(norm1|norm2|attn\.to_qkv|attn\.proj|mlp\.0|mlp\.2)\.(weight|bias)"
)
_CLIP_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def load_clip_vision_state_dict(source: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The vision tower under Hugging Face's names (``vision_model.*``, ``visual_projection.weight``).

    Args:
        dtype: of every weight; None keeps what is stored (fp16 in the official file).
    Raises:
        CheckpointError: damaged, or another model's.
    """
    with open_source(source) as opened:
        _require(
            opened, source, Kind.CLIP_VISION, "a CLIP vision encoder", "models_clip_open-clip-*.pth, clip_vision_h"
        )
        state: dict[str, Tensor] = {}
        for name in opened:
            for hf, cut in _clip_names(name):
                state[hf] = cut(opened.read(name, dtype)).clone()
    key = "vision_model.embeddings.class_embedding"
    width = 0 if key not in state else state[key].shape[0]
    if width != CLIP_WIDTH:
        raise CheckpointError(
            f"{Path(source).name} is a CLIP vision encoder of width {width}; Animate-14B was trained with ViT-H, of "
            f"width {CLIP_WIDTH}: use the one of the checkpoint, or clip_vision_h.safetensors"
        )
    return state


def _clip_names(name: str) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Hugging Face's names of a stored tensor, and how to cut each from it; none for what is no vision tower."""
    if name.startswith(("vision_model.", "visual_projection.")):
        return [] if name.endswith("position_ids") else [(name, _as_it_is)]
    if name == "visual.head":
        return [(_CLIP_TOP[name], Tensor.t)]
    if name in _CLIP_TOP:
        flat = name.endswith("_embedding")  # [1, 1, D] and [1, tokens, D]
        return [(_CLIP_TOP[name], (lambda value: value.flatten(0, -2).squeeze(0)) if flat else _as_it_is)]
    match = _CLIP_LAYER.fullmatch(name)
    if match is None:
        return []
    layer, part, kind = match.groups()
    stem = f"vision_model.encoder.layers.{layer}."
    if part != "attn.to_qkv":
        return [(f"{stem}{_CLIP_PARTS[part]}.{kind}", _as_it_is)]
    return [
        (f"{stem}self_attn.{which}_proj.{kind}", functools.partial(_third, third)) for third, which in enumerate("qkv")
    ]


def _third(which: int, value: Tensor) -> Tensor:
    return value.chunk(3)[which]


def _as_it_is(value: Tensor) -> Tensor:
    return value


def audio_encoder_file(path: Path) -> Path:
    """What to open of a wav2vec2 folder or file: its safetensors, else its ``pytorch_model.bin``."""
    if path.is_dir() and not any(path.glob("model*.safetensors*")) and (path / "pytorch_model.bin").is_file():
        return path / "pytorch_model.bin"
    return path


def load_audio_encoder_state_dict(source: str | Path) -> dict[str, Tensor]:
    """wav2vec2 in fp32 under the names of transformers' ``Wav2Vec2Model``; the head for letters is left out.

    Raises:
        CheckpointError: damaged, or another model's.
    """
    path = audio_encoder_file(Path(source))
    with open_source(path) as opened:
        _require(opened, path, Kind.AUDIO_ENCODER, "a wav2vec2 audio encoder", "wav2vec2-large-xlsr-53-english")
        names = {name: name.removeprefix("wav2vec2.") for name in opened if not name.startswith("lm_head.")}
        state = {_plain_norm(bare): opened.read(name, torch.float32).clone() for name, bare in names.items()}
    width = state["encoder.layer_norm.bias"].shape[0]
    if width != AUDIO_WIDTH:
        raise CheckpointError(
            f"{path.name} is a wav2vec2 encoder of width {width}; S2V-14B was trained with a large one, of width "
            f"{AUDIO_WIDTH}: use wav2vec2-large-xlsr-53-english"
        )
    return state


def _plain_norm(name: str) -> str:
    """The two parts of the weight norm have one name in older files and another in newer ones."""
    stem = "encoder.pos_conv_embed.conv."
    renamed = {f"{stem}weight_g": "original0", f"{stem}weight_v": "original1"}
    return f"{stem}parametrizations.weight.{renamed[name]}" if name in renamed else name


def _require(opened: TensorSource, source: str | Path, kind: Kind, what: str, example: str) -> Detected:
    found = detect(opened, source)
    if found.kind is not kind:
        raise CheckpointError(f"{opened.label} is {found.label}; {what} is needed here ({example}): choose that file")
    return found
