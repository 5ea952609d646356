"""Nodes for step caching: skip passes, measure a model's curve, save and draw it."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

from ..wan_fp8.caching import PHASES, POLICIES, PRESETS, REUSES, Curve, MagCache, Policy, Recording, save_curve
from ..wan_fp8.errors import InputError
from . import bridge
from .choices import check_choice
from .curve_image import curve_image, planned_passes
from .curves import AUTO, PUBLISHED, curve_names, distilled_names, find_curve, fingerprint_of_folder, new_path
from .missing import require
from .notices import node_id, notice
from .schema import SETTINGS, node_schema
from .settings import changed, low_input, model_input, outputs

CUSTOM = "custom"
DEFAULT_PRESET = "E012K2R20"
DEFAULT_POLICY = "magcache"
AFTER_LORAS = "Place the node after LoRA loaders: a curve belongs to the model with its LoRAs."


class WanFP8MagCache(io.ComfyNode):
    """Skip passes whose result has hardly changed since an earlier step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = MagCache()
        return node_schema(
            node_id="WanFP8MagCache",
            display_name="Wan2.2 MagCache",
            category=SETTINGS,
            is_experimental=True,  # quality: on the shipped tiny checkpoint (docs/quality.md), on no released one
            description="Skips passes of a Wan2.2 MODEL of any task whose residual has hardly changed since an earlier "
            "step, and adds the earlier one instead: MagCache with the published curves, resampled by noise level for "
            "any number of steps, shift and solver, or with a curve measured on your own model (Animate and S2V have "
            "no published one). The sampler's node shows how many passes were skipped, the time saved and an estimate "
            "of the error.",
            search_aliases=["magcache", "teacache", "easycache", "step cache", "speed up", "skip steps"],
            inputs=[
                model_input(
                    "Two-expert checkpoints: the high-noise expert here, the other at 'model_low'. " + AFTER_LORAS
                ),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default=DEFAULT_PRESET,
                    tooltip="Error threshold, skips in a row and computed share at the start, in one name. Default "
                    "E012K2R20: this pack's; skips 22 of 80 passes of I2V-A14B and 40 of T2V-A14B. E024K2R10 skips "
                    "more. The authors recommend E006K2R10 for I2V-A14B, E006K2R40 for T2V-A14B, E006K2R20 for "
                    "TI2V-5B; E004K2R20 is their command line's default. custom: the three boxes below.",
                ),
                io.Float.Input(
                    "threshold",
                    default=default.threshold,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    round=0.001,
                    tooltip="For preset custom: error that may pile up before a step is computed again. Default "
                    "0.12: this pack's; the authors use 0.04 to 0.06. Higher skips more.",
                ),
                io.Int.Input(
                    "max_skips",
                    default=default.max_skips,
                    min=0,
                    max=10,
                    tooltip="For preset custom: skipped steps in a row (K). Default 2: the authors'. 0 skips none.",
                ),
                io.Float.Input(
                    "retention",
                    default=default.retention,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="For preset custom: share of the steps at the start that is always computed, of each "
                    "expert in T2V, of the low-noise expert in I2V, whose high-noise steps are all computed. Default "
                    "0.2: the authors' default.",
                ),
                io.Combo.Input(
                    "curve",
                    options=[AUTO, PUBLISHED, *curve_names()],
                    default=AUTO,
                    tooltip="How the residual shrinks with the noise level. Default auto: the one in "
                    "models/wan/magcache that was measured on this model with its LoRAs, else the published one "
                    "(Zehong-Ma/MagCache), which is refused for another model, for distilled LoRAs and for 8 steps or "
                    "fewer. published: takes it for another size of the same task as well. Policy magcache only.",
                ),
                io.Combo.Input(
                    "phase",
                    options=list(PHASES),
                    default=default.phase,
                    tooltip="Default in_phase: cond and uncond are skipped at the same steps, by the worse of their "
                    "errors. published: each by itself, as the authors' code does, so that guidance may take the "
                    "difference of two steps; the experts then share a count. Policy magcache only.",
                ),
                io.Combo.Input(
                    "policy",
                    options=list(POLICIES),
                    default=DEFAULT_POLICY,
                    tooltip="Who decides. Default magcache: the curve, before the run. easycache: the change of the "
                    "tokens, measured in the run; needs no curve, and works with any LoRA. taylor: a fixed rhythm of "
                    "max_skips skipped steps after each computed one, with reuse linear.",
                ),
                io.Combo.Input(
                    "reuse",
                    options=list(REUSES),
                    default=default.reuse,
                    tooltip="What stands in for the blocks. Default keep: the last residual, as published. scale: the "
                    "same, times the magnitude of the curve; free. linear: the line through the last two residuals; "
                    "one more activation of memory for each conditioning (0.7 GB at 720p, 81 frames, A14B).",
                ),
                low_input(),
            ],
            outputs=outputs("with this cache"),
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        """A curve that was measured since is found."""
        return fingerprint_of_folder()

    @classmethod
    def execute(
        cls,
        model: Any,
        preset: str,
        threshold: float,
        max_skips: int,
        retention: float,
        curve: str,
        phase: str,
        policy: str,
        reuse: str,
        model_low: Any = None,
    ) -> io.NodeOutput:
        check_choice("preset", preset, [*PRESETS, CUSTOM])
        check_choice("policy", policy, POLICIES)
        if preset != CUSTOM:
            threshold, max_skips, retention = PRESETS[preset]
        numbers: dict[str, Any] = {"threshold": threshold, "max_skips": max_skips, "retention": retention}
        lines: list[str] = []

        def setting(given: Any) -> Policy:
            if policy != DEFAULT_POLICY:
                if policy == "easycache" and reuse == "scale":
                    raise InputError(
                        "reuse 'scale' multiplies by the magnitude of a curve, and policy 'easycache' has none: set "
                        "reuse to 'keep' or 'linear', or policy to 'magcache'"
                    )
                made = POLICIES[policy](**numbers, reuse="linear" if policy == "taylor" else reuse)  # type: ignore[arg-type]
                lines.append(made.describe())
                return made
            found, source = find_curve(given, curve)
            if found is None or not found.models:
                _refuse_distilled(cls)
            made = MagCache(**numbers, reuse=reuse, phase=phase, curve=found)  # type: ignore[arg-type]
            lines.extend([made.describe(), f"curve: {source}"])
            return made

        def change(given: Any) -> Any:
            bridge.refuse_other_caches(given)
            given = bridge.hosted(given)
            return bridge.with_settings(given, cache=setting(given))

        results = changed(cls, model, model_low, change)
        return io.NodeOutput(*results, ui=notice(node_id(cls), list(dict.fromkeys(lines))))


