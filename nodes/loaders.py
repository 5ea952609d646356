"""Load a Wan2.2 checkpoint: transformers as core MODELs, text encoder and VAE at first use."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ..wan_fp8.checkpoint.detect import Detected, detect, require_expert_pair
from ..wan_fp8.checkpoint.encoders import load_vae_state_dict, require_vae_version
from ..wan_fp8.checkpoint.folder import VAE_OF_TASK, CheckpointFolder
from ..wan_fp8.checkpoint.load import build_from, open_transformer
from ..wan_fp8.checkpoint.naming import EXPERTS
from ..wan_fp8.checkpoint.reader import open_source
from ..wan_fp8.checkpoint.senses import audio_encoder_file, load_clip_vision_state_dict
from ..wan_fp8.checkpoint.signatures import Kind
from ..wan_fp8.checkpoint.tensors import TensorSource
from ..wan_fp8.errors import CheckpointError
from ..wan_fp8.models.specs import ModelSpec, Task
from ..wan_fp8.models.text_encoder import load_text_encoder
from ..wan_fp8.models.tokenizer import find_tokenizer
from ..wan_fp8.parallel.source import ModelSource, TextSource
from . import bridge
from .audio import AudioEncoderHandle
from .choices import check_choice
from .encoder import TextEncoderHandle
from .missing import Missing
from .notices import node_id, notice
from .schema import LOADING, TextEncoderSocket, node_schema
from .sources import (
    AUTO,
    FROM_CHECKPOINT,
    NONE,
    NOTHING_FOUND,
    Selection,
    checkpoint_names,
    file_path,
    fingerprint,
    select,
    stamp,
)

AUTO_DTYPE = "auto"
AS_STORED = "as stored"
WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    AS_STORED: None,
}
TEXT_DTYPES = {
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
MODEL_FOLDERS = {"text_encoder": "text_encoders", "vae": "vae"}
"""ComfyUI's folder by box."""
VAE_DTYPES = {AUTO_DTYPE: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WanFP8LoadCheckpoint(io.ComfyNode):
    """One node for every layout that Wan2.2 comes in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8LoadCheckpoint",
            display_name="Load Wan2.2 Checkpoint",
            category=LOADING,
            description="Loads Wan2.2 T2V-A14B, I2V-A14B, TI2V-5B, Animate-14B or S2V-14B from an official or "
            "Diffusers folder in models/wan, or from single files (bf16, fp16, fp8) in models/diffusion_models. What a "
            "file is, is seen from its tensors and checked before memory is taken. Encoders and VAE are read when "
            "first used.",
            search_aliases=["wan2.2", "wan loader", "load diffusion model", "unet loader"],
            inputs=_inputs(),
            outputs=[
                io.Model.Output(display_name="model", tooltip="The high-noise expert, or a checkpoint's only model."),
                io.Model.Output(display_name="model_low", tooltip="The low-noise expert; else the same model."),
                TextEncoderSocket.Output(display_name="text_encoder", tooltip="For Encode Wan2.2 Prompt."),
                io.Vae.Output(display_name="vae", tooltip="For core's VAE Decode and VAE Encode."),
                io.ClipVision.Output(
                    display_name="clip_vision",
                    tooltip="Of an Animate-14B folder, for its sampler or CLIP Vision Encode.",
                ),
                io.AudioEncoder.Output(
                    display_name="audio_encoder", tooltip="Of an S2V-14B folder, for its sampler or AudioEncoderEncode."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        checkpoint: str | None = None,
        low_noise: str | None = None,
        text_encoder: str | None = None,
        vae: str | None = None,
        **settings: Any,
    ) -> str:
        return fingerprint(checkpoint, low_noise, text_encoder, vae)

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        low_noise: str,
        text_encoder: str,
        vae: str,
        weight_dtype: str,
        text_encoder_dtype: str,
        vae_dtype: str,
    ) -> io.NodeOutput:
        stored = _choice("weight_dtype", weight_dtype, {AUTO_DTYPE: torch.bfloat16, **WEIGHT_DTYPES})
        encoder_dtype = _choice("text_encoder_dtype", text_encoder_dtype, TEXT_DTYPES)
        computed = _choice("vae_dtype", vae_dtype, VAE_DTYPES)
        chosen = select(checkpoint, low_noise)
        with ExitStack() as opened:
            found = _open_experts(chosen, checkpoint, opened)
            spec = found[0][1].require_transformer(checkpoint)
            encoder = _text_encoder(chosen, checkpoint, text_encoder, encoder_dtype, spec)
            decoder = _vae(chosen, checkpoint, vae, computed, spec)
            senses = [_clip_vision(chosen, checkpoint, spec), _audio_encoder(chosen, checkpoint, spec)]
            auto = weight_dtype == AUTO_DTYPE
            nets = [build_from(source, what, dtype=stored, keep_fp8=auto) for source, what in found]
            lines = _report(found)
        if chosen.folder is not None:  # here too, for the one who would find out after sampling
            needed = [encoder, decoder, *(s for s, task in zip(senses, SENSES, strict=True) if task is spec.task)]
            lines += [part.reason for part in needed if isinstance(part, Missing)]
        # A pair has its roles from the boxes; one alone, from its name.
        experts: Sequence[str | None] = EXPERTS if len(found) == 2 else [what.expert for _, what in found]
        places = [place for place in (chosen.high, chosen.low) if place is not None]
        sources = [ModelSource.of(*place, dtype=stored, keep_fp8=auto) for place in places]
        models = [
            bridge.build_model_patcher(net, expert, source)
            for net, expert, source in zip(nets, experts, sources, strict=True)
        ]
        low = _low_output(models, spec, checkpoint)
        return io.NodeOutput(models[0], low, encoder, decoder, *senses, ui=notice(node_id(cls), lines))


def _inputs() -> list[io.Input]:
    names = checkpoint_names()
    return [
        io.Combo.Input(
            "checkpoint",
            options=names or [NOTHING_FOUND],
            tooltip="A checkpoint folder in models/wan (official or Diffusers), or a file in models/diffusion_models. "
            "Default: the first one found. GGUF, LoRA and files of other models are refused by name.",
        ),
        io.Combo.Input(
            "low_noise",
            options=[AUTO, NONE, *names],
            default=AUTO,
            tooltip="The low-noise expert of T2V-A14B and I2V-A14B. Default auto: from the same folder, or the file "
            "whose name differs only in 'low' for 'high'. none loads 'checkpoint' alone, which halves host memory. "
            "TI2V-5B, Animate-14B and S2V-14B have one model: leave it at auto.",
        ),
        io.Combo.Input(
            "text_encoder",
            options=[FROM_CHECKPOINT, *folder_paths.get_filename_list("text_encoders")],
            default=FROM_CHECKPOINT,
            tooltip="UMT5-XXL. Default from checkpoint: the one in the folder. For a single file choose one in "
            "models/text_encoders (bf16, fp16, scaled fp8). It is read when the first prompt is encoded.",
        ),
        io.Combo.Input(
            "vae",
            options=[FROM_CHECKPOINT, *folder_paths.get_filename_list("vae")],
            default=FROM_CHECKPOINT,
            tooltip="Wan 2.1 VAE, for TI2V-5B the Wan 2.2 VAE. Default from checkpoint: the one in the folder. For a "
            "single file choose one in models/vae. It is read when first used.",
        ),
        io.Combo.Input(
            "weight_dtype",
            options=[AUTO_DTYPE, *WEIGHT_DTYPES],
            default=AUTO_DTYPE,
            tooltip="How the transformers are kept in memory. Default auto: fp8 layers stay fp8, all else becomes "
            "bf16, which is what the published code computes in. bf16: 28.6 GB for each 14B expert, 10 GB for the 5B "
            "model; an fp8 file becomes twice as large. fp32 is for comparisons. 'as stored' converts nothing "
            "(published A14B and 5B files are fp32).",
        ),
        io.Combo.Input(
            "text_encoder_dtype",
            options=list(TEXT_DTYPES),
            default="bf16",
            tooltip="How the text encoder is kept. Default bf16: the published one (wan/configs/shared_config.py), "
            "11.4 GB. fp8 takes 6.7 GB and moves the rows slightly; fp32 is for comparisons.",
        ),
        io.Combo.Input(
            "vae_dtype",
            options=list(VAE_DTYPES),
            default=AUTO_DTYPE,
            tooltip="What the VAE computes in. Default auto: ComfyUI's choice for this GPU, usually bf16. fp32 is "
            "what the published code uses, at twice the memory.",
        ),
    ]


def _choice(box: str, name: str, choices: dict[str, Any]) -> Any:
    check_choice(box, name, choices)
    return choices[name]


def _open_experts(chosen: Selection, name: str, opened: ExitStack) -> list[tuple[TensorSource, Detected]]:
    """Open and recognise the one or two transformers; no weight is read.

    Raises:
        CheckpointError: another model's file, an expert missing, or two that do not belong together.
    """
    high = _open(*chosen.high, opened)
    if chosen.low is None:
        if not chosen.alone and _task(high).two_experts:
            raise CheckpointError(
                f"{name} is {high[1].label}, one of two experts, and no other file is named like it with 'low' for "
                f"'high': choose the other expert under 'low_noise', or '{NONE}' to load this one alone"
            )
        return [high]
    if not _task(high).two_experts:
        raise CheckpointError(f"{name} is {high[1].label}, which has one model: set low_noise to '{AUTO}'")
    low = _open(*chosen.low, opened)
    require_expert_pair(high[1], low[1], high[0].label)
    return [high, low]


def _open(path: Path, expert: str | None, opened: ExitStack) -> tuple[TensorSource, Detected]:
    source, what = open_transformer(path, expert)
    opened.callback(source.close)
    return source, what


def _task(found: tuple[TensorSource, Detected]) -> Task:
    return found[1].require_transformer(found[0].label).task


def _low_output(models: list[Any], spec: ModelSpec, name: str) -> Any:
    if len(models) == 2 or not spec.task.two_experts:
        return models[-1]
    return Missing(
        f"the low-noise expert of {name} was not loaded because 'low_noise' is '{NONE}': choose it there, or leave "
        "this output unconnected"
    )


def _text_encoder(chosen: Selection, name: str, choice: str, dtype: torch.dtype, spec: ModelSpec) -> Any:
    """A text encoder that will be read later; what it is, is checked now.

    Raises:
        CheckpointError: the file is something else, or another model's.
    """
    if choice != FROM_CHECKPOINT:
        path = file_path("text_encoders", choice)
    elif chosen.folder is None or chosen.folder.text_encoder is None:
        return Missing(_no_part(chosen.folder, name, "text encoder", "text_encoder"))
    else:
        path = chosen.folder.text_encoder
    with open_source(path) as source:
        what = detect(source, path)
        if what.kind is not Kind.TEXT_ENCODER:
            raise CheckpointError(f"{path.name} is {what.label}: choose a UMT5-XXL file under 'text_encoder'")
        tables = ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight")
        has_tokenizer = any(key.endswith("spiece_model") for key in source)
        width = next(source.info(table).shape[1] for table in tables if table in source)
    if width != spec.text_dim:
        raise CheckpointError(
            f"{path.name} makes text rows of width {width} and {name} takes {spec.text_dim}: choose the text encoder "
            "of this checkpoint"
        )
    beside = find_tokenizer(path)
    tokenizer = None if chosen.folder is None else chosen.folder.tokenizer
    if choice != FROM_CHECKPOINT and (has_tokenizer or beside is not None):
        tokenizer = None  # a file's own tokenizer comes before the checkpoint's
    used = tokenizer or beside
    return TextEncoderHandle(
        load=lambda: load_text_encoder(path, dtype=dtype, device="cpu", tokenizer=tokenizer),
        identity=(stamp(path), dtype, None if used is None else stamp(used)),
        name=path.name,
        source=TextSource.of(path, dtype, tokenizer),
    )


def _vae(chosen: Selection, name: str, choice: str, dtype: torch.dtype | None, spec: ModelSpec) -> Any:
    """A VAE that will be read later; that it is the one of this model is checked now.

    Raises:
        CheckpointError: the file is something else, or another model's.
    """
    if choice != FROM_CHECKPOINT:
        path = file_path("vae", choice)
    elif chosen.folder is None or chosen.folder.vae is None:
        return Missing(_no_part(chosen.folder, name, "VAE", "vae"))
    else:
        path = chosen.folder.vae
    with open_source(path) as source:
        what = detect(source, path)
    if what.kind is not Kind.VAE or what.version is None:
        raise CheckpointError(f"{path.name} is {what.label}: choose the Wan VAE under 'vae'")
    require_vae_version(path.name, what.version, VAE_OF_TASK[spec.task])
    return bridge.lazy_vae(lambda: load_vae_state_dict(path).state_dict, dtype=dtype, path=path, version=what.version)


SENSES = (Task.ANIMATE, Task.S2V)
"""The task that has a CLIP vision encoder, and the one that has an audio encoder."""


def _clip_vision(chosen: Selection, name: str, spec: ModelSpec) -> Any:
    """The CLIP vision encoder of an Animate checkpoint, to be read later; what it is, is checked now."""
    if spec.task is not Task.ANIMATE:
        return Missing(
            f"{name} is a {spec.task.upper()} checkpoint, which has no CLIP vision encoder: "
            "disconnect this output, or load Animate-14B"
        )
    path = None if chosen.folder is None else chosen.folder.clip_vision
    if path is None:
        return Missing(
            f"{name} comes without a CLIP vision encoder: put clip_vision_h.safetensors into models/clip_vision and "
            "load it with core's Load CLIP Vision, or models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth into the "
            "checkpoint's folder"
        )
    _check_kind(path, Kind.CLIP_VISION, "a CLIP vision encoder")
    return bridge.lazy_clip_vision(lambda: load_clip_vision_state_dict(path))


def _audio_encoder(chosen: Selection, name: str, spec: ModelSpec) -> Any:
    """The audio encoder of an S2V checkpoint, to be read later; what it is, is checked now."""
    if spec.task is not Task.S2V:
        return Missing(
            f"{name} is a {spec.task.upper()} checkpoint, which has no audio encoder: disconnect this "
            "output, or load S2V-14B"
        )
    path = None if chosen.folder is None else chosen.folder.audio_encoder
    if path is None:
        return Missing(
            f"{name} comes without an audio encoder: put one into models/audio_encoders and load it with core's "
            "AudioEncoderLoader, or the folder wav2vec2-large-xlsr-53-english into the checkpoint's"
        )
    path = audio_encoder_file(path)
    _check_kind(path, Kind.AUDIO_ENCODER, "a wav2vec2 audio encoder")
    return AudioEncoderHandle(path)


def _check_kind(path: Path, kind: Kind, wanted: str) -> None:
    with open_source(path) as source:
        what = detect(source, path)
    if what.kind is not kind:
        raise CheckpointError(f"{path.name} is {what.label}, and should be {wanted}: download it again")


def _no_part(folder: CheckpointFolder | None, name: str, part: str, box: str) -> str:
    """Why a part is missing and where to get it."""
    place = MODEL_FOLDERS[box]
    if folder is None:
        return f"{name} is a single file without a {part}: put one into models/{place} and choose it under '{box}'"
    try:
        folder.require_vae() if box == "vae" else folder.require_text_encoder()
    except CheckpointError as error:
        return f"{error}, or put one into models/{place} and choose it under '{box}'"
    raise AssertionError(f"{name} has a {part}")


def _report(found: list[tuple[TensorSource, Detected]]) -> list[str]:
    lines = [f"{source.label}: {what.label}, stored as {what.storage}" for source, what in found]
    return lines + [detail for _, what in found[:1] for detail in what.details]
