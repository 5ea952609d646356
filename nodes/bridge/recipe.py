"""FP8 recipes on a MODEL: a fork with weights of its own; the MODEL that came in keeps its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...wan_fp8 import quant
from ...wan_fp8.errors import InputError
from ...wan_fp8.gemm import GemmRequest
from ...wan_fp8.quant import convert
from ...wan_fp8.quant.linear import FP8Linear, Quantization
from ...wan_fp8.registry import Resolution
from .fork import attach, fork, is_hosted
from .remote import SCALES, is_remote, remote_of, remote_with_recipe
from .settings import attention_request


def recipe_of(patcher: Any) -> quant.Recipe | None:
    """The recipe that this MODEL carries; None for none."""
    if is_remote(patcher):
        recipe = remote_of(patcher).recipe
        return None if recipe.is_none else recipe
    return quant.recipe_of(patcher.model.diffusion_model) if is_hosted(patcher) else None


def with_recipe(
    patcher: Any, recipe: quant.Recipe, scales: Path | None = None
) -> tuple[Any, Resolution[GemmRequest] | None]:
    """A fork of this MODEL with FP8 linears, and who multiplies them (None for the recipe ``none``).

    Weights are cast on the MODEL's own device, one at a time, and rest where core lets models rest. The original
    weights stay in reach for LoRA merges: they belong to the MODEL that came in (or to its mapped file).

    Args:
        scales: File of DelayedScaling's activation scales, with which every run begins and which it keeps; None: each
            run finds its own.
    Raises:
        BackendUnavailableError: nobody can multiply there, with the reasons; before anything is cast.
        CheckpointError: the scales are not of this model and recipe.
        InputError: the recipe does not fit this model, or knows no such scales.
        UnsupportedPatchError: see ``fork``.
    """
    if scales is not None and not recipe.is_delayed:
        raise InputError(
            f"recipe {recipe.name} takes no scales of earlier runs: set scales to 'none', or choose DelayedScaling"
        )
    asked = attention_request(patcher)
    device = asked.caps.device
    resolution = None if recipe.is_none else Quantization(recipe, ()).resolve(device, asked.dtype)
    if recipe.is_none and recipe_of(patcher) is None:
        return patcher, None
    if is_remote(patcher):
        convert.check_recipe(patcher.model.diffusion_model, recipe)
        return remote_with_recipe(patcher, recipe, scales), resolution
    forked = fork(patcher)
    net = forked.model.diffusion_model
    quant.apply_recipe(net, recipe, device=None if device.type == "cpu" else device, keep_sources=True)
    if scales is not None:
        quant.load_scales(net, scales)
    elif recipe.is_delayed:
        quant.forget_scales(net)  # of a MODEL that came with the same recipe
    forked.set_attachments(SCALES, None if scales is None else str(scales))
    forked.size = 0  # core measures it at its next use
    attach(forked)  # FP8 weights want another hook mode
    return forked, resolution


def fp8_layers(patcher: Any) -> int:
    """How many linears of this MODEL hold FP8 weights of a recipe."""
    net = patcher.model.diffusion_model
    if is_remote(patcher):
        return sum(remote_of(patcher).recipe.converts(name) for name, _ in net.named_modules())
    return sum(isinstance(module, FP8Linear) for module in net.modules())


def rounded_again(patcher: Any) -> int:
    """How many linears of this MODEL were FP8 under other scales before its recipe."""
    return convert.rounded_again(patcher.model.diffusion_model)
