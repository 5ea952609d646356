"""The parts of a checkpoint folder: official, Diffusers, or the bare shards of one transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from ..models.specs import Task
from .naming import EXPERTS, HIGH_NOISE, LOW_NOISE
from .reader import read_json

EXPERT_FOLDERS = {HIGH_NOISE: "high_noise_model", LOW_NOISE: "low_noise_model"}
VAE_OF_TASK = {Task.T2V: "2.1", Task.I2V: "2.1", Task.TI2V: "2.2", Task.ANIMATE: "2.1", Task.S2V: "2.1"}
_TASK_OF_CLASS = {
    "WanAnimateModel": Task.ANIMATE,
    "WanAnimateTransformer3DModel": Task.ANIMATE,
    "WanModel_S2V": Task.S2V,
}
"""Models whose channels are those of others, by the class that their ``config.json`` names."""
TOKENIZER = Path("google") / "umt5-xxl"


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """Where the parts of one checkpoint are. Paths are found, not yet opened."""

    path: Path
    layout: str
    """``official``, ``diffusers`` or ``transformer`` (shards alone)."""
    transformers: Mapping[str | None, Path]
    """By expert: ``high_noise`` and ``low_noise``, or None alone for a one-expert model."""
    task: Task | None = None
    """From the folder's configuration; None where that does not say. The tensors have the last word."""
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    vae: Path | None = None
    clip_vision: Path | None = None
    """Of Animate-14B."""
    audio_encoder: Path | None = None
    """Of S2V-14B."""
    boundary: float | None = None
    """Share of the noise range (0..1) above which the high-noise expert works, where the folder says so."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """``config.json`` of the (first) transformer."""
    model_index: Mapping[str, Any] = field(default_factory=dict)

    def transformer(self, expert: str | None) -> Path:
        """The transformer of ``expert``; InputError listing the choices when it does not fit the folder."""
        if expert in self.transformers:
            return self.transformers[expert]
        if None in self.transformers:
            raise InputError(f"{self.path.name} has one transformer, no {expert!r} expert; leave expert at None")
        choices = " or ".join(repr(name) for name in EXPERTS)
        raise InputError(f"{self.path.name} has two experts; expert must be {choices}, got {expert!r}")

    def require_text_encoder(self) -> Path:
        """The text encoder's file or folder; CheckpointError when the checkpoint came without."""
        if self.text_encoder is None:
            wanted = "text_encoder/" if self.layout == "diffusers" else "models_t5_umt5-xxl-enc-bf16.pth"
            raise CheckpointError(
                f"{self.path.name} has no text encoder: {wanted} is missing; download it into the folder"
            )
        return self.text_encoder

    def require_vae(self) -> Path:
        """The VAE's file or folder; CheckpointError when it is missing or there is only one of another model."""
        if self.vae is not None:
            return self.vae
        if self.layout == "diffusers":
            raise CheckpointError(f"{self.path.name} has no vae/ with weights; download it into the folder")
        wanted = VAE_OF_TASK.get(self.task, "2.1") if self.task else "2.1"
        other = next((path.name for path in _vae_files(self.path) if wanted not in path.name), None)
        instead = f" and {other} is the VAE of other models" if other else ""
        raise CheckpointError(
            f"{self.path.name} has no Wan{wanted}_VAE.pth{instead}; download Wan{wanted}_VAE.pth into the folder"
        )


