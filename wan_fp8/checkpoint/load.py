"""From weights on disk to a transformer: detect, check every name and shape, then stream tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from ..kernels.quantize import dequantized_weight
from ..models.layers import HIGH_PRECISION, Linear
from ..models.specs import Task
from ..models.wan import WanModel, build_model
from .detect import ACCEPTED, Detected, Layout, detect, official_names
from .diffusers_animate import DiffusersAnimate
from .encoders import load_text_encoder_state_dict, load_vae_state_dict
from .folder import resolve_folder
from .header import sniff
from .naming import EXPERTS, version_from_name
from .quantized import Quantization, read_scale
from .reader import open_source
from .signatures import Kind
from .tensors import FP8_DTYPES, TensorSource

if TYPE_CHECKING:
    from ..quant import Recipe

__all__ = ["build_from", "load_text_encoder_state_dict", "load_transformer", "load_vae_state_dict", "open_transformer"]

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LISTED = 4
"""Names shown in an error; the rest is counted."""

Source = str | Path | Mapping[str, Tensor] | TensorSource


def load_transformer(
    source: Source,
    expert: str | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str = "cpu",
    model_class: type[WanModel] | None = None,
    *,
    keep_fp8: bool = False,
    map_files: bool = True,
    recipe: Recipe | None = None,
) -> WanModel:
    """Load one Wan2.2 transformer (one expert) in eval mode.

    Args:
        source: an official folder, a Diffusers folder, one .safetensors (or .pth) file, or a state dict, in any naming
            scheme.
        expert: ``high_noise`` or ``low_noise`` for folders with two experts, else None.
        dtype: bf16, fp16, fp32 or fp64: every weight in that type, FP8 weights times their scales in fp32 and rounded
            once. None: as stored; an FP8 Linear keeps its bytes and gets a ``weight_scale``, other FP8 tensors become
            bf16.
        device: where the weights go.
        model_class: a subclass of WanModel to build instead.
        keep_fp8: with a ``dtype``, FP8 Linears keep their bytes all the same, and everything else gets ``dtype``.
        map_files: weights that keep their type are views of the mapped file, taking no memory until used; False copies
            them.
        recipe: FP8 recipe to apply while loading: each weight goes to ``device`` by itself and is cast there, so that
            ``device`` never holds more than the FP8 model and one weight. FP8 weights of the file keep their bytes
            where the recipe can multiply them. Mapped weights stay in reach, for LoRA merges.
    Returns:
        The model. Beside it, host memory holds one tensor at most while loading. Tensors of a state dict that need no
        change of type or device are not copied: the model's parameters share their storage, so that writing to one
        writes to the other. Pass clones to keep them apart.
    Raises:
        CheckpointError: damaged, incomplete or another model's weights; the message says which.
        InputError: an expert or dtype that does not fit.
    """
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise InputError(
            f"dtype must be one of {', '.join(map(str, COMPUTE_DTYPES))} or None (as stored); got {dtype}: "
            "quantise with a recipe after loading"
        )
    opened, detected = open_transformer(source, expert, map_files=map_files)
    with nullcontext() if opened is source else opened:
        if recipe is None or recipe.is_none:
            return build_from(opened, detected, dtype=dtype, device=device, model_class=model_class, keep_fp8=keep_fp8)
        from ..quant import apply_recipe

        model = build_from(
            opened, detected, dtype=dtype, model_class=model_class, keep_fp8=True, as_stored=recipe.converts
        )
    return apply_recipe(model, recipe, device=device, move=True).to(device)


def open_transformer(
    source: Source, expert: str | None = None, *, map_files: bool = True
) -> tuple[TensorSource, Detected]:
    """Find, open and recognise a transformer without reading a weight; the caller closes what this opened.

    Raises:
        CheckpointError, InputError: as ``load_transformer``.
    """
    if expert is not None and expert not in EXPERTS:
        raise InputError(f"expert must be {' or '.join(map(repr, EXPERTS))} or None; got {expert!r}")
    path = Path(source) if isinstance(source, str | Path) else None
    named = path
    if path is not None and path.is_dir():
        path, named = _inside(path, expert)
    elif path is not None and path.is_file() and sniff(path) == "gguf":
        Detected(Kind.GGUF, "a GGUF file").require_transformer(path.name)
    opened = open_source(path if path is not None else source, map_files=map_files)
    try:
        detected = detect(opened, named)
        detected.require_transformer(opened.label)
        detected = _settle_expert(opened.label, detected, expert)
        assert detected.quantization is not None
        detected.quantization.require_readable(opened.label)
    except BaseException:
        if opened is not source:
            opened.close()
        raise
    if detected.task is Task.ANIMATE and detected.layout is Layout.DIFFUSERS:
        opened = DiffusersAnimate(opened, detected.prefix, owned=opened is not source)
    if named is not None and detected.expert is None and _may_be_wan21(detected, named):
        logger.warning("%s: %s", opened.label, "; ".join(detected.details))
    return opened, detected


def _may_be_wan21(detected: Detected, named: Path) -> bool:
    return detected.task is Task.T2V and version_from_name(named) != "2.2"


def _inside(folder: Path, expert: str | None) -> tuple[Path, Path]:
    """The transformer's own folder, and the path whose name tells version and expert."""
    found = resolve_folder(folder)
    if found.layout == "transformer":
        return folder, folder  # shards alone: the caller may say which expert they are
    inner = found.transformer(expert)
    return inner, (folder if None in found.transformers else inner)


