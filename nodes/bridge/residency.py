"""Modules of ours that are no diffusion model (the text encoder) under core's memory management."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn

logger = logging.getLogger("wan_fp8")


class _Holder(nn.Module):
    """Core writes attributes (``device``, …) on the module it manages, which the modules of other libraries refuse."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module = module
        self.device = device


def manage(module: nn.Module, working_bytes: int = 0) -> Any:
    """A patcher that lets core bring ``module`` to the GPU and evict it again, always as a whole.

    Args:
        module: On the CPU. It runs where core runs text encoders, or on the CPU where the GPU cannot take it beside
            what core keeps free there for the system and its own work.
        working_bytes: What a run needs beside the weights.
    """
    management = comfy.model_management
    load_device, rest = management.text_encoder_device(), management.text_encoder_offload_device()
    holder = _Holder(module, rest)
    size = management.module_size(holder)
    kept_free = getattr(management, "EXTRA_RESERVED_VRAM", 0)
    if load_device.type != "cpu" and size + working_bytes + kept_free > management.get_total_memory(load_device):
        logger.info(
            "the text encoder's %.1f GiB do not fit %s: it runs on the CPU", (size + working_bytes) / 2**30, load_device
        )
        load_device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(holder, load_device=load_device, offload_device=rest)


def make_resident(patcher: Any, working_bytes: int = 0) -> None:
    """Bring what ``patcher`` manages to its device, evicting other models if need be.

    Args:
        working_bytes: What a run needs beside the weights.
    """
    comfy.model_management.load_models_gpu([patcher], memory_required=working_bytes, force_full_load=True)
