"""Which checkpoint folders lie below a root such as ``models/wan``: by names and small JSON files, never by weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..models.specs import Task
from .folder import EXPERT_FOLDERS, config_task
from .reader import read_json

logger = logging.getLogger(__name__)

MAX_DEPTH = 3
"""Folders below the root: ``<organisation>/<repository>`` and one more."""
_PARTS = {*EXPERT_FOLDERS.values(), "transformer", "transformer_2"}


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """A folder that looks like a checkpoint."""

    name: str
    """Path below the root, with forward slashes on every system."""
    path: Path
    kind: str
    """``official`` or ``diffusers``."""
    task: Task | None
    """From ``config.json``; None where it does not say."""


def find_checkpoints(root: str | Path, depth: int = MAX_DEPTH) -> list[FoundCheckpoint]:
    """Checkpoint folders at most ``depth`` levels below ``root``, sorted by name; [] for a root that does not exist.

    One directory scan per folder, and one small JSON file per checkpoint. Folders without permission are logged and
    left out.
    """
    root = Path(root)
    return sorted(_walk(root, root, depth), key=lambda found: found.name.lower()) if root.is_dir() else []


def _walk(root: Path, folder: Path, depth: int) -> Iterator[FoundCheckpoint]:
    files, folders = _scan(folder)
    kind = None if folder == root else _kind(files, folders)
    if kind is not None:
        name = folder.relative_to(root).as_posix()
        yield FoundCheckpoint(name, folder, kind, _task(folder, files, folders))
        return
    if depth > 0:
        for name in sorted(folders):
            yield from _walk(root, folder / name, depth - 1)


def _scan(folder: Path) -> tuple[set[str], set[str]]:
    """Names of the files that matter and of the subfolders; hidden ones are left out."""
    files, folders = set(), set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.endswith((".json", ".safetensors")):
                    files.add(entry.name)
                elif entry.is_dir():
                    folders.add(entry.name)
    except OSError as error:
        logger.warning("%s cannot be listed: %s", folder, error.strerror or error)
    return files, folders


def _kind(files: set[str], folders: set[str]) -> str | None:
    if "model_index.json" in files:
        return "diffusers" if "transformer" in folders else None
    if any(name in folders for name in EXPERT_FOLDERS.values()):
        return "official"
    shards = any(name.startswith("diffusion_pytorch_model") for name in files)
    return "official" if shards and "config.json" in files else None


def _task(folder: Path, files: set[str], folders: set[str]) -> Task | None:
    home = folder if "config.json" in files else next((folder / n for n in sorted(_PARTS & folders)), folder)
    try:
        return config_task(read_json(home / "config.json")) if (home / "config.json").is_file() else None
    except CheckpointError as error:
        logger.warning("%s", error)
        return None
