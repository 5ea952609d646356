"""The node that makes all settings at once."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..wan_fp8 import presets
from ..wan_fp8.caching import MagCache
from ..wan_fp8.errors import InputError
from . import bridge
from .choices import check_choice
from .curves import AUTO, distilled_names, find_curve
from .notices import node_id, notice
from .schema import SETTINGS, node_schema
from .settings import changed, low_input, model_input, outputs

DEFAULT = "balanced"


class WanFP8Preset(io.ComfyNode):
    """Recipe, attention and cache for this machine, by one name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8Preset",
            display_name="Wan2.2 Preset",
            category=SETTINGS,
            description="Sets FP8 recipe, attention and step cache of a Wan2.2 MODEL, ours or core's, to what fits "
            "this machine, and shows the settings one by one: the same that Wan2.2 FP8 Recipe, Wan2.2 Attention and "
            "Wan2.2 MagCache make. Settings nodes after it change single ones.",
            search_aliases=["preset", "settings", "fast", "speed up", "quality", "4 steps", "lightning", "optimize"],
            inputs=[
                model_input(
                    "Two-expert checkpoints: the high-noise expert here, the other at 'model_low'. Place the node "
                    "after LoRA loaders."
                ),
                io.Combo.Input(
                    "preset",
                    options=list(presets.NAMES),
                    default=DEFAULT,
                    tooltip="Default balanced: FP8 weights and products where the GPU multiplies FP8 (else 16 bits, or "
                    "FP8 as storage alone where 16 bits would not fit), exact attention. lossless: weights as they "
                    "came, exact attention. fast: as balanced, with FP8 or INT8 attention inside its guarded window "
                    "where one runs, and MagCache E012K2R20; their effect on videos was measured on a small trained "
                    "model alone (docs/quality.md). "
                    "few-step: as balanced, for distilled models and LoRAs; set 4 or 8 steps and guidance 1 in the "
                    "sampler. What each costs and saves: docs/choosing.md.",
                ),
                low_input(),
            ],
            outputs=outputs("with these settings"),
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(cls, model: Any, preset: str, model_low: Any = None) -> io.NodeOutput:
        check_choice("preset", preset, presets.NAMES)
        lines: list[str] = []
        distilled = distilled_names(getattr(cls.hidden, "prompt", None), node_id(cls))

        def change(given: Any) -> Any:
            request = bridge.attention_request(given)
            setting = presets.choose(preset, request.caps, request.dtype, bridge.spec_of(given))
            said = setting.lines()
            if setting.cache is None:
                cache, reason = None, ""
            else:
                cache, reason = _cache(given, setting.cache, distilled)
            if reason:
                said = [line for line in said if not line.startswith("Wan2.2 MagCache:")] + [reason]
            result, _ = bridge.with_recipe(given, setting.recipe)
            lines.extend([f"preset {preset} on {request.caps.name}:", *said])
            return bridge.with_settings(bridge.hosted(result), attention=setting.attention, cache=cache)

        results = changed(cls, model, model_low, change)
        return io.NodeOutput(*results, ui=notice(node_id(cls), list(dict.fromkeys(lines))))


def _cache(given: Any, wanted: MagCache, distilled: list[str]) -> tuple[MagCache | None, str]:
    """The cache that this MODEL can have; else None and why not, in words."""
    if distilled:
        return None, f"Wan2.2 MagCache: none, because {distilled[0]} is distilled by its name: choose preset few-step"
    bridge.refuse_other_caches(given)
    try:
        curve, source = find_curve(bridge.hosted(given), AUTO)
    except InputError as error:
        return None, f"Wan2.2 MagCache: none, because {error}"
    if curve is None:
        return wanted, ""
    made = MagCache(threshold=wanted.threshold, max_skips=wanted.max_skips, retention=wanted.retention, curve=curve)
    return made, f"Wan2.2 MagCache: preset {presets.CACHE}, with the curve {source}"
