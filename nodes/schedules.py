"""The published schedules and solvers as SIGMAS and SAMPLER, for core's SamplerCustom and its relatives."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..wan_fp8 import sampling
from ..wan_fp8.models.specs import Task
from . import bridge
from .missing import Missing
from .schema import SAMPLING, node_schema

T2V = sampling.DEFAULTS[Task.T2V]


class WanFP8Sigmas(io.ComfyNode):
    """The published noise schedule, whole and split at the expert switch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8Sigmas",
            display_name="Wan2.2 Sigmas",
            category=SAMPLING,
            description="The published noise schedule of Wan2.2 for core's SamplerCustom: all of it, and its two "
            "parts for the two experts. Connect a MODEL to have it told the whole-number timesteps of this schedule, "
            "as the published code does; core rounds nothing. Chaining two samplers restarts unipc and dpm++ at the "
            "switch; the Sample Wan2.2 nodes do not.",
            search_aliases=["wan scheduler", "wan2.2 sigmas", "unipc sigmas"],
            inputs=[
                io.Int.Input(
                    "steps",
                    default=T2V.steps,
                    min=1,
                    max=1000,
                    tooltip=f"Model evaluations; time is proportional. Default {T2V.steps}: the published one of "
                    f"T2V-A14B and I2V-A14B; TI2V-5B uses {sampling.DEFAULTS[Task.TI2V].steps}.",
                ),
                io.Float.Input(
                    "shift",
                    default=T2V.shift,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    round=0.001,
                    tooltip=f"Spends more steps at high noise when larger. Default {T2V.shift:g}: the published one of "
                    "T2V-A14B; I2V-A14B and TI2V-5B use 5, distilled LoRAs 5. The MODEL's own shift is not used. "
                    "Free.",
                ),
                io.Combo.Input(
                    "solver",
                    options=list(sampling.SOLVER_NAMES),
                    default="unipc",
                    tooltip="The solver that will follow it: unipc starts just below pure noise, dpm++ and euler at "
                    "it. Default unipc: the published one. Use the same in Wan2.2 Solver.",
                ),
                io.Float.Input(
                    "boundary",
                    default=T2V.boundary,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    tooltip="Where sigmas_high ends and sigmas_low begins: the high-noise expert's steps have a "
                    f"timestep of at least 1000 times this. Default {T2V.boundary:g}: the published one of T2V-A14B; "
                    f"I2V-A14B uses {sampling.DEFAULTS[Task.I2V].boundary:g}. Not used by the first output.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Returned as a copy that is told this schedule's whole-number timesteps. Leave "
                    "unconnected to keep core's fractional ones.",
                ),
                io.Model.Input("model_low", optional=True, tooltip="The same for the low-noise expert."),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="The whole schedule, steps + 1 values."),
                io.Sigmas.Output(display_name="sigmas_high", tooltip="The high-noise expert's part."),
                io.Sigmas.Output(
                    display_name="sigmas_low",
                    tooltip="The low-noise expert's part; begins with the last value of sigmas_high.",
                ),
                io.Model.Output(display_name="model", tooltip="'model' with this schedule's timesteps."),
                io.Model.Output(display_name="model_low", tooltip="'model_low' with this schedule's timesteps."),
            ],
        )

    @classmethod
    def execute(
        cls, steps: int, shift: float, solver: str, boundary: float, model: Any = None, model_low: Any = None
    ) -> io.NodeOutput:
        sigmas = sampling.sigmas(steps, shift, solver).to(torch.float32)
        timesteps = sampling.timesteps(steps, shift, solver)
        switch = sampling.high_noise_steps(timesteps, boundary)
        models = (
            Missing(
                f"Wan2.2 Sigmas returns '{name}' only when '{name}' is connected to it: connect a MODEL there, or "
                "use yours directly"
            )
            if given is None
            else bridge.with_timesteps(given, sigmas, timesteps)
            for name, given in (("model", model), ("model_low", model_low))
        )
        return io.NodeOutput(sigmas, sigmas[: switch + 1], sigmas[switch:], *models)


class WanFP8Solver(io.ComfyNode):
    """One of the published solvers as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8Solver",
            display_name="Wan2.2 Solver",
            category=SAMPLING,
            description="The published solvers of Wan2.2 as a SAMPLER for core's SamplerCustom. Core's uni_pc and "
            "dpmpp_2m are other methods: they assume another noise process and give other videos.",
            search_aliases=["wan sampler", "unipc", "dpm++"],
            inputs=[
                io.Combo.Input(
                    "solver",
                    options=list(sampling.SOLVER_NAMES),
                    default="unipc",
                    tooltip="Default unipc: the published one, of second order with a corrector. dpm++: the published "
                    "alternative, of second order. euler: first order, for distilled 4-step LoRAs. All cost one model "
                    "evaluation a step.",
                ),
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="For core's SamplerCustom and SamplerCustomAdvanced.")
            ],
        )

    @classmethod
    def execute(cls, solver: str) -> io.NodeOutput:
        return io.NodeOutput(bridge.make_sampler(solver))
