"""Tiny checkpoints for the checkpoint tests: state dicts in every naming scheme and storage, and files that lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from wan_fp8.checkpoint.key_maps import DIT
from wan_fp8.models.specs import ModelSpec, Task
from wan_fp8.models.wan import build_model

E4M3 = torch.float8_e4m3fn
CHANNELS = {
    Task.T2V: (16, 16),
    Task.I2V: (36, 16),
    Task.TI2V: (48, 48),
    Task.ANIMATE: (36, 16),
    Task.S2V: (16, 16),
}


def tiny_spec(task: str = "t2v", *, dim: int = 128, layers: int = 2, text_dim: int = 64) -> ModelSpec:
    """One head per 128 channels; narrow text so that a file takes a megabyte."""
    in_dim, out_dim = CHANNELS[Task(task)]
    return ModelSpec(
        task=Task(task),
        dim=dim,
        ffn_dim=2 * dim,
        num_heads=dim // 128,
        num_layers=layers,
        in_dim=in_dim,
        out_dim=out_dim,
        text_dim=text_dim,
    )


def official_state(spec: ModelSpec, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under official names."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_model(spec).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) * 0.05 for name, shape in shapes.items()}


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under diffusers' names."""
    renamed = {DIT.from_official(name): value for name, value in state.items()}
    assert None not in renamed and len(renamed) == len(state)
    return renamed  # type: ignore[return-value]


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Every name behind ``prefix``."""
    return {prefix + name: value for name, value in state.items()}


def is_linear(name: str, value: Tensor) -> bool:
    """Whether a parameter is the matrix of a Linear of a block."""
    return name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2


def quantised(
    state: Mapping[str, Tensor], convention: str
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """The state dict with FP8 (or int8) block linears.

    Returns:
        The tensors to save, the file's metadata, and what each weight is worth in fp32.
    """
    stored: dict[str, Tensor] = {}
    worth: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, value in state.items():
        if not is_linear(name, value):
            stored[name] = value
            worth[name] = value.float()
            continue
        layer = name.removesuffix(".weight")
        rows = convention.startswith("lightx2v")
        peak = value.abs().amax(1, keepdim=True) if rows else value.abs().max()
        if convention == "lightx2v_int8":
            scale = (peak / 127).float()
            stored[name] = (value / scale).round().to(torch.int8)
        else:
            scale = (peak / 448).float() if convention != "fp8" else torch.tensor(1.0)
            stored[name] = (value.float() / scale).to(E4M3)
        worth[name] = stored[name].float() * scale
        if convention == "scaled_fp8":
            stored[f"{layer}.scale_weight"] = scale
            stored[f"{layer}.scale_input"] = torch.tensor(1.0)
        elif convention != "fp8":
            stored[f"{layer}.weight_scale"] = scale
        layers[layer] = {"format": "float8_e4m3fn"}
        if convention == "comfy_quant":
            stored[f"{layer}.comfy_quant"] = json_tensor(layers[layer])
    if convention == "scaled_fp8":
        stored["scaled_fp8"] = torch.zeros(2).to(E4M3)
    metadata = {}
    if convention == "quantization_metadata":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return stored, metadata, worth


def json_tensor(value: Any) -> Tensor:
    """UTF-8 JSON as uint8, as ``comfy_quant`` holds it."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def write_shards(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    count: int = 2,
    index: bool = True,
    stem: str = "diffusion_pytorch_model",
) -> Path:
    """``count`` safetensors files, with or without an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(state)
    weight_map = {}
    for number in range(count):
        file = f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: state[name].contiguous() for name in names[number::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def official_folder(
    root: Path,
    spec: ModelSpec,
    *,
    experts: Iterable[str] = ("high_noise", "low_noise"),
    dtype: torch.dtype = torch.float32,
) -> Path:
    """An official folder without encoder and VAE; each expert has its own seed (0 and 1)."""
    config = json.dumps({"_class_name": "WanModel", "in_dim": spec.in_dim, "out_dim": spec.out_dim})
    for expert in experts:
        folder = write_shards(
            root / f"{expert}_model", official_state(spec, seed=int(expert == "low_noise"), dtype=dtype)
        )
        (folder / "config.json").write_text(config)
    return root


def diffusers_folder(root: Path, spec: ModelSpec, *, two: bool = True) -> Path:
    """A Diffusers folder without encoder and VAE."""
    index: dict[str, Any] = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if two else [None, None],
        "boundary_ratio": 0.875 if two else None,
    }
    config = json.dumps({"in_channels": spec.in_dim, "out_channels": spec.out_dim})
    for seed, name in enumerate(("transformer", "transformer_2") if two else ("transformer",)):
        write_shards(root / name, diffusers_state(official_state(spec, seed=seed)))
        (root / name / "config.json").write_text(config)
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def raw_safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header, honest or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def named_like(names: Iterable[str], **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Small tensors under these names, for detection by name alone."""
    return {name: torch.zeros(shapes.get(name, (1,))) for name in names}
