"""LoRA files of every format in use, read into one form: changes by official parameter name.

change = strength * (alpha / rank) * up @ down, with factor 1 where alpha is absent; full-rank differences scale with
the strength alone. Keys that are not understood are collected and reported, never dropped in silence.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError
from .lora_names import LoraKey, Part, parse_key
from .naming import HIGH_NOISE, LOW_NOISE, expert_from_name
from .products import Hadamard, Kronecker
from .reader import open_source, read_json
from .tensors import TensorSource

logger = logging.getLogger(__name__)

_IMAGE_BRANCH = (".img_emb.", ".k_img.", ".v_img.", ".norm_k_img.")
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_COMPONENTS = {"transformer": HIGH_NOISE, "transformer_2": LOW_NOISE}
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of low rank."""

    down: Tensor
    """[rank, in, ...]"""
    up: Tensor
    """[out, rank, ...]"""
    alpha: float | None = None
    mid: Tensor | None = None
    """[rank, rank, ...] core of a Tucker-decomposed convolution."""
    dora_scale: Tensor | None = None
    """Magnitudes of a DoRA: the changed weight's rows (or columns) get these norms."""
    like_core: bool = False
    """A DoRA as ComfyUI merges it: rows are divided by the norm of the unchanged weight."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def factor(self) -> float:
        """alpha / rank, or 1."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes."""
        kernel = self.mid.shape[2:] if self.mid is not None else self.down.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)


@dataclass(frozen=True, slots=True)
class Diff:
    """A full-rank change of a weight, bias or modulation table."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter that it changes."""
        return tuple(self.value.shape)


Entry = LowRank | Diff | Hadamard | Kronecker
Entries = dict[str, tuple[Entry, ...]]
"""Official parameter name -> its changes, to be added up."""


@dataclass(frozen=True, slots=True)
class LoraFile:
    """The content of one LoRA file."""

    label: str
    by_expert: Mapping[str | None, Entries]
    """None: for whichever expert it is put on. A diffusers file with both ``transformer.`` and ``transformer_2.`` has
    an entry for each expert."""
    expert: str | None = None
    """``high_noise`` or ``low_noise`` where the file's name (or its only prefix) says so."""
    unknown: tuple[str, ...] = ()
    """Keys that are no change of a Wan transformer, in file order."""

    def entries(self, expert: str | None = None) -> Entries:
        """The changes for ``expert``; InputError when the file has separate ones and no expert is named."""
        if None in self.by_expert:
            return self.by_expert[None]
        if expert not in self.by_expert:
            raise InputError(f"{self.label} has changes for both experts; say which: {HIGH_NOISE!r} or {LOW_NOISE!r}")
        return self.by_expert[expert]

    def describe_unknown(self) -> str | None:
        """One sentence about the keys that were not understood; None when there are none."""
        if not self.unknown:
            return None
        what = _other_adapter(self.unknown) or "are no change of a Wan transformer"
        return f"{self.label}: {len(self.unknown)} keys {what} and are left out ({_shown(self.unknown)})"


@dataclass(frozen=True, slots=True)
class Fit:
    """What of a LoRA fits a model."""

    entries: Entries
    skipped: tuple[str, ...] = field(default=())
    """One sentence for each group of keys that was left out."""


def read_lora(source: str | Path | Mapping[str, Tensor] | TensorSource, *, map_files: bool = True) -> LoraFile:
    """Read a LoRA file (safetensors or .pth/.ckpt), a PEFT folder, or a state dict. Tensors stay mapped and as stored.

    Raises:
        CheckpointError: damaged, no LoRA of a Wan transformer, or half of a pair missing.
    """
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and (path / "adapter_model.safetensors").is_file():
        path = path / "adapter_model.safetensors"
    opened = open_source(path if path is not None else source, map_files=map_files)
    with nullcontext() if opened is source else opened:
        parsed = {key: parse_key(key) for key in opened}
        unknown = [key for key, found in parsed.items() if found is None]
        components = {found.component for found in parsed.values() if found is not None}
        groups = _grouped({key: found for key, found in parsed.items() if found is not None}, components, opened.label)
        alphas = _Alphas(opened, path)
        by_expert = {expert: _entries(opened, parts, expert, alphas, unknown) for expert, parts in groups.items()}
        label, metadata = opened.label, opened.metadata
    if not any(by_expert.values()):
        other = _other_adapter(unknown)
        raise CheckpointError(
            f"{label} holds keys that {other}: load it with ComfyUI's own LoRA loader"
            if other
            else f"{label} is no LoRA of a Wan transformer (it holds {_shown(unknown) or 'nothing'}); "
            "choose a Wan2.2 LoRA"
        )
    named = LOW_NOISE if "transformer_2" in components and None in by_expert else expert_from_name(path, metadata)
    lora = LoraFile(label, by_expert, named, tuple(dict.fromkeys(unknown)))
    if lora.unknown:
        logger.warning("%s", lora.describe_unknown())
    return lora