def _refuse_distilled(cls: type[io.ComfyNode]) -> None:
    names = distilled_names(getattr(cls.hidden, "prompt", None), node_id(cls))
    if names:
        raise InputError(
            f"{names[0]} is distilled to a few steps by its name, and the published curves were measured without: "
            "measure a curve of your own with Wan2.2 Calibrate MagCache, choose policy easycache, or remove one of the "
            "two"
        )


class WanFP8MagCacheCalibrate(io.ComfyNode):
    """Measure a model's magnitude curve in one normal run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8MagCacheCalibrate",
            display_name="Wan2.2 Calibrate MagCache",
            category=SETTINGS,
            is_experimental=True,
            description="Measures how the residual of your own model, of any task, with its LoRAs, sampler and steps, "
            "shrinks from step to step, while it samples a normal video. Put it where Wan2.2 MagCache would be, and "
            "Wan2.2 Save MagCache Curve after the sampler; afterwards Wan2.2 MagCache finds the curve by itself.",
            search_aliases=["magcache", "calibrate", "step cache"],
            inputs=[
                model_input(
                    "Two-expert checkpoints: the high-noise expert here, the other at 'model_low'. " + AFTER_LORAS
                ),
                low_input(),
            ],
            outputs=outputs("that measures while it samples"),
        )

    @classmethod
    def execute(cls, model: Any, model_low: Any = None) -> io.NodeOutput:
        recording = Recording()

        def change(given: Any) -> Any:
            if bridge.settings_of(given).cache is not None:
                raise InputError(
                    "this MODEL skips steps, and a curve is measured with every step computed: remove Wan2.2 "
                    "MagCache before Wan2.2 Calibrate MagCache"
                )
            return bridge.with_settings(given, recording=recording)

        return io.NodeOutput(*changed(cls, model, model_low, change))


class WanFP8MagCacheSave(io.ComfyNode):
    """Write the measured curve where the cache finds it, and draw it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8MagCacheSave",
            display_name="Wan2.2 Save MagCache Curve",
            category=SETTINGS,
            is_experimental=True,
            is_output_node=True,
            description="After a run of the MODELs of Wan2.2 Calibrate MagCache: writes the measured curve to "
            "models/wan/magcache, where Wan2.2 MagCache finds it for the same model and LoRAs, and draws it with the "
            "steps that two presets would skip.",
            search_aliases=["magcache", "calibrate", "step cache"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The same link as the sampler's 'model': the MODEL of Wan2.2 Calibrate MagCache.",
                ),
                io.Latent.Input(
                    "latent", tooltip="What the sampler returned: the curve is saved after the run. Passed through."
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="Name of the file in models/wan/magcache; one of the same name is replaced. Default empty: "
                    "the task and the model's fingerprint.",
                ),
                io.Model.Input(
                    "model_low", optional=True, tooltip="The low-noise expert, the same link as the sampler's."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="'latent', unchanged."),
                io.Image.Output(
                    display_name="image", tooltip="The curve by step, and the steps that two presets would skip."
                ),
                io.String.Output(display_name="file", tooltip="Name of the file, as Wan2.2 MagCache lists it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, latent: Any, name: str, model_low: Any = None) -> io.NodeOutput:
        models = [require(given) for given in (model, model_low) if given is not None]
        curve = _measured_curve(models, name)
        path = new_path(curve.name)
        save_curve(curve, path)
        lines = [f"curve of {len(curve.sigmas)} steps written to models/wan/magcache/{path.name}"]
        for preset in PRESETS:
            skipped, total = planned_passes(curve, preset)
            lines.append(f"{preset} would skip {len(skipped)} of {total} passes of such a run")
        return io.NodeOutput(latent, curve_image(curve), path.name, ui=notice(node_id(cls), lines))


def _measured_curve(models: list[Any], name: str) -> Curve:
    """What the MODELs' recording has measured, under the fingerprints of these MODELs.

    Raises:
        InputError: they measure nothing, or belong to two measurements, or the second expert is missing.
    """
    recordings = {bridge.settings_of(given).recording for given in models}
    recording = recordings.pop()
    if recording is None or recordings:
        raise InputError(
            "these MODELs do not come from one Wan2.2 Calibrate MagCache: connect the links that go into the sampler"
        )
    spec = bridge.spec_of(models[0])
    marks = [bridge.fingerprint(given) for given in models]
    curve = recording.curve(name.removesuffix(".json").strip() or f"{spec.task}-{marks[0][:8]}", spec)
    if curve.switch is None:
        experts = ["only"]
    elif len(models) == 2:
        experts = ["high_noise", "low_noise"]
    else:
        raise InputError("two experts were sampled and 'model_low' is not connected: connect the low-noise expert")
    pairs = tuple(zip(experts, marks, strict=False))
    return dataclasses.replace(curve, models=pairs)