def resolve_folder(path: str | Path) -> CheckpointFolder:
    """Find the parts of the checkpoint in ``path``.

    Raises:
        CheckpointError: no checkpoint, another model's, or one of two experts missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; check the name")
    if (folder / "model_index.json").is_file():
        return _diffusers(folder)
    if any((folder / name).is_dir() for name in EXPERT_FOLDERS.values()):
        return _official_pair(folder)
    if has_weights(folder):
        return _single(folder)
    here = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
    raise CheckpointError(
        f"{folder.name} is no checkpoint folder (it holds {here}): an official one has high_noise_model/ and "
        "low_noise_model/ or diffusion_pytorch_model*.safetensors, a Diffusers one has model_index.json"
    )


def has_weights(folder: Path) -> bool:
    """Whether ``folder`` itself holds the weights of a transformer or encoder."""
    patterns = ("diffusion_pytorch_model*.safetensors*", "model*.safetensors*")
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _official_pair(folder: Path) -> CheckpointFolder:
    found = {expert: folder / name for expert, name in EXPERT_FOLDERS.items() if (folder / name).is_dir()}
    config = _config(next(iter(found.values())))
    task = config_task(config)
    if len(found) == 1:
        ((expert, present),) = found.items()
        absent = EXPERT_FOLDERS[LOW_NOISE if expert == HIGH_NOISE else HIGH_NOISE]
        model = f"{task.upper()}-A14B" if task else "this model"
        raise CheckpointError(
            f"{folder.name} has {present.name}/ but no {absent}/: {model} needs both experts; "
            f"download {absent}/ as well"
        )
    return _official(folder, found, config, task)


def _single(folder: Path) -> CheckpointFolder:
    config = _config(folder)
    return _official(folder, {None: folder}, config, config_task(config))


def _official(
    folder: Path, transformers: Mapping[Any, Path], config: dict[str, Any], task: Task | None
) -> CheckpointFolder:
    text_encoder = next(_files(folder, "models_t5*", (".pth", ".safetensors")), None)
    wanted = VAE_OF_TASK[task] if task else None
    vae = next((path for path in _vae_files(folder) if wanted is None or f"Wan{wanted}" in path.name), None)
    beside = text_encoder is not None or vae is not None or len(transformers) > 1
    return CheckpointFolder(
        path=folder,
        layout="official" if beside else "transformer",
        transformers=transformers,
        task=task,
        text_encoder=text_encoder,
        tokenizer=folder / TOKENIZER if (folder / TOKENIZER).is_dir() else None,
        vae=vae,
        clip_vision=next(_files(folder, "models_clip*", (".pth", ".safetensors")), None),
        audio_encoder=next((path for path in sorted(folder.glob("wav2vec2*")) if path.is_dir()), None),
        config=config,
    )


def _vae_files(folder: Path) -> Iterator[Path]:
    return _files(folder, "Wan2.[0-9]_VAE*", (".pth", ".safetensors"))


def _files(folder: Path, pattern: str, suffixes: tuple[str, ...]) -> Iterator[Path]:
    return (path for path in sorted(folder.glob(pattern)) if path.suffix in suffixes and path.is_file())


def _diffusers(folder: Path) -> CheckpointFolder:
    index = read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or not pipeline.startswith("Wan"):
        raise CheckpointError(
            f"{folder.name} is a Diffusers folder of {pipeline}; this loader takes WanPipeline, "
            "WanImageToVideoPipeline and WanAnimatePipeline folders"
        )
    boundary = index.get("boundary_ratio")
    boundary = float(boundary) if isinstance(boundary, int | float) else None
    named = [name for name in ("transformer", "transformer_2") if _component(index, name)]
    if boundary is not None:
        named = ["transformer", "transformer_2"]
    for name in named or ["transformer"]:
        if not ((folder / name).is_dir() and has_weights(folder / name)):
            why = "needs both experts" if len(named) == 2 else "has no weights without it"
            raise CheckpointError(f"{folder.name} has no {name}/ with weights: {pipeline} {why}; download {name}/")
    two = len(named) == 2
    config = _config(folder / "transformer")
    return CheckpointFolder(
        path=folder,
        layout="diffusers",
        transformers={HIGH_NOISE: folder / "transformer", LOW_NOISE: folder / "transformer_2"}
        if two
        else {None: folder / "transformer"},
        task=config_task(config),
        text_encoder=_part(folder / "text_encoder"),
        tokenizer=folder / "tokenizer" if (folder / "tokenizer").is_dir() else None,
        vae=_part(folder / "vae"),
        clip_vision=_part(folder / "image_encoder"),
        boundary=boundary,
        config=config,
        model_index=index,
    )


def _component(index: Mapping[str, Any], name: str) -> bool:
    """A component that is listed and not ``[null, null]``."""
    entry = index.get(name)
    return isinstance(entry, list) and any(item is not None for item in entry)


def _part(folder: Path) -> Path | None:
    return folder if folder.is_dir() and has_weights(folder) else None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def config_task(config: Mapping[str, Any]) -> Task | None:
    """The task that a transformer's ``config.json`` names: by its class, or by its channels, as in the tensors."""
    by_class = _TASK_OF_CLASS.get(str(config.get("_class_name")))
    if by_class is not None:
        return by_class
    inputs = config.get("in_dim", config.get("in_channels"))
    outputs = config.get("out_dim", config.get("out_channels"))
    if not (isinstance(inputs, int) and isinstance(outputs, int)):
        return None
    return {(16, 16): Task.T2V, (36, 16): Task.I2V, (48, 48): Task.TI2V}.get((inputs, outputs))
