"""Pinned host memory for weights that stay off the GPU: core pins what it streams, and here is what that takes.

Memory is pinned in whole pages, and a page that is pinned for one weight cannot be pinned for another: CUDA refuses,
and cores without ``discard_cuda_async_error`` leave that refusal behind for the next kernel launch to raise. Small
weights, and weights that lie side by side in a mapped file, share pages.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ...wan_fp8.models.layers import Leaf
from ...wan_fp8.quant.convert import PAGE, in_pages

log = logging.getLogger("wan_fp8")

SMALL = 1 << 20
"""Bytes up to which a weight gets pages of its own at once: biases, norms and scales, some MB in all."""
REFUSALS = ("already mapped", "invalid argument", "operation not supported", "operation not permitted")
"""How CUDA words what ``cudaHostRegister`` did not do."""
_refused: Counter[str] = Counter()
"""What it said while one model's weights were pinned, and how often."""


def give_own_pages(net: nn.Module) -> None:
    """Small host tensors into pages of their own, where core pins memory. Those that have them keep them."""
    if getattr(comfy.model_management, "MAX_PINNED_MEMORY", -1) <= 0:
        return
    for module in net.modules():
        if isinstance(module, Leaf):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.device.type == "cpu" and _bytes(parameter) <= SMALL:
                    _settle(module, name, parameter)


def pin_streamed(patcher: Any) -> None:
    """Pin what is cast at every forward, once more.

    Core pins it when it first leaves it in host memory, unpins it when any clone of the MODEL goes, and does not come
    back to it: from the second run on, transfers would be slow and wait for each other. What core could not pin for
    sharing a page is copied into pages of its own first.
    """
    pin = getattr(patcher, "pin_weight_to_device", None)
    if pin is None or getattr(comfy.model_management, "MAX_PINNED_MEMORY", -1) <= 0:
        return
    left = _unpinned(patcher)
    _refused.clear()
    for path, module, name, parameter in left:
        _settle(module, name, parameter)
        pin(f"{path}.{name}")
    still = [_bytes(parameter) for *_, parameter in _unpinned(patcher)] if left else []
    if still:
        log.warning(
            "%d of %d weights (%.1f GiB) that stay in host memory could not be pinned (%s): moving them to the GPU "
            "is slower",
            len(still),
            len(left),
            sum(still) / 2**30,
            _why(max(still)),
        )


def _why(size: int) -> str:
    """What stood in the way of pins, as far as it can be told."""
    if _refused:
        return "; ".join(f"{count} times: {words}" for words, count in _refused.most_common(2))
    pinned = getattr(comfy.model_management, "TOTAL_PINNED_MEMORY", 0)
    most = comfy.model_management.MAX_PINNED_MEMORY
    if pinned + size > most:
        return f"ComfyUI pins {most / 2**30:.1f} GiB at most, and {pinned / 2**30:.1f} GiB are"
    return "neither ComfyUI nor CUDA says why"


def _unpinned(patcher: Any) -> list[tuple[str, Leaf, str, nn.Parameter]]:
    """What is streamed from memory that is not pinned: path and module, name and parameter."""
    return [
        (path, module, name, parameter)
        for path, module in patcher.model.named_modules()
        if isinstance(module, Leaf) and getattr(module, "comfy_cast_weights", False)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.device.type == "cpu" and not parameter.is_pinned()
    ]


def forget_refused_pins() -> None:
    """Make core's ``pin_memory`` take back the error of a pin that CUDA refused, as newer cores do by themselves."""
    plain = getattr(comfy.model_management, "pin_memory", None)
    own_care = hasattr(comfy.model_management, "discard_cuda_async_error") or hasattr(plain, "wan_fp8_plain")
    if plain is None or own_care or getattr(comfy.model_management, "MAX_PINNED_MEMORY", -1) <= 0:
        return

    @functools.wraps(plain)
    def pin_memory(tensor: Tensor) -> Any:
        pinned = plain(tensor)
        if not pinned and tensor.device.type == "cpu" and not tensor.is_pinned():
            refusal = _take_refusal_back(comfy.model_management.get_torch_device())
            if refusal is not None:
                _refused[refusal] += 1
                log.debug("%d bytes at %#x were not pinned: %s", _bytes(tensor), tensor.data_ptr(), refusal)
        return pinned

    pin_memory.wan_fp8_plain = plain  # type: ignore[attr-defined]
    comfy.model_management.pin_memory = pin_memory


def _settle(module: Leaf, name: str, parameter: nn.Parameter) -> None:
    if parameter.numel() and not _has_own_pages(parameter.data):
        module._parameters[name] = nn.Parameter(in_pages(parameter.data), requires_grad=False)


def _has_own_pages(value: Tensor) -> bool:
    """Whether ``value`` begins at a page of an allocation that reaches to the end of its last one and holds nothing
    else; a mapped file's never does."""
    storage = value.untyped_storage()
    first = value.data_ptr() - storage.data_ptr()
    pages = -(-_bytes(value) // PAGE) * PAGE
    alone = storage.nbytes() == pages + PAGE and first + pages <= storage.nbytes()
    return value.data_ptr() % PAGE == 0 and alone


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _take_refusal_back(device: torch.device) -> str | None:
    """Take the error of a refused pin away, which would be raised at the next kernel launch, and say what it was; any
    other is raised."""
    if torch.device(device).type != "cuda":
        return None
    try:
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        if not any(words in str(error) for words in REFUSALS):
            raise
        return str(error).splitlines()[0]
    return None
