"""Weights of the models beside the transformer: text encoder (under Hugging Face's names) and VAE (official names)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError
from .detect import Detected, Layout, detect
from .folder import EXPERT_FOLDERS, CheckpointFolder, resolve_folder
from .header import sniff
from .key_maps import T5, VAE_21, VAE_22, NameMap
from .quantized import read_scale
from .reader import open_source
from .signatures import Kind
from .tensors import FP8_DTYPES, TensorSource

SPIECE = "spiece_model"
_ALIAS = "encoder.embed_tokens.weight"
_HEADS = ("decoder.", "lm_head.")
"""Parts of a whole UMT5 that the encoder does not need."""
_LINEAR = re.compile(r"\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi_0|wi_1|wo))\.weight$")
"""Matrices that may stay FP8; the position and token tables are looked up, not multiplied."""


class TextEncoderState(NamedTuple):
    """A UMT5 encoder's weights."""

    state_dict: dict[str, Tensor]
    """Names of transformers' ``UMT5EncoderModel``; ``shared.weight`` without its alias ``encoder.embed_tokens``."""
    spiece_model: bytes | None
    """The SentencePiece model, where the file carries one."""


class VAEState(NamedTuple):
    """A Wan VAE's weights."""

    state_dict: dict[str, Tensor]
    """Official names."""
    version: str
    """``2.1`` or ``2.2``."""


def load_text_encoder_state_dict(
    source: str | Path,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str = "cpu",
    *,
    map_files: bool = True,
) -> TextEncoderState:
    """Stream a UMT5 encoder from the official .pth, a .safetensors under either scheme, or a Hugging Face folder.

    Args:
        source: file, folder of shards, or the checkpoint folder that it is a part of.
        dtype: type of every weight, FP8 dequantised; None keeps what is stored, with ``<module>.weight_scale`` beside
            each FP8 matrix (other FP8 tensors become bf16).
        device: where the weights go.
        map_files: see ``load_transformer``.
    Raises:
        CheckpointError: damaged, or not a UMT5 encoder; the message says what it is.
    """
    with _opened(source, CheckpointFolder.require_text_encoder, map_files) as opened:
        detected = detect(opened, source)
        if detected.kind is not Kind.TEXT_ENCODER:
            raise _mistaken(opened.label, detected, "a UMT5 text encoder (models_t5_umt5-xxl-enc-bf16.pth, umt5_xxl_*)")
        names = _hf_names(opened, detected)
        state = _read_all(opened, detected, names, dtype, device)
        spiece = bytes(opened.read(SPIECE).flatten().tolist()) if SPIECE in opened else None
    return TextEncoderState(state, spiece)


def load_vae_state_dict(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    expected: str | None = None,
    map_files: bool = True,
) -> VAEState:
    """Read a Wan VAE: official .pth or .safetensors, ComfyUI's repackaged file, a Diffusers file or folder.

    Args:
        source: file, folder, or the checkpoint folder that it is a part of.
        dtype: type of every weight; None keeps what is stored.
        device: where the weights go.
        expected: ``2.1`` (T2V-A14B, I2V-A14B) or ``2.2`` (TI2V-5B) where the model is known; the other one is refused.
        map_files: see ``load_transformer``.
    Raises:
        CheckpointError: damaged, not a Wan VAE, or the one of another model.
    """
    with _opened(source, CheckpointFolder.require_vae, map_files) as opened:
        detected = detect(opened, source)
        if detected.kind is not Kind.VAE or detected.version is None:
            raise _mistaken(opened.label, detected, "a Wan VAE (Wan2.1_VAE.pth or Wan2.2_VAE.pth)")
        require_vae_version(opened.label, detected.version, expected)
        table = VAE_22 if detected.version == "2.2" else VAE_21
        names = _vae_names(opened, detected, table)
        return VAEState(_read_all(opened, detected, names, dtype, device), detected.version)