def _settle_expert(label: str, detected: Detected, expert: str | None) -> Detected:
    if expert is None:
        return detected
    if detected.task is not None and not detected.task.two_experts:
        raise InputError(f"{label} is {detected.label}, which has one expert; leave expert at None")
    if detected.expert not in (None, expert):
        raise InputError(f"{label} is the {detected.expert} expert by its name, but {expert} was asked for")
    return replace(detected, expert=expert)


def build_from(
    source: TensorSource,
    detected: Detected,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    model_class: type[WanModel] | None = None,
    keep_fp8: bool = False,
    as_stored: Callable[[str], bool] | None = None,
) -> WanModel:
    """The model of an opened and recognised source (see ``open_transformer``). Nothing is read before all names fit.

    Args:
        as_stored: says of a layer's name that its weight, in whatever high precision, keeps the file's type: a recipe
            will cast it, and until then it takes no memory where files are mapped.
    """
    spec = detected.require_transformer(source.label)
    quantization = detected.quantization
    assert quantization is not None, "a transformer that detect() recognised has one"
    names = official_names(source, detected)
    with torch.device("meta"):
        model = build_model(spec, model_class=model_class)
    _check_fit(source, names, model)
    if dtype is None and any(source.info(name).dtype is torch.int8 for name in names.values()):
        raise InputError(f"{source.label} stores int8 weights, which cannot be kept; load it with dtype=torch.bfloat16")
    linears = {name + ".weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    state: dict[str, Tensor] = {}
    for official, stored in names.items():
        may_keep = official in linears and (keep_fp8 or dtype is None)
        wanted = dtype
        if as_stored is not None and source.info(stored).dtype in HIGH_PRECISION:
            wanted = None if as_stored(official.removesuffix(".weight")) else dtype
        state.update(_entries(source, official, stored, quantization, wanted, device, may_keep))
    for name, value in state.items():
        if name.endswith(".weight_scale"):
            owner = model.get_submodule(name.removesuffix(".weight_scale"))
            owner.register_parameter("weight_scale", nn.Parameter(value, requires_grad=False))
    model.load_state_dict(state, strict=True, assign=True)
    if model.compute_dtype == torch.float32 and any(value.dtype in FP8_DTYPES for value in state.values()):
        model.compute_dtype_override = torch.bfloat16  # fp32 embeddings beside FP8 blocks do not make it an fp32 model
    return model.requires_grad_(False).eval()


def read_parameters(source: Source, expert: str | None, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Some parameters of a checkpoint by their official names, FP8 dequantised; nothing else is read.

    Raises:
        CheckpointError, InputError: as ``load_transformer``.
    """
    opened, detected = open_transformer(source, expert)
    with opened:
        stored, quantization = official_names(opened, detected), detected.quantization
        assert quantization is not None
        return {
            name: _entries(opened, name, stored[name], quantization, dtype, "cpu", may_keep=False)[name]
            for name in names
        }


def _entries(
    source: TensorSource,
    official: str,
    stored: str,
    quantization: Quantization,
    dtype: torch.dtype | None,
    device: torch.device | str,
    may_keep: bool,
) -> dict[str, Tensor]:
    """The parameter called ``official``, and its scale where both are kept."""
    scale = read_scale(source, stored, quantization)
    is_fp8 = source.info(stored).dtype in FP8_DTYPES
    if not (is_fp8 and may_keep):
        lifted = torch.bfloat16 if is_fp8 or scale is not None else None
        if scale is not None and scale.ndim == 2 and scale.shape != (source.info(stored).shape[0], 1):
            value = source.read(stored, None, device)
            return {official: dequantized_weight(value, scale.to(value.device), dtype or torch.bfloat16)}
        return {official: source.read(stored, dtype or lifted, device, scale)}
    kept = torch.ones(()) if scale is None else scale
    return {
        official: source.read(stored, None, device),
        f"{official.removesuffix('.weight')}.weight_scale": kept.to(device),
    }


def _check_fit(source: TensorSource, names: Mapping[str, str], model: nn.Module) -> None:
    """CheckpointError unless names and shapes are exactly the model's."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    missing = [name for name in expected if name not in names]
    unexpected = [names[name] for name in names if name not in expected]
    misshaped = [
        f"{names[name]} {list(source.info(names[name]).shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in names and source.info(names[name]).shape != shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:_LISTED])}{', ...' if len(found) > _LISTED else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{source.label} does not fit a Wan2.2 transformer: {', '.join(problems)}; this loader takes complete "
            f"{ACCEPTED}: check that the file is complete and unmodified"
        )
