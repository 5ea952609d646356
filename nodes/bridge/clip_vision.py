"""Core's CLIP vision object for Animate-14B's ViT-H, and the rows that the published code makes with it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import comfy.clip_vision
import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

from ...wan_fp8.checkpoint.senses import CLIP_WIDTH
from ...wan_fp8.errors import CheckpointError, InputError

HEAD_WIDTH = 80
"""Channels of an attention head of ViT-H."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def lazy_clip_vision(read: Callable[[], Mapping[str, Tensor]]) -> Any:
    """A core CLIP_VISION whose weights are read when something first asks it for anything.

    Args:
        read: Gives the weights under Hugging Face's names; called once.
    """
    return _LazyClipVision(read)


def load_clip_vision(weights: Mapping[str, Tensor]) -> Any:
    """A core CLIP_VISION of these weights; sizes come from their shapes.

    Raises:
        CheckpointError: weights are missing.
    """
    handle, path = tempfile.mkstemp(suffix=".json")  # core reads its configuration from a file
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(_config(weights), file)
        clip = comfy.clip_vision.ClipVisionModel(path)
    finally:
        os.unlink(path)
    missing, _ = clip.load_sd(dict(weights))
    missing = [name for name in missing if not name.startswith("visual_projection")]
    if missing:  # core's loader only logs them
        raise CheckpointError(
            f"the CLIP vision file is incomplete: {len(missing)} weights are missing, {missing[0]!r} for one; download "
            "it again"
        )
    return clip


def _config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    patch = weights["vision_model.embeddings.patch_embedding.weight"]
    tokens = weights["vision_model.embeddings.position_embedding.weight"].shape[0]
    layer = "vision_model.encoder.layers."
    layers = 1 + max((int(n.removeprefix(layer).split(".")[0]) for n in weights if n.startswith(layer)), default=-1)
    projection = weights.get("visual_projection.weight")
    return {
        "model_type": "clip_vision_model",
        "hidden_size": patch.shape[0],
        "num_attention_heads": patch.shape[0] // HEAD_WIDTH,
        "num_hidden_layers": layers,
        "intermediate_size": weights[f"{layer}0.mlp.fc1.bias"].shape[0],
        "projection_dim": 1024 if projection is None else projection.shape[0],
        "image_size": round((tokens - 1) ** 0.5) * patch.shape[2],
        "patch_size": patch.shape[2],
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


class _LazyClipVision(comfy.clip_vision.ClipVisionModel):
    """Has no attribute of its own until the first one is asked for; then it is what ``load_clip_vision`` makes."""

    def __init__(self, read: Callable[[], Mapping[str, Tensor]]) -> None:
        self.__dict__["_pending"] = read

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_pending" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        loaded = load_clip_vision(self.__dict__["_pending"]())
        self.__dict__.update(loaded.__dict__)
        del self.__dict__["_pending"]
        return getattr(self, name)


def image_rows(clip_vision: Any, image_CHW: Tensor) -> Any:
    """A core CLIP_VISION_OUTPUT of a picture, resized as the published code does: straight to a square, bicubic without
    antialiasing and without rounding to 8 bits (core's CLIPVisionEncode does the last two).

    Args:
        clip_vision: Core CLIP_VISION of ViT-H.
        image_CHW: [3, h, w], -1..1.
    Raises:
        InputError: another CLIP model.
    """
    model = getattr(clip_vision, "model", None)
    patcher = getattr(clip_vision, "patcher", None)
    if model is None or patcher is None:
        raise InputError(
            f"clip_vision takes a CLIP_VISION, from Load Wan2.2 Checkpoint or core's Load CLIP Vision; got "
            f"{type(clip_vision).__name__}"
        )
    management = comfy.model_management
    management.load_model_gpu(patcher)
    size = int(getattr(clip_vision, "image_size", 224))
    pixels = F.interpolate(image_CHW[None].float(), size=(size, size), mode="bicubic") * 0.5 + 0.5
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    _, rows, *_ = model(pixel_values=pixels.to(clip_vision.load_device), intermediate_output=-2)
    if rows.ndim != 3 or rows.shape[2] != CLIP_WIDTH:
        raise InputError(
            f"clip_vision makes rows of width {rows.shape[-1]}, and Animate-14B takes those of CLIP ViT-H, of width "
            f"{CLIP_WIDTH}: use the checkpoint's own, or clip_vision_h.safetensors"
        )
    output = comfy.clip_vision.Output()
    output["penultimate_hidden_states"] = rows.to(management.intermediate_device())
    return output
