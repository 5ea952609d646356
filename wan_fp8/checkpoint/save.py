"""Write a transformer to one safetensors file: tensor by tensor, and whole or not at all.

FP8 weights are written as they are held: the bytes and the scale, in core ComfyUI's format where that has a name for
such scales (one for the tensor), in ours elsewhere (docs/checkpoints.md). Reading the file back gives the same bits.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.quantize import E8M0, weight_granularity
from ..models.wan import WanModel
from .header import DTYPES
from .naming import EXPERTS
from .quantized import COMFY_SUFFIX, FORMAT_KEY, METADATA_KEY, RECIPE_KEY, VERSION, VERSION_KEY, format_name
from .tensors import FP8_DTYPES

ALIGN = 64
"""Bytes; what PyTorch aligns its own memory to."""
PAGE = 4096
"""Bytes; memory is pinned in these, and two weights that share one cannot both be."""
STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[int, int], None]
"""Bytes written so far, and in all. May raise, to cancel."""


def save_checkpoint(
    model: WanModel,
    path: str | Path,
    *,
    overwrite: bool = False,
    expert: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Save the weights as they are now, merged LoRAs included, under official names.

    One tensor at a time is brought to host memory. The file takes its name when it is complete; a full disk, an
    error or a cancelled run leaves nothing behind.

    Args:
        model: with any recipe, or none.
        path: ends in ``.safetensors``; its folder is made if need be.
        overwrite: replace a file of that name.
        expert: ``high_noise`` or ``low_noise``, written as part of the title for a name that does not say it.
        progress: called after each tensor.
    Returns:
        ``path``.
    Raises:
        InputError: the file exists, the name or the folder will not do, the disk cannot take it, or the model has
            live LoRAs.
    """
    path = Path(path)
    if model.lora is not None:
        raise InputError(
            "this model has live LoRAs, which run beside its weights and would be missing in the file: call "
            "remove_lora first"
        )
    check_target(path, overwrite)
    tensors, layers = stored_tensors(model.state_dict())
    header = _header(tensors, _metadata(model, layers, expert))
    total = sum(map(_nbytes, tensors.values()))
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_room(path, len(header) + total)
        with open(partial, "xb") as file:
            file.write(header)
            done = 0
            for value in tensors.values():
                file.write(_bytes(value).data)
                done += _nbytes(value)
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
        check_target(path, overwrite)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"{path.name} could not be written ({error.strerror or error}), and nothing of it was left behind: make "
            f"room for {total / 1e9:.1f} GB in {path.parent}, or choose another place"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_target(path: Path, overwrite: bool) -> None:
    """InputError where ``save_checkpoint`` would refuse the name, before anything is computed."""
    if path.suffix != ".safetensors":
        raise InputError(f"{path.name} must end in .safetensors: loaders tell formats by that")
    if path.exists() and not overwrite:
        raise InputError(f"{path.name} exists already: choose another name, or allow it to be replaced (overwrite)")
    if path.is_dir():
        raise InputError(f"{path.name} is a folder: choose another name")


def stored_tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What goes into the file, in its order, and the format of each FP8 layer.

    Whole pages come first, in the model's order, then whole multiples of ``ALIGN`` bytes, then the few others, wide
    types first: every weight can be mapped and pinned, and lies in memory as an allocated one would (some CPU kernels
    round by that).
    """
    found: dict[str, Tensor] = {}
    layers: dict[str, str] = {}
    for name, value in state.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight_scale"):
            continue  # stands beside its weight
        found[name] = value
        if layer == name or value.dtype not in FP8_DTYPES or value.ndim != 2:
            continue
        scale = state.get(f"{layer}.weight_scale")
        if scale is None or scale.dtype != E8M0:
            scale = torch.ones(()) if scale is None else scale.float()
        layers[layer] = format_name(value.dtype, weight_granularity(scale, value.shape))
        found[f"{layer}.weight_scale"] = scale
        found[layer + COMFY_SUFFIX] = comfy_mark(layers[layer])

    def place(name: str) -> tuple[int, int]:
        size = _nbytes(found[name])
        group = 0 if size % PAGE == 0 else 1 if size % ALIGN == 0 else 2
        return group, -found[name].element_size() if group == 2 else 0

    return {name: found[name] for name in sorted(found, key=place)}, layers


def comfy_mark(form: str) -> Tensor:
    """The uint8 tensor by which newer versions of core know a layer's format."""
    return torch.frombuffer(bytearray(json.dumps({"format": form}).encode()), dtype=torch.uint8)


def _metadata(model: WanModel, layers: Mapping[str, str], expert: str | None) -> dict[str, str]:
    from ..quant import recipe_of

    if expert is not None and expert not in EXPERTS:
        raise InputError(f"expert must be {' or '.join(map(repr, EXPERTS))} or None; got {expert!r}")
    recipe = recipe_of(model)
    words = {"name": "none"} if recipe is None else {"name": recipe.name, "keep": list(recipe.keep)}
    metadata = {"format": "pt", FORMAT_KEY: "transformer", VERSION_KEY: VERSION, RECIPE_KEY: json.dumps(words)}
    if expert is not None:
        metadata["modelspec.title"] = f"Wan2.2 {model.spec.task} {expert}"
    if layers:
        forms = {layer: {"format": form} for layer, form in layers.items()}
        metadata[METADATA_KEY] = json.dumps({"format_version": "1.0", "layers": forms})
    return metadata


def _header(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Length, JSON and padding of a safetensors file."""
    table: dict[str, Any] = {"__metadata__": metadata}
    for name, first, value in _placed(tensors):
        stored = STORED_NAMES.get(value.dtype)
        if stored is None:
            raise InputError(f"{name} has type {value.dtype}, which safetensors files cannot hold")
        span = [first, first + _nbytes(value)]
        table[name] = {"dtype": stored, "shape": list(value.shape), "data_offsets": span}
    text = json.dumps(table).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def _placed(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, int, Tensor]]:
    first = 0
    for name, value in tensors.items():
        yield name, first, value
        first += _nbytes(value)


def _nbytes(value: Tensor) -> int:
    return value.element_size() * math.prod(value.shape)


def _bytes(value: Tensor) -> np.ndarray:
    """The bytes of one tensor; a tensor in host memory is not copied."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _check_room(path: Path, nbytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < nbytes:
        raise InputError(
            f"{path.name} takes {nbytes / 1e9:.1f} GB and {path.parent} has {free / 1e9:.1f} GB free: make room, or "
            "choose another place"
        )
