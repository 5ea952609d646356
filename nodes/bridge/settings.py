"""Choices that touch no weight: kept on the MODEL, read by the forward."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.model_management
import torch

from ...wan_fp8.attention import AttentionRequest
from ...wan_fp8.hardware import DeviceCaps, device_caps
from ...wan_fp8.models.layers import HIGH_PRECISION
from .fork import hosted, spec_of
from .hosted_model import SETTINGS, settings_of

USUAL_TOKENS = 32_760
"""832x480, 81 frames: stands for the tokens of a run that is not known yet. No backend's refusal depends on them."""


def with_settings(patcher: Any, **changes: Any) -> Any:
    """A clone of this MODEL (forked first if its transformer is core's) with some of its ``HostSettings`` changed.

    Both MODELs share one loaded transformer.
    """
    changed = dataclasses.replace(settings_of(patcher), **changes)
    clone = hosted(patcher).clone()
    clone.model_options.setdefault("transformer_options", {})[SETTINGS] = changed
    return clone


def device_of(patcher: Any) -> DeviceCaps:
    """The device that this MODEL will compute on."""
    return device_caps(torch.device(patcher.load_device))


def main_device() -> torch.device:
    """The device that ComfyUI runs models on."""
    return torch.device(comfy.model_management.get_torch_device())


def attention_request(patcher: Any) -> AttentionRequest:
    """What the self-attention of this MODEL, ours or core's, will ask of a backend.

    Raises:
        UnsupportedPatchError: it is not a Wan2.2 model.
    """
    head_dim = spec_of(patcher).head_dim
    compute = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    compute = compute if compute in HIGH_PRECISION else torch.bfloat16
    return AttentionRequest(device_of(patcher), compute, head_dim, USUAL_TOKENS, USUAL_TOKENS)
