"""The node that attaches LoRA files in any of the formats that Wan LoRAs come in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..wan_fp8.checkpoint.lora import LoraFile, read_lora
from ..wan_fp8.errors import InputError
from . import bridge
from .missing import Missing, require
from .notices import node_id, notice
from .schema import LOADING, node_schema
from .settings import low_input, model_input

NONE = "none"
MODES = ("merged", "live")
"""Saved in workflows: the order stays, new ones go last."""


class WanFP8LoadLora(io.ComfyNode):
    """A LoRA, or the pair of a two-expert LoRA, on one or both MODELs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list("loras")
        return node_schema(
            node_id="WanFP8LoadLora",
            display_name="Load Wan2.2 LoRA",
            category=LOADING,
            description="Attaches a LoRA to a Wan2.2 MODEL, ours or core's, in every format that Wan LoRAs come in: "
            "official, kohya, PEFT and diffusers names, and the full-rank changes of distilled LoRAs, modulation "
            "included. Nothing is merged for good: without the node the weights are what they were. Merged, a LoRA "
            "costs no time in a step; live, another strength merges nothing. Core's LoRA loaders work as well, for "
            "the names that core knows.",
            search_aliases=["lora", "wan lora", "lightx2v", "distill", "4 steps"],
            inputs=[
                model_input("Two-expert checkpoints: the high-noise expert here, the other at 'model_low'."),
                io.Combo.Input(
                    "lora",
                    options=[NONE, *files],
                    default=NONE,
                    tooltip="For 'model', from models/loras. A two-expert LoRA is a pair of files: the high-noise one "
                    "here. Default none: nothing changes.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Factor on the LoRA's change. Default 1, as it was trained; 0 is exactly no LoRA. Changing "
                    "it does not read the checkpoint again; with mode live it moves no weight at all.",
                ),
                low_input(),
                io.Combo.Input(
                    "lora_low",
                    options=[NONE, *files],
                    optional=True,
                    default=NONE,
                    tooltip="For 'model_low': the low-noise file of the pair, or the same file once more if it was "
                    "trained for both. Default none: 'model_low' passes through as it is.",
                ),
                io.Float.Input(
                    "strength_low",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    tooltip="Factor on the change of 'lora_low'. Default 1.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    optional=True,
                    default=MODES[0],
                    tooltip="Default merged: added to the weights when they are loaded, FP8 weights cast once after "
                    "it; costs nothing in a step. live: runs beside the weights as two thin products for each linear, "
                    "so that another strength merges nothing and an FP8 weight keeps its bits; costs time in every "
                    "step that grows with the rank. Full-rank parts of a file are merged either way, and the node "
                    "names them. Errors of both: docs/lora.md.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="'model' with its LoRA; the one that came in is unchanged."
                ),
                io.Model.Output(display_name="model_low", tooltip="'model_low' with its LoRA."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        """A file that was replaced is another LoRA."""
        names = [inputs.get(name) for name in ("lora", "lora_low")]
        return [(name, *_stamp(name)) for name in names if name not in (None, NONE)]

    @classmethod
    def execute(
        cls,
        model: Any,
        lora: str,
        strength: float,
        model_low: Any = None,
        lora_low: str = NONE,
        strength_low: float = 1.0,
        mode: str = MODES[0],
    ) -> io.NodeOutput:
        if model_low is None and lora_low != NONE:
            raise InputError(
                f"lora_low is {lora_low!r}, but no model is connected to 'model_low': connect the low-noise expert, or "
                f"set lora_low to {NONE!r}"
            )
        files = {name: read_lora(_path(name)) for name in {lora, lora_low} - {NONE}}
        live = mode == "live"
        first, lines = _with_lora(require(model), files.get(lora), strength, "high_noise", "model", live)
        if model_low is None:
            second: Any = Missing(
                "Load Wan2.2 LoRA returns 'model_low' only when 'model_low' is connected to it: connect the low-noise "
                "expert there"
            )
        elif model_low is model and lora_low == NONE:
            second = first
        else:
            given = files.get(lora_low), strength_low, "low_noise", "model_low", live
            second, more = _with_lora(require(model_low), *given)
            lines += more
        return io.NodeOutput(first, second, ui=notice(node_id(cls), lines, level=logging.INFO))


def _with_lora(
    model: Any, lora: LoraFile | None, strength: float, expert: str, socket: str, live: bool
) -> tuple[Any, list[str]]:
    """MODEL with one LoRA, and what there is to say of it."""
    if lora is None:
        return model, []
    done = bridge.load_lora(model, lora, strength, expert=expert, live=live)
    how = f", {done.live} of them live" if live else ""
    return done.model, [
        f"{socket}: {lora.label} changes {done.changed} parameters at strength {strength:g}{how}",
        *done.notes,
    ]


def _path(name: str) -> Path:
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise InputError(f"there is no LoRA {name!r} below models/loras: choose one of the list, or put the file there")
    return Path(path)


def _stamp(name: str) -> tuple[int, int]:
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        return (0, 0)
    stat = Path(path).stat()
    return stat.st_mtime_ns, stat.st_size