def require_vae_version(label: str, version: str, expected: str | None) -> None:
    """CheckpointError when a VAE is not the one that the model was trained with. ``expected`` None accepts both."""
    models = {"2.1": "T2V-A14B and I2V-A14B (16 latent channels)", "2.2": "TI2V-5B (48 latent channels)"}
    if expected is not None and expected not in models:
        raise InputError(f"expected must be '2.1' or '2.2'; got {expected!r}")
    if expected is not None and version != expected:
        raise CheckpointError(
            f"{label} is the Wan{version} VAE, for {models[version]}; this model needs the Wan{expected} VAE, "
            f"for {models[expected]}: choose Wan{expected}_VAE"
        )


def _opened(source: str | Path, part: Callable[[CheckpointFolder], Path], map_files: bool) -> TensorSource:
    """Open the file or folder itself, or the part of the checkpoint folder."""
    path = Path(source)
    if path.is_dir() and _is_checkpoint(path):
        path = part(resolve_folder(path))
    if path.is_file() and sniff(path) == "gguf":
        raise CheckpointError(f"{path.name} is a GGUF file; use the .safetensors or .pth of the same model")
    return open_source(path, map_files=map_files)


def _is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` holds a whole checkpoint, not just the part."""
    if (folder / "model_index.json").is_file() or any(folder.glob("models_t5*")) or any(folder.glob("Wan2.*_VAE*")):
        return True
    return any((folder / name).is_dir() for name in EXPERT_FOLDERS.values())


def _mistaken(label: str, detected: Detected, wanted: str) -> CheckpointError:
    return CheckpointError(f"{label} is {detected.label}; {wanted} is needed here: choose that file")


def _hf_names(source: TensorSource, detected: Detected) -> dict[str, str]:
    """HF name -> stored name."""
    extras = detected.quantization.extras if detected.quantization is not None else frozenset()
    names: dict[str, str] = {}
    for stored in source:
        if stored == SPIECE or stored in extras or stored.startswith(_HEADS):
            continue
        hf = stored if detected.layout is Layout.HF else T5.from_official(stored)
        if hf is None or T5.to_official("shared.weight" if hf == _ALIAS else hf) is None:
            raise CheckpointError(f"{source.label} holds {stored}, which no UMT5 encoder has; use the original file")
        names.setdefault("shared.weight" if hf == _ALIAS else hf, stored)
    if "shared.weight" not in names:
        raise CheckpointError(f"{source.label} lacks the token embedding; download it again")
    return names


def _vae_names(source: TensorSource, detected: Detected, table: NameMap) -> dict[str, str]:
    """Official name -> stored name; every one must exist in the VAE's table."""
    extras = detected.quantization.extras if detected.quantization is not None else frozenset()
    names = {}
    for stored in source:
        if not stored.startswith(detected.prefix) or stored in extras:
            continue
        bare = stored.removeprefix(detected.prefix)
        official = table.to_official(bare) if detected.layout is Layout.DIFFUSERS else bare
        if official is None or table.from_official(official) is None:
            raise CheckpointError(
                f"{source.label} holds {stored}, which {detected.label} has not; use the original file"
            )
        names[official] = stored
    return names


def _read_all(
    source: TensorSource,
    detected: Detected,
    names: dict[str, str],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> dict[str, Tensor]:
    assert detected.quantization is not None
    detected.quantization.require_readable(source.label)
    state: dict[str, Tensor] = {}
    for name, stored in names.items():
        info, scale = source.info(stored), read_scale(source, stored, detected.quantization)
        is_fp8 = info.dtype in FP8_DTYPES
        if dtype is not None or not is_fp8:
            state[name] = source.read(stored, dtype, device, scale)
        elif _LINEAR.search(name):
            state[name] = source.read(stored, None, device)
            module = name.removesuffix(".weight")
            state[f"{module}.weight_scale"] = (torch.ones(()) if scale is None else scale).to(device)
        else:
            state[name] = source.read(stored, torch.bfloat16, device, scale)
    return state
