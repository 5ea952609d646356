"""The inputs that the samplers share, with the published defaults of each task as their defaults.

Order is part of the contract: a saved workflow stores widget values by position, so a new input goes last.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..wan_fp8.models.specs import Task
from ..wan_fp8.sampling import DEFAULTS, LAYOUTS
from . import bridge

OFFICIAL_SCHEDULE = "official"
NOISE_CPU = "cpu"
NOISE_CUDA = "cuda (published code)"
MAX_SIZE = 8192
MAX_FRAMES = 1 + 4 * 1024
MAX_SEED = 0xFFFFFFFFFFFFFFFF

CONFIG_FILES = {
    Task.T2V: "wan/configs/wan_t2v_A14B.py",
    Task.I2V: "wan/configs/wan_i2v_A14B.py",
    Task.TI2V: "wan/configs/wan_ti2v_5B.py",
    Task.ANIMATE: "wan/configs/wan_animate_14B.py",
    Task.S2V: "wan/configs/wan_s2v_14B.py",
}
"""Where the published defaults come from (Wan-Video/Wan2.2); named in tooltips."""
SIZE_SOURCES = {
    Task.T2V: "--size of generate.py",
    Task.I2V: "--size of generate.py",
    Task.TI2V: "SUPPORTED_SIZES in wan/configs/__init__.py",
    Task.ANIMATE: "SUPPORTED_SIZES in wan/configs/__init__.py",
    Task.S2V: "--size of generate.py",
}
FRAME_SOURCES = {
    Task.T2V: "wan/configs/shared_config.py",
    Task.I2V: "wan/configs/shared_config.py",
    Task.TI2V: CONFIG_FILES[Task.TI2V],
}


def scheduler_names() -> list[str]:
    """The solver's own schedule, then core's schedulers."""
    return [OFFICIAL_SCHEDULE, *bridge.scheduler_names()]


def model_inputs(task: Task) -> list[io.Input]:
    """MODEL and the two CONDITIONINGs."""
    first = "The high-noise expert" if DEFAULTS[task].boundary is not None else "The model"
    return [
        io.Model.Input(
            "model",
            tooltip=f"{first} of Wan2.2 {task.upper()}, from Load Wan2.2 Checkpoint or from core's Load Diffusion "
            "Model; LoRA, shift and settings nodes may sit between. A MODEL of core's is run by this pack's own "
            "transformer on the same weights.",
        ),
        io.Conditioning.Input(
            "positive",
            tooltip="What the video shows, from Encode Wan2.2 Prompt or from core's CLIP Text Encode with UMT5-XXL.",
        ),
        io.Conditioning.Input(
            "negative",
            tooltip="What to steer away from. Not used at a guidance of 1, which halves the time of a step.",
        ),
    ]


def segment_vae_input() -> io.Input:
    """The VAE of a sampler that decodes as it goes."""
    return io.Vae.Input(
        "vae",
        tooltip="Wan 2.1 VAE (16 channels), the one of this checkpoint. Encodes what goes in, decodes what comes out.",
    )


def low_noise_input() -> io.Input:
    """The second expert's MODEL."""
    return io.Model.Input(
        "model_low",
        optional=True,
        tooltip="The low-noise expert. It takes over once the noise level falls below 'boundary'. Needed unless "
        "'boundary' is 0, which runs 'model' for every step.",
    )


def size_inputs(task: Task, *, when: str = "") -> list[io.Input]:
    """Width, height and length in pixels and frames."""
    return [*pixel_inputs(task, when=when), length_input(task)]


def pixel_inputs(task: Task, *, when: str = "") -> list[io.Input]:
    """Width and height."""
    (width, height), multiple = DEFAULTS[task].sizes[0], LAYOUTS[task].multiple
    source = f"Default {width} x {height}: the published one ({SIZE_SOURCES[task]})."
    cost = "Time grows faster than the pixel count, because attention compares all pairs of tokens."
    common = {"min": multiple, "max": MAX_SIZE, "step": multiple}
    return [
        io.Int.Input(
            "width", default=width, **common, tooltip=f"Pixels, a multiple of {multiple}. {when}{source} {cost}"
        ),
        io.Int.Input("height", default=height, **common, tooltip=f"Pixels, a multiple of {multiple}. {when}{source}"),
    ]


def length_input(task: Task) -> io.Input:
    """Frames of the video."""
    defaults = DEFAULTS[task]
    return io.Int.Input(
        "length",
        default=defaults.frames,
        min=1,
        max=MAX_FRAMES,
        step=4,
        tooltip=f"Frames, 4n + 1 (1, 5, 9, ... 81, ...). Default {defaults.frames}: the published one "
        f"({FRAME_SOURCES[task]}), {(defaults.frames - 1) / defaults.fps:g} s at {defaults.fps} frames per second. "
        "Models drift when asked for much more than they were trained on.",
    )


