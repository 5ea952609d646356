"""From what the loader's boxes say to files: ComfyUI's model folders, partners of single files, and what changes when a
file does."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ..wan_fp8.checkpoint.folder import CheckpointFolder, resolve_folder
from ..wan_fp8.checkpoint.listing import find_checkpoints
from ..wan_fp8.checkpoint.naming import HIGH_NOISE, LOW_NOISE, expert_from_name
from ..wan_fp8.errors import CheckpointError, InputError, WanFP8Error
from ..wan_fp8.models.tokenizer import find_tokenizer

FOLDER_KIND = "wan"
"""Our kind of model folder: ``models/wan/<checkpoint folder>``, and every ``wan:`` of an extra model paths file."""
FILE_KIND = "diffusion_models"
SCALE_KIND = "wan_fp8_scales"
"""Activation scales that runs ended with; also a name for an extra model paths file."""

AUTO = "auto"
NONE = "none"
FROM_CHECKPOINT = "from checkpoint"
NOTHING_FOUND = "nothing found: put a Wan2.2 folder into models/wan"

_WEIGHTS = (".safetensors", ".pth", ".json", ".model")


def register_model_folder() -> None:
    """Make ``models/wan`` and ``models/wan_fp8_scales`` known to ComfyUI. Safe to repeat."""
    for kind in (FOLDER_KIND, SCALE_KIND):
        folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, kind))


def checkpoint_names() -> list[str]:
    """Checkpoint folders below ``models/wan``, then files of ``models/diffusion_models``."""
    return [*_folders(), *folder_paths.get_filename_list(FILE_KIND)]


def _folders() -> dict[str, Path]:
    """Path by name; of two roots with the same name, the first one counts, as everywhere in ComfyUI."""
    found: dict[str, Path] = {}
    for root in folder_paths.get_folder_paths(FOLDER_KIND):
        for checkpoint in find_checkpoints(root):
            found.setdefault(checkpoint.name, checkpoint.path)
    return found


def checkpoint_path(name: str) -> Path:
    """Folder or file of a name from ``checkpoint_names``.

    Raises:
        CheckpointError: there is nothing of that name.
    """
    if name == NOTHING_FOUND:
        wanted = ", ".join(folder_paths.get_folder_paths(FOLDER_KIND))
        raise CheckpointError(
            f"there is no checkpoint to load: put an official or Diffusers Wan2.2 folder into {wanted}, or its "
            "single files into models/diffusion_models, and reload the page"
        )
    for root in folder_paths.get_folder_paths(FOLDER_KIND):
        path = Path(root) / name
        inside = os.path.abspath(path).startswith(os.path.abspath(root) + os.sep)
        if inside and os.path.isdir(path):  # Path.is_dir raises for a name that is too long
            return path
    return file_path(FILE_KIND, name)


def file_path(kind: str, name: str) -> Path:
    """A file of one of ComfyUI's model folders. CheckpointError if it is gone."""
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise CheckpointError(f"models/{kind} has no file {name}: choose another, or put it there and reload the page")
    return Path(path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What the boxes ask for, as paths. Nothing has been opened."""

    folder: CheckpointFolder | None
    """The checkpoint folder; None for single files."""
    high: tuple[Path, str | None]
    """File or folder, and which expert to take from a folder of two."""
    low: tuple[Path, str | None] | None
    """None where 'auto' found no partner, and for one-expert models."""
    alone: bool
    """The user asked for one expert only."""


def select(checkpoint: str, low_noise: str) -> Selection:
    """Resolve the boxes 'checkpoint' and 'low_noise'.

    Raises:
        CheckpointError: something is missing, or the folder is no checkpoint.
        InputError: both boxes name the low-noise expert.
    """
    path = checkpoint_path(checkpoint)
    folder = resolve_folder(path) if path.is_dir() else None
    if folder is not None and HIGH_NOISE in folder.transformers:
        if low_noise not in (AUTO, NONE):
            raise InputError(
                f"{checkpoint} brings both experts, and 'low_noise' names {low_noise}: set low_noise to '{AUTO}'"
            )
        low = None if low_noise == NONE else (path, LOW_NOISE)
        return Selection(folder=folder, high=(path, HIGH_NOISE), low=low, alone=low_noise == NONE)
    if low_noise == NONE:
        return Selection(folder=folder, high=(path, None), low=None, alone=True)
    partner = find_partner(checkpoint) if low_noise == AUTO else low_noise
    if partner is None:
        return Selection(folder=folder, high=(path, None), low=None, alone=False)
    other = checkpoint_path(partner)
    if low_noise == AUTO and expert_from_name(checkpoint) == LOW_NOISE:
        path, other = other, path
    return Selection(folder=folder, high=(path, None), low=(other, None), alone=False)


def find_partner(name: str) -> str | None:
    """The name that differs from ``name`` only in saying "low" for "high" or the other way round; None without one."""
    expert = expert_from_name(name)
    if expert is None:
        return None
    wanted = _without_expert(name)
    found = [
        other
        for other in checkpoint_names()
        if other != name and expert_from_name(other) not in (None, expert) and _without_expert(other) == wanted
    ]
    return found[0] if len(found) == 1 else None


def _without_expert(name: str) -> str:
    return re.sub("high|low", "*", name.lower().replace("\\", "/"))


def fingerprint(checkpoint: str | None, low_noise: str | None, text_encoder: str | None, vae: str | None) -> str:
    """Changes when any file that the boxes lead to does (size or time); None stands for a box that is linked."""
    seen: list[object] = [checkpoint, low_noise, text_encoder, vae]
    try:
        if checkpoint is not None:
            chosen = select(checkpoint, low_noise or AUTO)
            paths = {place[0] for place in (chosen.high, chosen.low) if place is not None}
            seen += [stamp(path) for path in sorted(paths)]
        for kind, name in (("text_encoders", text_encoder), ("vae", vae)):
            if name not in (None, FROM_CHECKPOINT):
                path = file_path(kind, str(name))
                seen.append(stamp(path))
                tokenizer = find_tokenizer(path) if kind == "text_encoders" else None
                seen.append(None if tokenizer is None else stamp(tokenizer))
    except WanFP8Error as error:  # the run itself will raise it, where the user sees it
        seen.append(str(error))
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def stamp(path: Path) -> tuple[object, ...]:
    """Size and time of a file, or of every weight and configuration file in a folder and the folders in it."""
    if path.is_file():
        info = path.stat()
        return (str(path), info.st_size, info.st_mtime_ns)
    files = sorted(f for f in (*path.glob("*"), *path.glob("*/*"), *path.glob("*/*/*")) if f.suffix in _WEIGHTS)
    return tuple(stamp(file) for file in files if file.is_file())
