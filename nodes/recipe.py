"""The node that turns a MODEL's linears into FP8."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..wan_fp8.checkpoint.naming import EXPERTS
from ..wan_fp8.gemm import GemmRequest
from ..wan_fp8.quant.recipe import AMAX_ALGORITHMS, Recipe
from ..wan_fp8.registry import Resolution
from . import bridge
from .notices import node_id, notice
from .scales import scale_names, scale_path, scale_stamp
from .schema import SETTINGS, node_schema
from .settings import changed, low_input, model_input, outputs
from .sources import NONE

RECIPES = ("rowwise", "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "none", "MXFP8BlockScaling")
BACKENDS = ("auto", "torch", "transformer_engine", "reference", "weight-only")
"""Saved in workflows: the order of both lists stays, new entries go last. A test holds them against the engine."""

DEFAULT = Recipe()


class WanFP8Recipe(io.ComfyNode):
    """FP8 weights and FP8 matrix products for a MODEL, or back to high precision."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8Recipe",
            display_name="Wan2.2 FP8 Recipe",
            category=SETTINGS,
            description="Stores the large linears of a Wan2.2 MODEL, ours or core's, in FP8 (E4M3, one byte a weight) "
            "and multiplies them in FP8 on GPUs of Ada, Hopper and Blackwell. Embeddings, norms, modulation and head "
            "keep their precision. LoRAs before or after it are merged from the original weights.",
            search_aliases=["fp8", "quantize", "quantise", "transformer engine", "float8", "e4m3"],
            inputs=[
                model_input("Two-expert checkpoints: the high-noise expert here, the other at 'model_low'."),
                io.Combo.Input(
                    "recipe",
                    options=list(RECIPES),
                    default=DEFAULT.name,
                    tooltip="Where scales come from. Default rowwise: one a token and one an output channel, nothing "
                    "to calibrate, outliers stay in their own token. DelayedScaling: one for the tensor, from the "
                    "steps before; the least work, and a sudden outlier is clamped once. Float8CurrentScaling: one, "
                    "from the tensor itself. Float8BlockScaling: one for 128 values (Hopper). none: the original "
                    "weights again. MXFP8BlockScaling: a power of two for 32 values (B200, B300), not yet run on a "
                    "GPU. docs/fp8.md compares them.",
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default=DEFAULT.backend,
                    tooltip="Who multiplies. Default auto: the first of torch and transformer_engine that can; the "
                    "node shows which, and why not another. weight-only, for GPUs without FP8 (before the RTX 40) and "
                    "the CPU: the memory of FP8, no speed (each weight is turned into bf16 for each product), half "
                    "the error. reference computes with dequantised values on any machine: at less than the speed of "
                    "float32, for comparisons.",
                ),
                io.Int.Input(
                    "amax_history_len",
                    default=DEFAULT.amax_history_len,
                    min=1,
                    max=4096,
                    tooltip="DelayedScaling only: how many sampling steps are remembered. Default 16.",
                ),
                io.Combo.Input(
                    "amax_compute_algo",
                    options=list(AMAX_ALGORITHMS),
                    default=DEFAULT.amax_compute_algo,
                    tooltip="DelayedScaling only. Default max: the largest value of the remembered steps. most_recent: "
                    "that of the last one, which follows faster and clamps more.",
                ),
                io.Int.Input(
                    "margin",
                    default=DEFAULT.margin,
                    min=0,
                    max=16,
                    tooltip="DelayedScaling only: room for values 2^margin times as large as those seen. Default 0; 1 "
                    "or 2 cost no precision and clamp less.",
                ),
                io.String.Input(
                    "keep",
                    default="",
                    tooltip="Layers that stay in high precision, as beginnings of their names with commas between: "
                    "'blocks.0., blocks.39.' keeps the first and last block of A14B, 'cross_attn.' every block's "
                    "cross-attention. Default: none. Each block kept costs 0.35 GB for each expert and a few "
                    "milliseconds.",
                ),
                low_input(),
                io.Combo.Input(
                    "scales",
                    options=[NONE, *scale_names()],
                    default=NONE,
                    optional=True,
                    tooltip="DelayedScaling only: activation scales of an earlier run, from models/wan_fp8_scales (see "
                    "Save Wan2.2 FP8 Scales). Runs begin with them and keep them: no calibration, the same bits every "
                    "time. Default none: each run finds its own, with a first forward that reads its inputs twice.",
                ),
            ],
            outputs=outputs("with this recipe"),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, scales: str | None = NONE, **_: Any) -> Any:
        """Scales that were saved again are others."""
        return None if scales is None else scale_stamp(scales)

    @classmethod
    def execute(
        cls,
        model: Any,
        recipe: str,
        backend: str,
        amax_history_len: int,
        amax_compute_algo: str,
        margin: int,
        keep: str,
        model_low: Any = None,
        scales: str = NONE,
    ) -> io.NodeOutput:
        setting = Recipe(
            recipe,
            backend=backend,
            amax_history_len=amax_history_len,
            amax_compute_algo=amax_compute_algo,
            margin=margin,
            keep=tuple(prefix for prefix in (part.strip() for part in keep.split(",")) if prefix),
        )
        lines: list[str] = []
        pair = model_low is not None and model_low is not model

        def change(given: Any) -> Any:
            expert = EXPERTS[given is not model] if pair else bridge.expert_of(given)
            file = None if scales == NONE else scale_path(scales, expert)
            result, resolution = bridge.with_recipe(given, setting, file)
            if resolution is not None:
                lines.extend(_told(setting, result, resolution))
            if file is not None:
                lines.append(f"activation scales of {file.name}, frozen")
            return result

        results = changed(cls, model, model_low, change)
        return io.NodeOutput(*results, ui=notice(node_id(cls), list(dict.fromkeys(lines))))


def _told(recipe: Recipe, model: Any, resolution: Resolution[GemmRequest]) -> list[str]:
    """What was done, in words."""
    what = f"{recipe.name}: {bridge.fp8_layers(model)} linears in FP8, multiplied by {resolution.backend.name}"
    if recipe.is_weight_only:
        what += (
            ": weights in FP8, products of dequantised weights in the model's own precision (less memory, not faster)"
        )
    twice = bridge.rounded_again(model)
    lines = [what, *(f"passed over {name}: {reason}" for name, reason in resolution.refused.items())]
    if twice:
        lines.append(
            f"{twice} linears came in FP8 under scales that {recipe.name} cannot multiply, and were rounded a second "
            "time: load the original weights, or choose the recipe that the file was saved with"
        )
    return lines
