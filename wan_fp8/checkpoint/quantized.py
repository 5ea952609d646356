"""How a file stores quantised weights, in every convention in use, reduced to one rule: w = stored * scale.

| storage | marker | scale |
| --- | --- | --- |
| ``fp8`` | none | none (1) |
| ``scaled_fp8`` | tensor ``scaled_fp8``, or scales alone | ``X.scale_weight`` or ``X.weight_scale`` scalar |
| ``comfy_quant`` | uint8 tensor ``X.comfy_quant`` holding JSON | ``X.weight_scale`` scalar |
| ``quantization_metadata`` | file metadata ``_quantization_metadata`` | ``X.weight_scale`` scalar |
| ``lightx2v_fp8``, ``lightx2v_int8`` | none | ``X.weight_scale`` [rows, 1] |
| ``wan_fp8`` | as core's two, with our formats | ``X.weight_scale`` for rows, 128 x 128 or 32 inputs |

Source: ComfyUI ``comfy/ops.py``, ``comfy/model_detection.py``; LightX2V ``lightx2v/common/ops/mm``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.quantize import BLOCK, E8M0, MX_BLOCK, Granularity
from .tensors import FP8_DTYPES, TensorInfo, TensorSource

MARKER = "scaled_fp8"
_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")
COMFY_SUFFIX = ".comfy_quant"
METADATA_KEY = "_quantization_metadata"
ROW_FORMAT, BLOCK_FORMAT, MX_FORMAT = "wan_fp8_row", "wan_fp8_block_128", "wan_fp8_mx_32"
"""Names of layers that core cannot multiply: it stops at them, where it would take the scales for something else."""
FORMAT_KEY, VERSION_KEY, VERSION = "wan_fp8_format", "wan_fp8_version", "1"
"""File metadata of checkpoints that this package saved."""
RECIPE_KEY = "wan_fp8_recipe"
"""Metadata: JSON of the recipe at work when the file was saved; for people, the tensors decide."""
_KNOWN_FORMATS = ("float8_e4m3fn", "float8_e5m2", ROW_FORMAT, BLOCK_FORMAT, MX_FORMAT)
_FOREIGN_SUFFIXES = {
    ".weight_scale_2": "nvfp4",
    ".weight.absmax": "bitsandbytes 4-bit",
    ".weight.quant_map": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes int8",
    ".qweight": "a packed int4 format (GPTQ, AWQ or SVDQuant)",
    ".wscales": "SVDQuant int4 (nunchaku)",
}
_STORED_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


class Storage(StrEnum):
    """How the bulk of the weights is stored."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP64 = "fp64"
    FP8 = "fp8"
    SCALED_FP8 = "scaled_fp8"
    COMFY_QUANT = "comfy_quant"
    QUANTIZATION_METADATA = "quantization_metadata"
    LIGHTX2V_FP8 = "lightx2v_fp8"
    LIGHTX2V_INT8 = "lightx2v_int8"
    WAN_FP8 = "wan_fp8"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class Quantization:
    """What of a source's tensors is weights, what is scales, and what is neither."""

    storage: Storage
    scales: dict[str, str] = field(default_factory=dict)
    """Weight name -> name of its scale tensor. A weight without an entry has scale 1."""
    extras: frozenset[str] = frozenset()
    """Scales, activation scales and markers: everything that is no parameter."""
    unsupported: str | None = None
    """The format that cannot be read, as users know it."""

    def require_readable(self, label: str) -> None:
        """CheckpointError naming the format when this package cannot read it."""
        if self.unsupported is not None:
            raise CheckpointError(
                f"{label} stores its weights as {self.unsupported}; this loader takes bf16, fp16, fp32, FP8 (plain, "
                "scaled_fp8, comfy_quant) and LightX2V fp8/int8: use one of those files of the same model"
            )


