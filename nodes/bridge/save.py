"""A MODEL's weights and scales to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils

from ...wan_fp8 import quant
from ...wan_fp8.checkpoint.save import check_target, save_checkpoint
from ...wan_fp8.errors import InputError
from .fork import expert_of, hosted, is_hosted
from .hosted_model import refuse_live_lora, settings_of


def save_model(patcher: Any, path: Path, *, overwrite: bool = False, expert: str | None = None) -> Path:
    """Write this MODEL's transformer with its LoRAs merged, as core's own saving nodes do: core loads it, merges, and
    what it then holds is read weight by weight. Shows progress, and stops where the user cancels.

    Args:
        expert: Its role in a pair; None: as its loader said.
    Raises:
        InputError: the file exists, its name will not do, the disk cannot take it, or a live LoRA would be missing in
            it; nothing is left behind.
        UnsupportedPatchError: see ``fork``.
    """
    check_target(path, overwrite)
    _refuse_remote(patcher, "save the MODEL that comes out of the loader, or of a node before it")
    refuse_live_lora(settings_of(patcher).lora, patcher.model.diffusion_model.lora if is_hosted(patcher) else None)
    model = hosted(patcher)
    management = comfy.model_management
    management.load_models_gpu([model], force_patch_weights=True)
    bar = comfy.utils.ProgressBar(1000)

    def progress(done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(1000 * done // total, 1000)

    net = model.model.diffusion_model
    return save_checkpoint(net, path, overwrite=overwrite, expert=expert or expert_of(model), progress=progress)


def _refuse_remote(patcher: Any, instead: str) -> None:
    if is_hosted(patcher) and patcher.model.diffusion_model.is_remote:
        raise InputError(f"what is to be saved of this MODEL lies in the processes of a pool: {instead}")


def save_scales(patcher: Any, path: Path, *, overwrite: bool = False) -> None:
    """Write the activation scales that the last run of a DelayedScaling MODEL ended with.

    Raises:
        InputError: it has no such recipe or has not run, or the file exists or cannot be written.
    """
    _refuse_remote(patcher, "save the scales of a run on one GPU; a recipe behind Wan2.2 Multi-GPU takes the file")
    recipe = quant.recipe_of(patcher.model.diffusion_model) if is_hosted(patcher) else None
    if recipe is None or not recipe.is_delayed:
        raise InputError(
            "this MODEL has no DelayedScaling recipe, whose scales could be saved: connect the one that Wan2.2 FP8 "
            "Recipe returned with DelayedScaling"
        )
    check_target(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    quant.save_scales(patcher.model.diffusion_model, path)