def schedule_inputs(task: Task) -> list[io.Input]:
    """Seed, steps, shift, guidance, expert switch, solver, scheduler and noise."""
    defaults, source = DEFAULTS[task], CONFIG_FILES[task]
    low, high = defaults.guidance
    two_experts = defaults.boundary is not None
    inputs: list[io.Input] = [
        seed_input(),
        io.Int.Input(
            "steps",
            default=defaults.steps,
            min=1,
            max=1000,
            tooltip="Model evaluations (each one twice unless guidance is 1); time is proportional. Default "
            f"{defaults.steps}: the published one ({source}). 20 is a common draft; distilled LoRAs use 4 with euler, "
            "shift 5 and guidance 1.",
        ),
        io.Float.Input(
            "shift",
            default=defaults.shift,
            min=0.01,
            max=100.0,
            step=0.01,
            round=0.001,
            tooltip=f"Spends more steps at high noise when larger. Default {defaults.shift:g}: the published one "
            f"({source})"
            + (", which advises 3 at 480p. " if task is Task.I2V else ". ")
            + "Replaces the shift of any node before this one. Free.",
        ),
        io.Float.Input(
            "guidance",
            default=high,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="How far to move from the negative towards the positive prompt"
            + (", for the steps of the high-noise expert" if two_experts else "")
            + f". Default {high:g}: the published one ({source}"
            + ("; the second of its pair)" if two_experts else ")")
            + ". At 1 the negative prompt is not evaluated and a step takes half the time; use that with distilled "
            "LoRAs.",
        ),
    ]
    if two_experts:
        inputs += [
            io.Float.Input(
                "guidance_low",
                default=low,
                min=0.0,
                max=100.0,
                step=0.1,
                round=0.01,
                tooltip=f"The same for the steps of the low-noise expert. Default {low:g}: the published one "
                f"({source}; the first of its pair). 1 halves the time of those steps.",
            ),
            io.Float.Input(
                "boundary",
                default=defaults.boundary,
                min=0.0,
                max=1.0,
                step=0.005,
                round=0.001,
                tooltip="Noise level at which the low-noise expert takes over: the high-noise expert runs while the "
                f"timestep is at least 1000 times this. Default {defaults.boundary:g}: the published one ({source}), "
                f"which is {HIGH_NOISE_STEPS[task]} of {defaults.steps} steps at the default shift. 0 runs one model "
                "throughout.",
            ),
        ]
    return [*inputs, *solver_inputs()]


HIGH_NOISE_STEPS = {Task.T2V: 26, Task.I2V: 15}
"""Steps of the high-noise expert at the published defaults; a test computes them."""


def seed_input() -> io.Input:
    """Where the starting noise comes from."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=MAX_SEED,
        control_after_generate=True,
        tooltip="Seed of the starting noise. The same seed and settings give the same latents. Default 0.",
    )


def solver_inputs() -> list[io.Input]:
    """How the steps are integrated, at which noise levels, from which noise."""
    return [
        io.Combo.Input(
            "solver",
            options=bridge.sampler_names(),
            default="unipc",
            tooltip="How the steps are integrated. Default unipc: the published one (--sample_solver of generate.py), "
            "of second order with a corrector; dpm++ is its published alternative; euler is for distilled 4-step "
            "LoRAs. The other names are core's samplers; core's uni_pc is another method than unipc. A solver's "
            "history carries across the expert switch. All cost one model evaluation a step, but for heun, dpm_2 and "
            "their like, which cost two.",
        ),
        io.Combo.Input(
            "scheduler",
            options=scheduler_names(),
            default=OFFICIAL_SCHEDULE,
            tooltip="Noise levels of the steps. Default official: the published grid of the chosen solver, with "
            "whole-number timesteps as the model was trained on (core's samplers get the grid of euler). The other "
            "names are core's schedulers, with fractional timesteps as core gives them; euler with simple equals "
            "core's KSampler. Free.",
        ),
        io.Combo.Input(
            "noise",
            options=[NOISE_CPU, NOISE_CUDA],
            default=NOISE_CPU,
            tooltip="Which generator draws the starting noise. Default cpu: as core does, the same on every machine. "
            "The other one draws on the GPU as the published code does, so that its seeds give its videos; it needs "
            "an NVIDIA GPU. Free.",
        ),
    ]