Groups = dict[str | None, dict[str, dict[Part, str]]]
"""Expert -> parameter -> part -> key."""


def _grouped(parsed: Mapping[str, LoraKey], components: set[str | None], label: str) -> Groups:
    """Keys by what they change. Both diffusers prefixes make a set for each expert, with what has no prefix in both."""
    both = components >= _COMPONENTS.keys()
    groups: Groups = {expert: defaultdict(dict) for expert in (_COMPONENTS.values() if both else (None,))}
    for key, found in parsed.items():
        expert = _COMPONENTS.get(found.component or "") if both else None
        for target in groups if both and expert is None else (expert,):
            parts = groups[target][found.parameter]
            if found.part in parts:
                raise CheckpointError(
                    f"{label} changes {found.parameter} twice, by {parts[found.part]} and {key}; convert it again"
                )
            parts[found.part] = key
    return groups


def _entries(
    source: TensorSource,
    groups: Mapping[str, Mapping[Part, str]],
    expert: str | None,
    alphas: _Alphas,
    unknown: list[str],
) -> Entries:
    result: Entries = {}
    for parameter, parts in groups.items():
        found: list[Entry] = []
        if Part.DOWN in parts or Part.UP in parts:
            found.append(_low_rank(source, parameter, parts, expert, alphas))
        else:
            unknown.extend(key for part, key in parts.items() if part in (Part.ALPHA, Part.DORA, Part.MID))
        for part in (Part.DIFF, Part.DIFF_BIAS, Part.DIFF_MODULATION):
            if part in parts:
                found.append(Diff(source.read(parts[part])))
        if found:
            result[parameter] = tuple(found)
    return result


def _low_rank(
    source: TensorSource, parameter: str, parts: Mapping[Part, str], expert: str | None, alphas: _Alphas
) -> LowRank:
    missing = next((part for part in (Part.DOWN, Part.UP) if part not in parts), None)
    if missing is not None:
        raise CheckpointError(f"{source.label} is incomplete: {parameter} has no lora_{missing}; download it again")
    down, up = source.read(parts[Part.DOWN]), source.read(parts[Part.UP])
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]:
        raise CheckpointError(
            f"{source.label} is damaged: the matrices of {parameter} are {list(up.shape)} and {list(down.shape)}; "
            "their inner sizes must be the rank; download it again"
        )
    alpha = float(source.read(parts[Part.ALPHA]).float()) if Part.ALPHA in parts else None
    return LowRank(
        down=down,
        up=up,
        alpha=alphas.of(parameter, expert, down.shape[0]) if alpha is None else alpha,
        mid=source.read(parts[Part.MID]) if Part.MID in parts else None,
        dora_scale=source.read(parts[Part.DORA]) if Part.DORA in parts else None,
    )


