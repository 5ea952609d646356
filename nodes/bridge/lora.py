"""LoRA files of every Wan format on a MODEL: as core's own patches, which core merges or applies on the fly, or live,
as low-rank branches beside the weights, for what has low rank.

Core's LoRA nodes work on our MODELs as they are. This loader reads more: diffusers and half-converted names,
``diff_m`` (which changes ``modulation``; core does not know the name, and does not apply such a change to its own
model even under another one), PEFT folders with their alphas; and it says what it left out.

A live LoRA touches no weight: it travels in the MODEL's ``HostSettings``, so that clones with other strengths share
one loaded transformer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
from torch import Tensor

from ...wan_fp8.checkpoint.live_lora import split
from ...wan_fp8.checkpoint.lora import Entries, LoraFile, fit, read_lora, to_comfy_state_dict
from ...wan_fp8.errors import CheckpointError
from ...wan_fp8.models.low_rank import LiveLora, LiveTerm
from .fork import hosted
from .hosted_model import settings_of
from .settings import with_settings

logger = logging.getLogger("wan_fp8")


@dataclass(frozen=True, slots=True)
class WithLora:
    """A MODEL that carries one more LoRA."""

    model: Any
    changed: int
    """Parameters that it changes."""
    notes: tuple[str, ...]
    """One sentence for each group of keys that was left out, or merged though live was asked for."""
    live: int = 0
    """Linears that it changes by a branch beside the weight; they are among ``changed``."""


def load_lora(
    model: Any,
    source: str | Path | Mapping[str, Tensor] | LoraFile,
    strength: float = 1.0,
    *,
    expert: str | None = None,
    live: bool = False,
) -> WithLora:
    """A clone of MODEL (forked first if its transformer is core's) with the LoRA attached; nothing is merged yet.

    Args:
        source: A file, a PEFT folder, a state dict, or what ``read_lora`` returned.
        strength: Factor; negative takes the change back. 0 attaches nothing.
        expert: "high_noise" or "low_noise", for a file with separate changes for the two.
        live: Low-rank changes of linears run beside the weights; what cannot is merged, and named in the notes.
    Raises:
        CheckpointError: damaged, no Wan LoRA, of another model's size, or it changes nothing here.
        InputError: the file has separate changes for two experts and none was named.
    """
    lora = source if isinstance(source, LoraFile) else read_lora(source)
    clone = hosted(model).clone()
    net = clone.model.diffusion_model
    fitting = fit(lora, {name: tuple(p.shape) for name, p in net.named_parameters()}, expert)
    for note in fitting.skipped:
        logger.warning("%s", note)
    if strength == 0:
        return WithLora(clone, 0, fitting.skipped)
    if not live:
        return WithLora(clone, _patch(clone, lora.label, fitting.entries, strength), fitting.skipped)
    parts = split(fitting.entries, net)
    if parts.live:
        carried = settings_of(clone).lora or net.lora or LiveLora(())
        clone = with_settings(clone, lora=carried.plus(LiveTerm(lora.label, strength, parts.live)))
    if parts.rest:
        _patch(clone, lora.label, parts.rest, strength)
    told = parts.describe_rest()
    notes = fitting.skipped if told is None else (*fitting.skipped, f"{lora.label}: {told}")
    changed = {f"{name}.weight" for name in parts.live} | set(parts.rest)
    return WithLora(clone, len(changed), notes, len(parts.live))


def _patch(clone: Any, label: str, entries: Entries, strength: float) -> int:
    """Attach changes as core's patches; how many parameters they change.

    Raises:
        CheckpointError: core did not take one.
    """
    names = comfy.lora.model_lora_keys_unet(clone.model, {})
    patches = comfy.lora.load_lora(to_comfy_state_dict(entries), names)
    taken = {key if isinstance(key, str) else key[0] for key in clone.add_patches(patches, strength)}
    lost = sorted(name for name in entries if f"diffusion_model.{name}" not in taken)
    if lost:
        raise CheckpointError(
            f"{label}: this ComfyUI did not take the change of {lost[0]} ({len(lost)} in all); update ComfyUI, or "
            "load the LoRA with another node"
        )
    return len(taken)