def read_quantization(source: TensorSource, names: Iterable[str], prefix: str = "") -> Quantization:
    """Find scales and markers among ``names`` (a part of the source's, all beginning with ``prefix``).

    Reads the JSON tensors of ``comfy_quant``, and no weight.
    """
    names = list(names)
    present = set(names)
    scales, extras = {}, set()
    for name in names:
        if name == prefix + MARKER or name.endswith((COMFY_SUFFIX, *_INPUT_SCALES)):
            extras.add(name)
        for suffix in _SCALES:
            weight = name.removesuffix(suffix) + ".weight"
            if name.endswith(suffix) and weight in present:
                scales[weight] = name
                extras.add(name)
    storage, unsupported = _storage(source, names, prefix, scales)
    return Quantization(storage, scales, frozenset(extras), unsupported)


def format_name(dtype: torch.dtype, granularity: Granularity) -> str:
    """What a layer is called in a file: core's name for one scale, ours for finer ones."""
    if granularity is Granularity.TENSOR:
        return str(dtype).removeprefix("torch.")
    return {Granularity.ROW: ROW_FORMAT, Granularity.BLOCK: BLOCK_FORMAT, Granularity.MX: MX_FORMAT}[granularity]


def _storage(source: TensorSource, names: list[str], prefix: str, scales: dict[str, str]) -> tuple[Storage, str | None]:
    foreign = next((what for name in names for end, what in _FOREIGN_SUFFIXES.items() if name.endswith(end)), None)
    version = source.metadata.get(VERSION_KEY, VERSION)
    if FORMAT_KEY in source.metadata and version != VERSION:
        return Storage.UNSUPPORTED, f"version {version} of this pack's own format (this is version {VERSION})"
    declared, formats = _declared(source, names, prefix)
    unknown = sorted(set(formats.values()).difference(_KNOWN_FORMATS))
    if unknown or foreign:
        return Storage.UNSUPPORTED, ", ".join(unknown) or foreign
    ours = {layer: form for layer, form in formats.items() if form in (ROW_FORMAT, BLOCK_FORMAT, MX_FORMAT)}
    for layer, form in ours.items():
        _check_label(source, layer, form, scales)
    bulk = _bulk(source, names, prefix)
    odd = _odd_scale(source, {weight: name for weight, name in scales.items() if weight[:-7] not in ours})
    if odd is not None:
        return Storage.UNSUPPORTED, odd
    if declared is not None:
        return Storage.WAN_FP8 if ours else declared, None
    if bulk.dtype is torch.int8:
        return (Storage.LIGHTX2V_INT8, None) if scales else (Storage.UNSUPPORTED, "int8 without scales")
    if bulk.dtype in FP8_DTYPES:
        rows = any(len(source.info(name).shape) == 2 and source.info(name).shape[0] > 1 for name in scales.values())
        return (Storage.LIGHTX2V_FP8 if rows else Storage.SCALED_FP8 if scales else Storage.FP8), None
    if bulk.dtype is None or bulk.dtype not in _STORED_NAMES:
        return Storage.UNSUPPORTED, bulk.stored.lower()
    return Storage(_STORED_NAMES[bulk.dtype]), None


