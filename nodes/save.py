"""The node that writes a MODEL to a file, with its FP8 weights and LoRAs as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..wan_fp8.checkpoint.naming import EXPERTS
from ..wan_fp8.checkpoint.reader import open_source
from ..wan_fp8.checkpoint.save import check_target
from ..wan_fp8.kernels.quantize import Granularity
from . import bridge
from .missing import require
from .notices import node_id, notice
from .schema import LOADING, node_schema
from .settings import low_input, model_input
from .sources import FILE_KIND
from .targets import target_path


class WanFP8SaveCheckpoint(io.ComfyNode):
    """One or both MODELs as files for Load Wan2.2 Checkpoint, and for core where its format allows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8SaveCheckpoint",
            display_name="Save Wan2.2 Checkpoint",
            category=LOADING,
            description="Writes a Wan2.2 MODEL into models/diffusion_models as it is now: FP8 weights with their "
            "scales, LoRAs merged. Loading that file takes the time of reading it, with nothing to quantise, and gives "
            "the same bits. With one scale for a tensor (DelayedScaling, Float8CurrentScaling) ComfyUI's Load "
            "Diffusion Model reads it as well.",
            search_aliases=["save model", "export", "quantize", "fp8 checkpoint", "ModelSave"],
            is_output_node=True,
            inputs=[
                model_input("Two-expert checkpoints: the high-noise expert here, the other at 'model_low'."),
                io.String.Input(
                    "filename",
                    default="wan2.2_fp8",
                    tooltip="Name in models/diffusion_models; folders before it are made. Default wan2.2_fp8. With "
                    "both experts connected, '_high_noise' and '_low_noise' are added, so that the loader finds the "
                    "pair. An A14B expert takes 14.5 GB in FP8 and 28.6 GB in bf16.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace files of that name. Default off: they are refused, before anything is written.",
                ),
                low_input(),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="The file that was written."),
                io.String.Output(display_name="path_low", tooltip="That of 'model_low', or nothing."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, filename: str, overwrite: bool, model_low: Any = None) -> io.NodeOutput:
        given = [require(one) for one in (model, model_low) if one is not None]
        pair = len(given) == 2 and given[0] is not given[1]
        if pair:
            plan: list[tuple[Any, str, str | None]] = [
                (one, f"_{expert}", expert) for one, expert in zip(given, EXPERTS, strict=True)
            ]
        else:
            plan = [(given[0], "", None)]
        paths = [target_path(FILE_KIND, filename, ending) for _, ending, _ in plan]
        for path in paths:
            check_target(path, overwrite)
        lines = []
        for (one, _, expert), path in zip(plan, paths, strict=True):
            bridge.save_model(one, path, overwrite=overwrite, expert=expert)
            lines.append(_told(one, path))
        names = [str(path) for path in paths]
        return io.NodeOutput(names[0], names[1] if pair else "", ui=notice(node_id(cls), lines))


def _told(model: Any, path: Path) -> str:
    """What was written, and who reads it."""
    with open_source(path) as source:
        size = f"{path.name}: {source.nbytes / 1e9:.2f} GB"
    recipe = bridge.recipe_of(model)
    if recipe is None:
        return f"{size}, weights in the type that they were loaded in" + (", LoRAs merged" if model.patches else "")
    if recipe.granularity is Granularity.TENSOR:
        return f"{size}, {recipe.name}: for Load Wan2.2 Checkpoint and for core's Load Diffusion Model"
    return f"{size}, {recipe.name}: for Load Wan2.2 Checkpoint (core has no such scales)"
