"""FP8 recipes on a MODEL: a fork with weights of its own; the MODEL that came in keeps its bits."""

from __future__ import annotations

from typing import Any

from ...wan_fp8 import quant
from ...wan_fp8.gemm import GemmRequest
from ...wan_fp8.quant.linear import FP8Linear, Quantization
from ...wan_fp8.registry import Resolution
from .fork import attach, fork, is_hosted
from .settings import attention_request


def recipe_of(patcher: Any) -> quant.Recipe | None:
    """The recipe that this MODEL carries; None for none."""
    return quant.recipe_of(patcher.model.diffusion_model) if is_hosted(patcher) else None


def with_recipe(patcher: Any, recipe: quant.Recipe) -> tuple[Any, Resolution[GemmRequest] | None]:
    """A fork of this MODEL with FP8 linears, and who multiplies them (None for the recipe ``none``).

    Weights are cast on the MODEL's own device, one at a time, and rest where core lets models rest. The original
    weights stay in reach for LoRA merges: they belong to the MODEL that came in (or to its mapped file).

    Raises:
        BackendUnavailableError: nobody can multiply there, with the reasons; before anything is cast.
        InputError: the recipe does not fit this model.
        UnsupportedPatchError: see ``fork``.
    """
    asked = attention_request(patcher)
    device = asked.caps.device
    resolution = None if recipe.is_none else Quantization(recipe, ()).resolve(device, asked.dtype)
    if recipe.is_none and recipe_of(patcher) is None:
        return patcher, None
    forked = fork(patcher)
    net = forked.model.diffusion_model
    quant.apply_recipe(net, recipe, device=None if device.type == "cpu" else device, keep_sources=True)
    forked.size = 0  # core measures it at its next use
    attach(forked)  # FP8 weights want another hook mode
    return forked, resolution


def fp8_layers(patcher: Any) -> int:
    """How many linears of this MODEL hold FP8 weights of a recipe."""
    return sum(isinstance(module, FP8Linear) for module in patcher.model.diffusion_model.modules())