def _check_label(source: TensorSource, layer: str, form: str, scales: dict[str, str]) -> None:
    """CheckpointError unless a layer of this package's formats has the weight and the scales that its label says."""
    weight = f"{layer}.weight"
    shape = source.info(weight).shape
    scale = source.info(scales[weight]) if weight in scales else None
    down, across = {ROW_FORMAT: (1, None), BLOCK_FORMAT: (BLOCK, BLOCK), MX_FORMAT: (1, MX_BLOCK)}[form]
    fits = len(shape) == 2 and shape[0] % down == 0 and shape[1] % (across or 1) == 0
    wanted = (shape[0] // down, shape[1] // across if across else 1) if fits else None
    kind = E8M0 if form == MX_FORMAT else torch.float32
    held = scale is not None and scale.shape == wanted and scale.dtype is kind
    if not (fits and held and source.info(weight).dtype in FP8_DTYPES):
        found = "no scale" if scale is None else f"a scale {scale.stored} {list(scale.shape)}"
        raise CheckpointError(
            f"{source.label} is mislabelled: it calls {layer} {form}, and holds {source.info(weight).stored} "
            f"{list(shape)} with {found}: save or download it again"
        )


def _declared(source: TensorSource, names: list[str], prefix: str) -> tuple[Storage | None, dict[str, str]]:
    """The convention that the file names itself, and the formats of its layers by their stored names."""
    markers = [name for name in names if name.endswith(COMFY_SUFFIX)]
    if markers:
        found = {name.removesuffix(COMFY_SUFFIX): _layer_format(source, name) for name in markers}
        return Storage.COMFY_QUANT, found
    if METADATA_KEY in source.metadata:
        listed = _metadata_formats(source)
        return Storage.QUANTIZATION_METADATA, {
            layer if layer.startswith(prefix) else prefix + layer: form for layer, form in listed.items()
        }
    return (Storage.SCALED_FP8 if prefix + MARKER in names else None), {}


def _layer_format(source: TensorSource, name: str) -> str:
    info = source.info(name)
    if info.dtype is not torch.uint8 or info.nbytes > 1 << 16:
        raise CheckpointError(
            f"{source.label}: {name} is {info.stored} {list(info.shape)}, not a short JSON text; download the file "
            "again"
        )
    return _format_of(source.label, name, bytes(source.read(name).flatten().tolist()).decode("utf-8", "replace"))


def _format_of(label: str, name: str, text: str) -> str:
    try:
        config = json.loads(text)
        return str(config["format"] if isinstance(config, dict) else config)
    except (ValueError, KeyError, RecursionError):
        raise CheckpointError(f"{label}: {name} does not name a quantisation format; download the file again") from None


def _metadata_formats(source: TensorSource) -> dict[str, str]:
    try:
        layers = json.loads(source.metadata[METADATA_KEY])["layers"]
        return {str(layer): str(conf["format"] if isinstance(conf, dict) else conf) for layer, conf in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{source.label} has quantisation metadata without layer formats; download the file again"
        ) from None


def _bulk(source: TensorSource, names: list[str], prefix: str) -> TensorInfo:
    """The type that holds most matrix elements (of all tensors where there is no matrix)."""
    counts: Counter[str] = Counter()
    example: dict[str, TensorInfo] = {}
    for name in names:
        info = source.info(name)
        elements = 1
        for length in info.shape:
            elements *= length
        if name != prefix + MARKER and not name.endswith(COMFY_SUFFIX):
            counts[info.stored] += elements * (1000 if len(info.shape) >= 2 else 1)
            example[info.stored] = info
    return example[counts.most_common(1)[0][0]] if counts else TensorInfo((), torch.float32, "F32", 0)


def _odd_scale(source: TensorSource, scales: dict[str, str]) -> str | None:
    """The name of a format whose scales are neither one number nor one per row; None when all are."""
    for weight, name in scales.items():
        scale, rows = source.info(name), (source.info(weight).shape or (1,))[0]
        if scale.shape in ((), (1,), (1, 1), (rows,), (rows, 1)) and scale.dtype in _STORED_NAMES:
            continue
        if source.info(weight).dtype not in (*FP8_DTYPES, torch.int8):
            return "nvfp4" if scale.dtype in FP8_DTYPES else "a packed 4-bit format"
        return "mxfp8" if scale.stored in ("U8", "F8_E8M0", "uint8") else f"block-scaled {scale.stored.lower()}"
    return None


def read_scale(source: TensorSource, weight: str, quantization: Quantization) -> Tensor | None:
    """The fp32 scale of a stored weight: a scalar or [rows, 1], in ``wan_fp8`` files also [rows / 128, columns / 128]
    or E8M0 [rows, columns / 32]; None where it has none (scale 1).

    Raises:
        CheckpointError: it is not finite.
    """
    name = quantization.scales.get(weight)
    if name is None:
        return None
    is_mx = E8M0 is not None and source.info(name).dtype is E8M0
    scale = source.read(name, None if is_mx else torch.float32)
    if not (scale.view(torch.uint8) < 255 if is_mx else scale.isfinite()).all():
        raise CheckpointError(f"{source.label} is damaged: {name} is not finite; download or save it again")
    if is_mx:
        return scale.clone()
    if scale.numel() == 1:
        return scale.reshape(()).clone()
    is_block = scale.ndim == 2 and scale.shape[0] != source.info(weight).shape[0]
    return scale.clone() if is_block else scale.reshape(-1, 1).clone()
