"""The three ways in which Wan2.2 checkpoints lie on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import extended, senses, text, transformer, vae
from .weights import random_weights

EXPERTS = ("high_noise", "low_noise")
BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}
MODEL_NAMES = {
    "t2v": "t2v_{expert}_14B",
    "i2v": "i2v_{expert}_14B",
    "ti2v": "ti2v_5B",
    "animate": "animate_14B",
    "s2v": "s2v_14B",
}
PIPELINES = {"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline", "ti2v": "WanPipeline"}
FLOW_SHIFT = {"t2v": 12.0, "i2v": 5.0, "ti2v": 5.0}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The parts of one checkpoint, made on demand."""

    task: str
    seed: int
    dtype: torch.dtype
    """Of the transformers. The text encoder is bf16 and the VAE fp32, as published."""
    fp8: str | None = None

    @property
    def size(self) -> transformer.TransformerSize:
        """Of the task's transformers."""
        return transformer.SIZES[self.task]

    @property
    def experts(self) -> tuple[str, ...]:
        """High noise first; all but the first two tasks have one transformer."""
        return EXPERTS if self.task in BOUNDARIES else ("",)

    @property
    def vae_size(self) -> vae.VaeSize:
        """2.2 for TI2V-5B, else 2.1."""
        return vae.VAE_22 if self.task == "ti2v" else vae.VAE_21

    def expert(self, name: str) -> dict[str, Tensor]:
        """One transformer under official names."""
        shapes = transformer.shapes(self.size) | extended.extras(self.task, self.size)
        return random_weights(shapes, seed=self.seed, part=f"dit/{name}", dtype=self.dtype)

    def vae(self) -> dict[str, Tensor]:
        """The VAE under official names."""
        return random_weights(vae.shapes(self.vae_size), seed=self.seed, part="vae", dtype=torch.float32)

    def clip_vision(self) -> dict[str, Tensor]:
        """Animate's CLIP under official names."""
        return random_weights(senses.clip_shapes(), seed=self.seed, part="clip", dtype=torch.float16)

    def audio_encoder(self) -> dict[str, Tensor]:
        """S2V's wav2vec2 under Hugging Face's names, without the attentions' matrices."""
        return random_weights(senses.audio_shapes(), seed=self.seed, part="wav2vec2", dtype=torch.float16)

    def text_encoder(self, rows: int) -> dict[str, Tensor]:
        """UMT5 under official names."""
        return random_weights(text.shapes(rows), seed=self.seed, part="t5", dtype=torch.bfloat16)


