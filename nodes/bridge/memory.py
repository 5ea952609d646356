"""Memory of the host, by core's account. What a forward needs is the engine's ``models.memory``."""

from __future__ import annotations

import comfy.model_management
import torch


def free_host_bytes() -> int:
    """Host memory that is free now, by core's account."""
    return int(comfy.model_management.get_free_memory(torch.device("cpu")))
