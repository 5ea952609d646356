"""Inputs of the quality receipt. Order is part of the contract: new ones go last."""

from __future__ import annotations

from comfy_api.latest import io

from .sampler_inputs import seed_input, solver_inputs

AS_LOADED, FLOAT32 = "as loaded", "float32"
REFERENCES = (AS_LOADED, FLOAT32)


def receipt_inputs() -> list[io.Input]:
    """MODEL and text, the latents, what a sampler has, and what to compare with."""
    return [
        io.Model.Input(
            "model",
            tooltip="The MODEL under test, with its FP8 recipe, attention, cache, compilation and LoRAs: the link that "
            "would go into a sampler. Wan2.2 T2V, I2V or TI2V. Two-expert checkpoints: the high-noise expert.",
        ),
        io.Conditioning.Input("positive", tooltip="What the video shows; for I2V after core's WanImageToVideo."),
        io.Conditioning.Input("negative", tooltip="What to steer away from; for I2V after core's WanImageToVideo."),
        io.Latent.Input(
            "latent",
            tooltip="Empty latents of one video: core's EmptyHunyuanLatentVideo (T2V), WanImageToVideo (I2V) or "
            "Wan22ImageToVideoLatent (TI2V). Small ones answer sooner, and say less about large ones.",
        ),
        seed_input(),
        _number("steps", "Sampling steps of both runs.", top=1000),
        _number("shift", "Shift of the schedule.", top=100.0),
        _number("guidance", "Guidance, for two experts that of the high-noise one.", top=100.0),
        _number("guidance_low", "Guidance of the low-noise expert; not used by a model with one transformer.", 100.0),
        io.Float.Input(
            "boundary",
            default=-1.0,
            min=-1.0,
            max=1.0,
            step=0.005,
            round=0.001,
            tooltip="Noise level at which the low-noise expert takes over. Default -1: the published one of the task. "
            "0 runs 'model' throughout, and 'reference' likewise. Free.",
        ),
        *solver_inputs(),
        io.Combo.Input(
            "reference_precision",
            options=list(REFERENCES),
            default=AS_LOADED,
            tooltip="What the reference computes in. Default as loaded: what its MODEL has, usually bf16, so that the "
            "receipt shows what the settings alone do. float32: no TF32, weights cast as they are used; the receipt "
            "then counts bf16's own error as well, and the reference takes several times as long.",
        ),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="VAE of this checkpoint: decodes both results for PSNR and SSIM of frames and for the strip. "
            "Without it latents alone are compared. Costs two decodes.",
        ),
        io.Model.Input(
            "model_low",
            optional=True,
            tooltip="The low-noise expert under test. Needed for T2V and I2V unless 'boundary' is 0.",
        ),
        io.Model.Input(
            "reference",
            optional=True,
            tooltip="What to compare with, sampled as it comes: the same MODEL from before the settings nodes, or any "
            "other of the task. Unconnected: 'model' without recipe, with exact attention, no cache, nothing compiled; "
            "LoRAs stay.",
        ),
        io.Model.Input("reference_low", optional=True, tooltip="The low-noise expert of 'reference'; both or neither."),
    ]


def _number(name: str, what: str, top: float) -> io.Input:
    kind, step = (io.Int, {"step": 1}) if isinstance(top, int) else (io.Float, {"step": 0.1, "round": 0.001})
    zero = type(top)(0)
    cost = " Time of both runs is proportional." if name == "steps" else " Free."
    return kind.Input(
        name, default=zero, min=zero, max=top, **step, tooltip=f"{what} Default 0: the published one of the task.{cost}"
    )