def write_official(folder: Path, checkpoint: Checkpoint) -> None:
    """As the published repositories: shards with an index per expert, ``.pth`` files, the tokenizer's folder."""
    for expert in checkpoint.experts:
        target = folder / f"{expert}_model" if expert else folder
        target.mkdir(exist_ok=True)
        name = extended.CLASSES.get(checkpoint.task, "WanModel")
        _write_json(target / "config.json", transformer.config(checkpoint.size, checkpoint.task, name))
        _write_shards(target, checkpoint.expert(expert))
    model = text.train_sentencepiece()
    text.write_tokenizer(folder / "google" / "umt5-xxl", model)
    torch.save(checkpoint.text_encoder(text.vocab_rows(model)), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(checkpoint.vae(), folder / f"Wan{checkpoint.vae_size.version}_VAE.pth")
    if checkpoint.task == "animate":
        torch.save(checkpoint.clip_vision(), folder / senses.CLIP_FILE)
    if checkpoint.task == "s2v":
        (folder / senses.AUDIO_FOLDER).mkdir()
        weights = folder / senses.AUDIO_FOLDER / "model.safetensors"
        senses.write_with_holes(weights, checkpoint.audio_encoder(), senses.audio_zeros())


def write_diffusers(folder: Path, checkpoint: Checkpoint) -> None:
    """As the converted repositories: one folder per component under ``model_index.json``; ``transformer`` is the
    high-noise one."""
    for expert, name in zip(checkpoint.experts, ("transformer", "transformer_2"), strict=False):
        target = folder / name
        target.mkdir()
        _write_json(target / "config.json", transformer.diffusers_config(checkpoint.size))
        _write_shards(target, _renamed(checkpoint.expert(expert), transformer.diffusers_name))
    model = text.train_sentencepiece()
    rows = text.vocab_rows(model)
    text.write_tokenizer(folder / "tokenizer", model)
    (folder / "text_encoder").mkdir()
    _write_json(folder / "text_encoder" / "config.json", text.transformers_config(rows))
    encoder = _renamed(checkpoint.text_encoder(rows), text.transformers_name)
    _save(encoder, folder / "text_encoder" / "model.safetensors")
    size = checkpoint.vae_size
    (folder / "vae").mkdir()
    _write_json(folder / "vae" / "config.json", vae.diffusers_config(size))
    weights = _renamed(checkpoint.vae(), lambda name: vae.diffusers_name(name, size))
    _save(weights, folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config(checkpoint.task))
    _write_json(folder / "model_index.json", _model_index(checkpoint))


def write_comfy(folder: Path, checkpoint: Checkpoint) -> None:
    """As ComfyUI's model folders: single files with official names, FP8 ones on request, the tokenizer inside the
    encoder's file."""
    for name in ("diffusion_models", "text_encoders", "vae"):
        (folder / name).mkdir()
    for expert in checkpoint.experts:
        weights, metadata = checkpoint.expert(expert), None
        if checkpoint.fp8:
            weights, metadata = transformer.to_fp8(weights, checkpoint.fp8)
        stem = MODEL_NAMES[checkpoint.task].format(expert=expert)
        _save(weights, folder / "diffusion_models" / f"wan2.2_{stem}_tiny.safetensors", metadata)
    model = text.train_sentencepiece()
    encoder = _renamed(checkpoint.text_encoder(text.vocab_rows(model)), text.transformers_name)
    encoder["spiece_model"] = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    _save(encoder, folder / "text_encoders" / "umt5_xxl_tiny.safetensors")
    vae_name = {"2.1": "wan_2.1_vae", "2.2": "wan2.2_vae"}[checkpoint.vae_size.version]
    _save(checkpoint.vae(), folder / "vae" / f"{vae_name}.safetensors")


LAYOUTS: dict[str, Callable[[Path, Checkpoint], None]] = {
    "official": write_official,
    "diffusers": write_diffusers,
    "comfy": write_comfy,
}


def _renamed(weights: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    result = {rename(name): tensor for name, tensor in weights.items()}
    assert len(result) == len(weights), "two tensors share a name"
    return result


def _write_shards(folder: Path, weights: Mapping[str, Tensor], count: int = 2) -> None:
    """``count`` files of about the same size, and the index that says which tensor is where."""
    total = sum(t.numel() * t.element_size() for t in weights.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    done = 0
    for name, tensor in weights.items():
        shards[min(done * count // total, count - 1)][name] = tensor
        done += tensor.numel() * tensor.element_size()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{count:05d}.safetensors"
        _save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def _save(weights: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    save_file(weights, path, metadata={"format": "pt", **(metadata or {})})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _scheduler_config(task: str) -> dict[str, Any]:
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": "0.35.0",
        "flow_shift": FLOW_SHIFT[task],
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    }


def _model_index(checkpoint: Checkpoint) -> dict[str, Any]:
    two = len(checkpoint.experts) == 2
    index: dict[str, Any] = {
        "_class_name": PIPELINES[checkpoint.task],
        "_diffusers_version": "0.35.0",
        "boundary_ratio": BOUNDARIES.get(checkpoint.task),
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if two else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if checkpoint.task == "ti2v":
        index["expand_timesteps"] = True
    if checkpoint.task == "i2v":
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    return index