class _Alphas:
    """Alphas kept beside the tensors: in diffusers' metadata, or in the ``adapter_config.json`` of a PEFT folder."""

    def __init__(self, source: TensorSource, path: Path | None) -> None:
        self._config: dict[str, Any] = {}
        text = source.metadata.get(_DIFFUSERS_METADATA)
        if text is not None:
            try:
                self._config = dict(json.loads(text))
            except (ValueError, TypeError, RecursionError):
                raise CheckpointError(f"{source.label} has unreadable LoRA metadata; convert it again") from None
        elif path is not None and path.name == "adapter_model.safetensors":
            beside = path.with_name("adapter_config.json")
            self._config = read_json(beside) if beside.is_file() else {}

    def _setting(self, name: str, expert: str | None) -> Any:
        components = [component for component, of in _COMPONENTS.items() if expert in (None, of)]
        keys = (*(f"{component}.{name}" for component in components), name)
        return next((self._config[key] for key in keys if key in self._config), None)

    def of(self, parameter: str, expert: str | None, rank: int) -> float | None:
        """The alpha that gives PEFT's scaling: alpha / rank, or alpha / sqrt(rank) with ``use_rslora``."""
        alpha = self._setting("lora_alpha", expert)
        patterns = self._setting("alpha_pattern", expert)
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            known = parse_key(f"{pattern}.alpha")
            if known is not None and known.parameter == parameter:
                alpha = value
        if not isinstance(alpha, int | float):
            return None
        return float(alpha) * math.sqrt(rank) if self._setting("use_rslora", expert) else float(alpha)


def fit(lora: LoraFile, shapes: Mapping[str, tuple[int, ...]], expert: str | None = None) -> Fit:
    """Choose what changes a model with these parameter shapes, and say what is left out and why.

    Left out: the CLIP image branch of Wan2.1 I2V, a ``patch_embedding`` of another channel count, layers that the model
    has not.

    Raises:
        CheckpointError: the LoRA belongs to a model of another size, or nothing fits.
    """
    kept: Entries = {}
    image: list[str] = []
    absent: list[str] = []
    patch: list[str] = []
    for name, entries in lora.entries(expert).items():
        if name not in shapes:
            (image if any(mark in f".{name}" for mark in _IMAGE_BRANCH) else absent).append(name)
        elif all(_fits(entry, shapes[name]) for entry in entries):
            kept[name] = entries
        elif name.startswith("patch_embedding."):
            patch.append(f"{name} {list(entries[0].shape)} instead of {list(shapes[name])}")
        else:
            raise CheckpointError(
                f"{lora.label} is made for another model: it changes {name} {list(entries[0].shape)}, which is "
                f"{list(shapes[name])} here; choose a LoRA of this model's size"
            )
    if not kept:
        raise CheckpointError(f"{lora.label} changes nothing in this model ({_shown(image + absent + patch)})")
    sentences = (
        (image, "changes of the CLIP image branch, which only Wan2.1 I2V has, are left out"),
        (patch, "change of the patch embedding is for another number of channels and is left out"),
        (absent, "changes are for layers that this model has not and are left out"),
    )
    skipped = tuple(f"{lora.label}: {len(names)} {what} ({_shown(names)})" for names, what in sentences if names)
    return Fit(kept, skipped)


def _fits(entry: Entry, shape: tuple[int, ...]) -> bool:
    """Equal shapes, or as many elements with the same rows (a convolution's matrices may be stored flat)."""
    return entry.shape == shape or (
        isinstance(entry, LowRank) and entry.shape[:1] == shape[:1] and math.prod(entry.shape) == math.prod(shape)
    )


