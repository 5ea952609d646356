"""LoRAs on a model without touching its large weights: the low-rank parts run beside them, the rest is merged.

set_lora(model, Lora("style.safetensors", 0.8), Lora("4_steps.safetensors"))
set_lora(model, Lora("style.safetensors", 0.5))     # replaces both
remove_lora(model)                                  # bit-equal to before
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.layers import Linear
from ..models.low_rank import LiveLora, LiveTerm
from ..models.wan import WanModel
from .lora import Diff, Entries, Entry, LoraFile, LowRank, delta, fit, read_lora
from .tensors import TensorSource

log = logging.getLogger("wan_fp8")

Model = TypeVar("Model", bound=WanModel)
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Lora:
    """One LoRA and its strength."""

    source: str | Path | Mapping[str, Tensor] | TensorSource | LoraFile
    """A file, a PEFT folder, a state dict, or what ``read_lora`` returned (which saves reading it again)."""
    strength: float = 1.0
    """Factor on every change; negative takes it back, 0 is exactly no LoRA."""
    expert: str | None = None
    """``high_noise`` or ``low_noise``, for a file with separate changes for the two."""


@dataclass(frozen=True, slots=True)
class Split:
    """The changes of one LoRA by how they can be put to work."""

    live: Mapping[str, LowRank]
    """By the name of the linear: what can run beside the weight."""
    rest: Entries
    """By the name of the parameter: what can only be merged into it."""

    def describe_rest(self) -> str | None:
        """One sentence; None where everything is live."""
        if not self.rest:
            return None
        kinds = sorted({_kind(entry) for entries in self.rest.values() for entry in entries})
        names = ", ".join(list(self.rest)[:_SHOWN]) + (", ..." if len(self.rest) > _SHOWN else "")
        return (
            f"{len(self.rest)} parameters cannot be changed by a live branch and are merged instead "
            f"({', '.join(kinds)}: {names})"
        )


def _kind(entry: Entry) -> str:
    if isinstance(entry, Diff):
        return "full-rank differences"
    if entry.dora_scale is not None:
        return "DoRA"
    return "convolutions" if isinstance(entry, LowRank) else "LoHa and LoKr"


def split(entries: Entries, model: nn.Module) -> Split:
    """Part the changes that fit ``model``: low-rank ones of linears from everything else."""
    live: dict[str, LowRank] = {}
    rest: Entries = {}
    for parameter, changes in entries.items():
        name, _, kind = parameter.rpartition(".")
        linear = kind == "weight" and isinstance(model.get_submodule(name), Linear)
        for change in changes:
            if linear and isinstance(change, LowRank) and change.mid is None and change.dora_scale is None:
                live[name] = change  # a file holds at most one for each weight
            else:
                rest[parameter] = (*rest.get(parameter, ()), change)
    return Split(live, rest)


def set_lora(model: Model, *loras: Lora) -> Model:
    """Put these LoRAs on ``model``, in place of those that ``set_lora`` put there before.

    Low-rank changes of linears stay beside the weights, FP8 or not: setting another strength moves nothing and merges
    nothing. What has no low rank (differences, biases, modulation, norms, the patch embedding) is merged, from the
    original weight where an FP8 one has it, and ``remove_lora`` puts the old parameters back.

    Args:
        loras: any number, whose changes add up; those of strength 0 are as if they were not there.
    Returns:
        ``model``.
    Raises:
        CheckpointError: damaged, no Wan LoRA, of another model's size, or it changes nothing here; nothing was changed.
        InputError: the file has separate changes for two experts and none was named; or see ``remove_lora``.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    terms: list[LiveTerm] = []
    merges: dict[str, list[tuple[Entry, float]]] = {}
    for lora in loras:
        file = lora.source if isinstance(lora.source, LoraFile) else read_lora(lora.source)
        found = fit(file, shapes, lora.expert)
        for sentence in found.skipped:
            log.warning("%s", sentence)
        if lora.strength == 0:
            continue
        parts = split(found.entries, model)
        if parts.live:
            terms.append(LiveTerm(file.label, lora.strength, parts.live))
        for name, entries in parts.rest.items():
            merges.setdefault(name, []).extend((entry, lora.strength) for entry in entries)
        told = parts.describe_rest()
        if told is not None:
            log.info("%s: %s", file.label, told)
    merge_changes(model, merges)
    model.lora = LiveLora(tuple(terms)) if terms else None
    return model


def merge_changes(model: Model, changes: Mapping[str, list[tuple[Entry, float]]], *, more: bool = False) -> Model:
    """Merge changes and their strengths into parameters, by name, in place of all LoRAs that were on ``model``.

    Args:
        more: Beside those; of other parameters.
    Raises:
        InputError: as ``remove_lora``; nothing was changed.
    """
    if not more:
        remove_lora(model)
    for name, entries in changes.items():
        _merge(model, name, entries)
    return model


def remove_lora(model: Model) -> Model:
    """Take off what ``set_lora`` put on: every parameter is the one that it was. Returns the model.

    Raises:
        InputError: a parameter that a LoRA was merged into has been replaced since (a recipe was applied): nothing is
            changed.
    """
    for name, (_, merged) in model.merged_by_lora.items():
        if model.get_parameter(name) is not merged:
            raise InputError(
                f"{name} has changed since a LoRA was merged into it, so that the LoRA cannot be taken out: load the "
                "model again, apply the recipe first and set the LoRA after it"
            )
    for name, (original, merged) in model.merged_by_lora.items():
        owner, _ = _owner(model, name)
        if isinstance(owner, Linear) and owner.is_merged and owner.weight is merged:
            owner._merged = None
        _put(model, name, original)
    model.merged_by_lora.clear()
    model.lora = None
    model.take_lora_away()
    model.clear_text_cache()
    return model


def _merge(model: WanModel, name: str, changes: list[tuple[Entry, float]]) -> None:
    """Add changes to one parameter, in fp32 and rounded once; the old one is kept."""
    owner, kind = _owner(model, name)
    original = model.get_parameter(name)
    stored = original.detach()
    as_weight = isinstance(owner, Linear) and kind == "weight"
    value = owner.convert_weight(stored) if isinstance(owner, Linear) and as_weight else stored
    value = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
    for entry, strength in changes:
        before = value.cpu() if not isinstance(entry, Diff) and entry.dora_scale is not None else None
        value += delta(entry, strength, value.dtype, weight=before, shape=tuple(value.shape)).to(value.device)
    if isinstance(owner, Linear) and as_weight:
        owner.set_weight(value)
    else:
        _put(model, name, nn.Parameter(value.to(stored.dtype), requires_grad=False))
    model.merged_by_lora[name] = (original, model.get_parameter(name))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, kind = name.rpartition(".")
    return model.get_submodule(path), kind


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, kind = _owner(model, name)
    setattr(owner, kind, parameter)
