"""Memory of the host, by core's account. What a forward needs is the engine's ``models.memory``."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch

GIB = 1 << 30
STEP = GIB // 2
"""What the next run leaves free beyond what was in pieces when memory ran out."""


class OutOfMemoryError(torch.OutOfMemoryError):
    """The GPU's memory ran out in a run; the message says what to do. Of the type that core frees the GPU for."""


def free_host_bytes() -> int:
    """Host memory that is free now, by core's account."""
    return int(comfy.model_management.get_free_memory(torch.device("cpu")))


def explained(error: Exception, net: Any, device: torch.device) -> OutOfMemoryError | None:
    """One sentence in place of the allocator's; None where ``error`` is no such thing, or explained.

    The model's next runs leave more room: what lay in pieces when memory ran out, and 0.5 GiB, each time that it does,
    up to a quarter of the GPU. Nothing is lost: weights have their homes in host memory, and what a run keeps goes with
    it.
    """
    ours = isinstance(error, torch.OutOfMemoryError) and not isinstance(error, OutOfMemoryError)
    if not ours or device.type not in ("cuda", "cpu"):  # a CPU raises none
        return None  # core may take any exception for one, and other GPUs count in other places
    held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    total = comfy.model_management.get_total_memory(device)
    net.lacked = min(net.lacked + held - used + STEP, total // 4)
    return OutOfMemoryError(
        f"the GPU ran out of memory in the middle of a run ({used / GIB:.1f} of {total / GIB:.1f} GiB held tensors, "
        f"{(held - used) / GIB:.1f} GiB lay in pieces too small to use): run it again, and {net.lacked / GIB:.1f} GiB "
        "more will be left free for it; if that does not help, take fewer frames or a smaller size, or start ComfyUI "
        "with a larger --reserve-vram"
    )
