"""A core MODEL around a transformer that our own loader filled."""

from __future__ import annotations

from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import torch

from ...wan_fp8.errors import CheckpointError
from ...wan_fp8.models.layers import HIGH_PRECISION
from ...wan_fp8.models.wan import WanModel
from ...wan_fp8.parallel.source import ModelSource
from .fork import EXPERT, attach, shell_class
from .hosted_model import adopt, bind
from .remote import SOURCE


def build_model_patcher(net: WanModel, expert: str | None = None, source: ModelSource | None = None) -> Any:
    """Put a filled engine model into a stock BaseModel and ModelPatcher: a MODEL like one from core's loader.

    Latent format, sampling (flow, shift 8 until a node sets another) and conditioning are those that core chooses for
    these shapes. Weights stay in the type and place that they are in; what is computed in follows core's rules for
    this device, except that FP8 weights are computed with in bf16 wherever the device can (core would take fp16).

    Args:
        net: Loaded on the CPU. It is turned into a hosted model in place; don't use it elsewhere any more.
        expert: ``high_noise`` or ``low_noise`` where that is known, for ``expert_of``.
        source: Where the same weights lie on disk, for a pool of processes.
    Raises:
        CheckpointError: core knows no Wan model of these shapes.
    """
    hosted = adopt(net)
    weights = hosted.state_dict()
    config = comfy.model_detection.model_config_from_unet(weights, "")
    if config is None or config.unet_config.get("image_model") != "wan2.1":
        raise CheckpointError(
            f"this ComfyUI knows no Wan model with {net.spec.in_dim} input channels, width {net.spec.dim} and "
            f"{net.spec.num_layers} blocks: load a Wan2.2 checkpoint, or update ComfyUI"
        )
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    config.set_inference_dtype(hosted.dtype, _compute_dtype(hosted.dtype, load_device, config))
    config.unet_config["disable_unet_model_creation"] = True
    shell = config.get_model(weights, "")
    shell.diffusion_model = hosted
    shell.device = offload_device
    shell.__class__ = shell_class(type(shell))
    bind(hosted, shell)
    patcher = comfy.model_patcher.ModelPatcher(shell, load_device=load_device, offload_device=offload_device)
    attach(patcher)
    if expert is not None:
        patcher.set_attachments(EXPERT, expert)
    if source is not None:
        patcher.set_attachments(SOURCE, source)
    return patcher


def _compute_dtype(stored: torch.dtype, device: torch.device, config: Any) -> torch.dtype | None:
    """What BaseModel casts its inputs to; None for the stored type."""
    management = comfy.model_management
    if stored not in HIGH_PRECISION and management.should_use_bf16(device):
        return torch.bfloat16
    return management.unet_manual_cast(stored, device, config.supported_inference_dtypes)
