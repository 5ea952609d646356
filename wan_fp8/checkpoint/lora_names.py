"""What a LoRA file's key speaks of: which parameter of the transformer, and which part of the change.

Formats: official and generic (``diffusion_model.blocks.0.self_attn.q.lora_down.weight``), PEFT (``lora_A``, ``lora_B``,
also with an adapter name), bare, kohya and musubi (``lora_unet_blocks_0_self_attn_q``), Wan-Fun (two underscores),
half-converted ones, diffusers (``transformer.blocks.0.attn1.to_q``, ``transformer_2.``), and the full-rank extras of
distilled LoRAs (``.diff``, ``.diff_b``, ``.diff_m``). Source: ComfyUI ``comfy/lora.py``, ``comfy/weight_adapter``;
diffusers ``lora_conversion_utils.py``; LightX2V ``lora_loader.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from .key_maps import DIT, DIT_MODULES, DIT_PARAMETERS

_ADAPTER = r"(?:\.(?!(?:weight|bias)$)[\w-]+)?"


class Part(StrEnum):
    """Which piece of a change a tensor is."""

    DOWN = "down"
    UP = "up"
    MID = "mid"
    ALPHA = "alpha"
    DORA = "dora"
    DIFF = "diff"
    DIFF_BIAS = "diff_b"
    DIFF_MODULATION = "diff_m"


_PARTS = tuple(
    (re.compile(pattern + "$"), part)
    for pattern, part in (
        (rf"\.lora_(?:up|B){_ADAPTER}\.bias", Part.DIFF_BIAS),
        (rf"\.lora_(?:down|A){_ADAPTER}(?:\.weight)?", Part.DOWN),
        (rf"\.lora_(?:up|B){_ADAPTER}(?:\.weight)?", Part.UP),
        (r"(?:[._]lora|\.lora_linear_layer)\.down\.weight", Part.DOWN),
        (r"(?:[._]lora|\.lora_linear_layer)\.up\.weight", Part.UP),
        (r"\.lora_mid\.weight", Part.MID),
        (r"\.alpha", Part.ALPHA),
        (rf"\.(?:dora_scale|lora_magnitude_vector{_ADAPTER}(?:\.weight)?)", Part.DORA),
        (r"\.(?:diff|w_norm)", Part.DIFF),
        (r"\.(?:diff_b|b_norm)", Part.DIFF_BIAS),
        (r"\.diff_m", Part.DIFF_MODULATION),
    )
)
_DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "module.", "unet.", "dit.", "model.")
_EXPERT_PREFIXES = (("transformer_2.", "transformer_2"), ("transformer.", "transformer"))
_FLAT = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")


@dataclass(frozen=True, slots=True)
class LoraKey:
    """A key of a LoRA file, understood."""

    parameter: str
    """Official name of the parameter that changes."""
    part: Part
    component: str | None
    """``transformer`` or ``transformer_2`` where a diffusers prefix says so."""


@lru_cache(maxsize=1 << 16)
def parse_key(key: str) -> LoraKey | None:
    """Understand one key; None when it is no LoRA key of a Wan transformer."""
    part, path = next(((part, key[: m.start()]) for pattern, part in _PARTS if (m := pattern.search(key))), (None, ""))
    if part is None:
        return None
    path, component = _strip(path)
    parameter = _parameter(path, part)
    return None if parameter is None else LoraKey(parameter, part, component)


def _strip(path: str) -> tuple[str, str | None]:
    """Take prefixes off, however they are nested."""
    component = None
    while True:
        for prefix, name in _EXPERT_PREFIXES:
            if path.startswith(prefix):
                path, component = path.removeprefix(prefix), name
                break
        else:
            found = next((prefix for prefix in _DOTTED if path.startswith(prefix)), None)
            if found is None:
                return path, component
            path = path.removeprefix(found)


def _parameter(path: str, part: Part) -> str | None:
    """The official parameter that ``path`` and ``part`` name together."""
    if part is Part.DIFF_MODULATION:
        return f"{path}.modulation" if re.fullmatch(r"blocks\.\d+|head", path) else None
    flat = next((prefix for prefix in _FLAT if path.startswith(prefix)), None)
    official = _dotted(path) if flat is None else _unflatten(path.removeprefix(flat))
    if official is None or official.endswith((".modulation", ".emb_pos", ".bias")):
        return official
    if part is Part.DIFF_BIAS:
        return f"{official}.bias"
    return f"{official}.weight"


def _dotted(path: str) -> str | None:
    """Official path of a module or lone parameter; a trailing ``.weight`` is dropped, ``.bias`` kept."""
    stem = path.removesuffix(".weight")
    if stem.endswith(".bias"):
        return DIT.to_official(stem) if DIT.from_official(stem) is None else stem
    if DIT.from_official(stem) is not None or DIT.from_official(f"{stem}.weight") is not None:
        return stem
    lone = DIT.to_official(stem)
    if lone is not None:
        return lone
    module = DIT.to_official(f"{stem}.weight")
    return None if module is None else module.removesuffix(".weight")


def _flat_rules() -> tuple[tuple[re.Pattern[str], str], ...]:
    rules = []
    for official, diffusers in (*DIT_MODULES, *DIT_PARAMETERS):
        for name in dict.fromkeys((official, diffusers)):
            pattern = re.escape(name.replace(".", "_")).replace(r"\{i\}", r"(?P<i>\d+)")
            rules.append((re.compile(pattern), official.replace("{i}", r"\g<i>")))
    return tuple(rules)


_FLAT_RULES = _flat_rules()


def _unflatten(flat: str) -> str | None:
    """``blocks_0_self_attn_norm_q`` -> ``blocks.0.self_attn.norm_q``, by the list of modules that exist: names such as
    norm_q and k_img have underscores of their own. Dots that a converter left in place do not matter."""
    flat = flat.replace(".", "_")
    for pattern, template in _FLAT_RULES:
        match = pattern.fullmatch(flat)
        if match is not None:
            return match.expand(template)
    return None
