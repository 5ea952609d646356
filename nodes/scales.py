"""Activation scales of DelayedScaling as files: what the recipe node offers, and the node that writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..wan_fp8.checkpoint.naming import EXPERTS
from ..wan_fp8.checkpoint.save import check_target
from ..wan_fp8.errors import InputError, WanFP8Error
from . import bridge
from .missing import require
from .notices import node_id, notice
from .schema import SETTINGS, node_schema
from .settings import low_input, model_input
from .sources import NONE, SCALE_KIND
from .targets import SUFFIX, target_path


def scale_names() -> list[str]:
    """Names of saved scales; the two files of a pair are one name."""
    files = [name for name in folder_paths.get_filename_list(SCALE_KIND) if name.endswith(SUFFIX)]
    return sorted({_without_expert(name.removesuffix(SUFFIX)) for name in files})


def _without_expert(name: str) -> str:
    for expert in EXPERTS:
        name = name.removesuffix(f".{expert}")
    return name


def scale_path(name: str, expert: str | None) -> Path:
    """The file with the scales of one expert, or of a model that has none.

    Raises:
        InputError: there is no such file.
    """
    wanted = [f"{name}.{expert}{SUFFIX}"] if expert else []
    for file in (*wanted, name + SUFFIX):
        path = folder_paths.get_full_path(SCALE_KIND, file)
        if path is not None:
            return Path(path)
    of = f"of the {expert.replace('_', '-')} expert" if expert else "of a model without a partner"
    raise InputError(
        f"models/{SCALE_KIND} has no scales {name!r} {of}: choose others, or save them with Save Wan2.2 FP8 Scales"
    )


def scale_stamp(name: str) -> list[tuple[str, int, int]]:
    """Changes when a file of that name does."""
    if name == NONE:
        return []
    paths = [
        folder_paths.get_full_path(SCALE_KIND, name + end) for end in (SUFFIX, *(f".{e}{SUFFIX}" for e in EXPERTS))
    ]
    return [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths if path is not None]


class WanFP8SaveScales(io.ComfyNode):
    """Keep what DelayedScaling found in a run, so that later runs begin with it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8SaveScales",
            display_name="Save Wan2.2 FP8 Scales",
            category=SETTINGS,
            description="Writes the activation scales that a run with the recipe DelayedScaling ended with into "
            "models/wan_fp8_scales. Chosen under 'scales' of Wan2.2 FP8 Recipe, later runs begin with them and keep "
            "them: no calibration, and the same bits every time. Stands after the sampler, between it and the decoder.",
            search_aliases=["calibrate", "amax", "delayed scaling", "freeze scales"],
            is_output_node=True,
            inputs=[
                io.Latent.Input(
                    "latent", tooltip="From the sampler: it passes through, so that this node waits for the run."
                ),
                model_input("The one that was sampled; the high-noise expert of two."),
                io.String.Input(
                    "filename",
                    default="wan2.2_scales",
                    tooltip="Name in models/wan_fp8_scales; folders before it are made. Default wan2.2_scales. The two "
                    "experts get a file each under this one name, some kilobytes.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace scales of that name. Default off: they are refused when the prompt is queued, "
                    "not after the run.",
                ),
                low_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="What came in.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None, overwrite: bool | None = None) -> bool | str:
        """Refuse before the run; a box that is linked comes as None."""
        if filename is None or overwrite is None:
            return True
        try:
            for ending in ("", *(f".{expert}" for expert in EXPERTS)):
                check_target(target_path(SCALE_KIND, filename, ending), overwrite)
        except WanFP8Error as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, latent: Any, model: Any, filename: str, overwrite: bool, model_low: Any = None) -> io.NodeOutput:
        model = require(model)
        pair = model_low is not None and model_low is not model
        experts = EXPERTS if pair else (bridge.expert_of(model),)
        lines = []
        for one, expert in zip((model, model_low) if pair else (model,), experts, strict=True):
            path = target_path(SCALE_KIND, filename, f".{expert}" if expert else "")
            bridge.save_scales(require(one), path, overwrite=overwrite)
            lines.append(f"saved {path.name}")
        return io.NodeOutput(latent, ui=notice(node_id(cls), lines))
