"""Whole settings by one name: which recipe, attention and cache a preset comes to on a device, and why.

A preset is nothing but values for the settings that there are anyway: ``choose`` returns them, and whoever applies
them one by one gets the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attention import ATTENTION, Attention, AttentionRequest
from .attention.core import register_backends as register_attention
from .caching import PRESETS as CACHE_PRESETS
from .caching import MagCache
from .errors import BackendUnavailableError, InputError
from .gemm import GEMM, GemmRequest
from .gemm import register_backends as register_gemm
from .hardware import DeviceCaps
from .libraries import LIBRARIES
from .models.memory import forward_needs, weight_bytes
from .models.specs import ModelSpec, Task
from .quant.recipe import Recipe

NAMES = ("lossless", "balanced", "fast", "few-step")
"""Saved in workflows: the order stays, new ones go last."""
LOW_PRECISION = ("fa3-fp8", "sage")
"""Attention that ``fast`` takes, the first that runs and is of use there."""
CACHE = "E012K2R20"
LATENT_720P = {Task.TI2V: (31, 44, 80)}
"""Latent frames, rows and columns of the largest published size, where it is not 81 frames of 1280x720."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """What a name comes to on one device."""

    name: str
    recipe: Recipe
    attention: Attention
    cache: MagCache | None
    """With the published curve; whether the model has one is for its owner to check."""
    reasons: tuple[str, ...]
    """One sentence for each setting that depended on the machine."""

    def lines(self) -> list[str]:
        """The same as settings of the nodes that make them."""
        recipe, attention, cache = self.recipe, self.attention, self.cache
        window = ""
        if not attention.is_exact:
            window = (
                f", exact {attention.exact}, skip steps {attention.skip_first_steps} and {attention.skip_last_steps}, "
                f"skip blocks {attention.skip_first_blocks} and {attention.skip_last_blocks}, bound {attention.bound:g}"
            )
        named = next((name for name, numbers in CACHE_PRESETS.items() if cache and numbers == _numbers(cache)), CACHE)
        return [
            f"Wan2.2 FP8 Recipe: recipe {recipe.name}"
            + ("" if recipe.is_none else f", backend {recipe.backend}, all else as it comes"),
            f"Wan2.2 Attention: backend {attention.backend}{window}",
            "Wan2.2 MagCache: " + ("none" if cache is None else f"preset {named}, all else as it comes"),
            "Wan2.2 Compile and Precision: none (a block takes as long with it: measured on an H200)",
            *self.reasons,
        ]


def choose(name: str, caps: DeviceCaps, dtype: torch.dtype, spec: ModelSpec) -> Preset:
    """The settings of a preset.

    Args:
        name: One of ``NAMES``.
        caps: Of the device that the model runs on.
        dtype: Which it computes in.
    Raises:
        InputError: no preset has that name.
    """
    if name not in NAMES:
        raise InputError(f"preset must be one of {', '.join(NAMES)}; got {name!r}: choose one of these")
    reasons: list[str] = []
    recipe = Recipe("none") if name == "lossless" else _recipe(caps, dtype, spec, reasons)
    attention = _attention(caps, dtype, spec, reasons) if name == "fast" else Attention()
    threshold, max_skips, retention = CACHE_PRESETS[CACHE]
    cache = MagCache(threshold=threshold, max_skips=max_skips, retention=retention) if name == "fast" else None
    if name == "few-step":
        reasons.append(
            "few-step is for models or LoRAs that were distilled to 4 or 8 steps: set the sampler's steps to that "
            "number and guidance to 1; low-precision attention and caching are off, because so few steps leave "
            "nothing to skip"
        )
    return Preset(name=name, recipe=recipe, attention=attention, cache=cache, reasons=tuple(reasons))


def latent_shape(spec: ModelSpec) -> tuple[int, int, int, int, int]:
    """[1, C, F, H, W] of the largest published video of a model."""
    return (1, spec.out_dim, *LATENT_720P.get(spec.task, (21, 90, 160)))


def _numbers(cache: MagCache) -> tuple[float, int, float]:
    return cache.threshold, cache.max_skips, cache.retention


def _recipe(caps: DeviceCaps, dtype: torch.dtype, spec: ModelSpec, reasons: list[str]) -> Recipe:
    """Row scales where the device multiplies them; else FP8 as storage where 16 bits a weight do not fit."""
    register_gemm()
    rowwise = Recipe("rowwise")
    request = GemmRequest(caps, rowwise.granularity, dtype)
    try:
        GEMM.resolve(rowwise.backend, request)
        return rowwise
    except BackendUnavailableError:
        why = GEMM.backend("torch").refuse(request)  # the only one that has row scales
    weight_only = Recipe("rowwise", backend="weight-only")
    try:
        GEMM.resolve(weight_only.backend, GemmRequest(caps, weight_only.granularity, dtype))
    except BackendUnavailableError:
        reasons.append(f"recipe none: {why}")
        return Recipe("none")
    total = caps.total_memory_bytes
    if total is None:
        reasons.append(f"recipe none: {why}; and host memory is not what limits this device")
        return Recipe("none")
    need = weight_bytes(spec, 2) + forward_needs(spec, latent_shape(spec), dtype).total
    fits = f"{need / 2**30:.0f} GiB for the weights and the largest published video, and {total / 2**30:.0f} GiB there"
    if need <= total:
        reasons.append(f"recipe none: {why}; 16 bits a weight fit ({fits})")
        return Recipe("none")
    reasons.append(f"backend weight-only: {why}; 16 bits a weight would not fit ({fits})")
    return weight_only


def _attention(caps: DeviceCaps, dtype: torch.dtype, spec: ModelSpec, reasons: list[str]) -> Attention:
    """The first low-precision kernel that runs, inside its default window and under its guard."""
    register_attention()
    frames, rows, columns = (n // p for n, p in zip(latent_shape(spec)[2:], spec.patch_size, strict=True))
    tokens = frames * rows * columns
    request = AttentionRequest(caps, dtype, spec.head_dim, tokens, tokens)
    refused = []
    for name in LOW_PRECISION:
        if name == "sage" and not LIBRARIES["sage"].advised.has_one_of((caps.capability or (0, 0),)):
            refused.append(f"sage: of use on compute capability {LIBRARIES['sage'].advised} only")
            continue
        try:
            ATTENTION.resolve(name, request)
            return Attention(backend=name)
        except BackendUnavailableError as error:
            refused.append(str(error))
    reasons.append(f"attention auto, exact: {'; '.join(refused)}")
    return Attention()