def delta(
    entry: Entry,
    strength: float,
    dtype: torch.dtype = torch.float32,
    *,
    weight: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """What is added to the parameter: computed in fp32 (fp64 for a float64 ``dtype``), rounded once.

    Args:
        entry: one change.
        strength: the user's factor; may be negative.
        dtype: type of the result.
        weight: the parameter before the change; needed by DoRA only.
        shape: of the parameter, where it differs from the stored one (flattened convolutions).
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    shape = shape or entry.shape
    if isinstance(entry, Diff):
        return (entry.value.to(work) * strength).reshape(shape).to(dtype)
    product = _product(entry, work) if isinstance(entry, LowRank) else entry.product(work)
    change = (product * entry.factor).reshape(shape)
    if entry.dora_scale is None:
        return (change * strength).to(dtype)
    if weight is None:
        raise InputError("a DoRA changes the weight's direction and needs the weight itself; pass weight=")
    magnitude = entry.dora_scale.to(work)
    return (_dora(weight.to(work), change, magnitude, like_core=entry.like_core) * strength).to(dtype)


def _product(entry: LowRank, work: torch.dtype) -> Tensor:
    up, down = entry.up.to(work).flatten(1), entry.down.to(work)
    if entry.mid is None:
        return up @ down.flatten(1)
    core = torch.einsum("ab...,bi->ai...", entry.mid.to(work), down.flatten(1))
    return up @ core.flatten(1)


def _dora(weight: Tensor, change: Tensor, magnitude: Tensor, *, like_core: bool) -> Tensor:
    """magnitude * (W + change) / norm(W + change) - W, with the norm of each output row, or of each input column where
    the magnitudes are [1, in]. ``like_core``: of a row, the norm of W."""
    changed = weight + change
    flat = changed.flatten(1)
    if magnitude.shape[0] == flat.shape[0]:
        of = weight.flatten(1) if like_core else flat
        norm, magnitude = of.norm(dim=1, keepdim=True), magnitude.reshape(-1, 1)
    else:
        norm, magnitude = flat.norm(dim=0, keepdim=True), magnitude.reshape(1, -1)
    return (flat * (magnitude / norm)).reshape(weight.shape) - weight


def to_comfy_state_dict(entries: Entries) -> dict[str, Tensor]:
    """The same changes under names that ComfyUI's own loader understands.

    ``diffusion_model.<module>.lora_down/up.weight``, ``.alpha``, ``.diff``, ``.diff_b``; a parameter that is no
    module's weight or bias is named in full, ``diffusion_model.blocks.0.modulation.diff``. ComfyUI keeps one change per
    parameter, so that a low-rank and a full-rank one for the same weight are added up into one ``.diff``. A DoRA is
    handed on as it is: ComfyUI divides by the norm of the unchanged weight, ``delta`` by that of the changed one, as
    published.
    """
    result: dict[str, Tensor] = {}
    for parameter, changes in entries.items():
        module, _, kind = parameter.rpartition(".")
        target = f"diffusion_model.{module if kind in ('weight', 'bias') else parameter}"
        first = changes[0]
        if len(changes) == 1 and isinstance(first, LowRank) and (first.mid is None or first.mid.ndim == 4):
            result |= _comfy_low_rank(target, first)
        else:
            result[f"{target}.{'diff_b' if kind == 'bias' else 'diff'}"] = _summed(parameter, changes)
    return result


def _comfy_low_rank(target: str, entry: LowRank) -> dict[str, Tensor]:
    tensors = {f"{target}.lora_down.weight": entry.down, f"{target}.lora_up.weight": entry.up}
    if entry.alpha is not None:
        tensors[f"{target}.alpha"] = torch.tensor(entry.alpha)
    if entry.mid is not None:
        tensors[f"{target}.lora_mid.weight"] = entry.mid
    if entry.dora_scale is not None:
        scale = entry.dora_scale  # PEFT keeps the rows' magnitudes flat; ComfyUI wants them to broadcast
        tensors[f"{target}.dora_scale"] = scale.reshape(-1, *[1] * (entry.up.ndim - 1)) if scale.ndim == 1 else scale
    return tensors


def _summed(parameter: str, changes: tuple[Entry, ...]) -> Tensor:
    if len(changes) == 1 and isinstance(changes[0], Diff):
        return changes[0].value
    if any(isinstance(entry, LowRank) and entry.dora_scale is not None for entry in changes):
        raise CheckpointError(
            f"the LoRA changes {parameter} by a DoRA together with a convolution core or a difference; convert it again"
        )
    return torch.stack([delta(entry, 1.0, shape=changes[-1].shape) for entry in changes]).sum(0)


def _other_adapter(names: Iterable[str]) -> str | None:
    """What the keys are where they belong to another kind of adapter."""
    kinds = {".lokr_": "LoKr", ".hada_": "LoHa", ".oft_": "OFT", ".boft_": "BOFT", ".a1.": "GLoRA"}
    found = next((kind for name in names for mark, kind in kinds.items() if mark in name), None)
    return f"belong to a {found} adapter, which this loader does not take" if found else None


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
