"""Where MagCache's curves lie, and which one is a MODEL's: by fingerprint, by name, or the published one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths

from ..wan_fp8.caching import Curve, load_curve, published_for
from ..wan_fp8.caching.curves import mismatch
from ..wan_fp8.errors import InputError
from . import bridge
from .sources import FOLDER_KIND, stamp

CURVES = "wan_magcache"
"""Our kind of model folder: ``models/wan/magcache``."""
AUTO = "auto"
PUBLISHED = "published"
DISTILLED = re.compile(
    r"lightx2v|lightning|distill|(?<!\d)[248][ _-]?steps?(?![a-z])|causvid|accvid|self[ _-]?forcing|fastwan|turbo"
    r"|(?<![a-z])(lcm|dmd2?)(?![a-z])",
    re.IGNORECASE,
)
"""In the names of models and LoRAs that were distilled to a few steps."""


def register_curve_folder() -> None:
    """Make ``models/wan/magcache`` known to ComfyUI. Safe to repeat."""
    folder_paths.add_model_folder_path(CURVES, os.path.join(folder_paths.models_dir, FOLDER_KIND, "magcache"))


def curve_names() -> list[str]:
    """Curve files that are there."""
    return [name for name in folder_paths.get_filename_list(CURVES) if name.endswith(".json")]


def curve_path(name: str) -> Path:
    """File of a name from ``curve_names``. InputError if it is gone."""
    path = folder_paths.get_full_path(CURVES, name)
    if path is None:
        raise InputError(
            f"there is no curve {name!r} below models/wan/magcache: choose one of the list, or measure one with Wan2.2 "
            "Calibrate MagCache"
        )
    return Path(path)


def new_path(name: str) -> Path:
    """Where a curve of this name is written; its folder is made.

    Raises:
        InputError: the name is no plain file name.
    """
    stem = name.removesuffix(".json").strip()
    if not re.fullmatch(r"[\w][\w .+-]{0,99}", stem):
        raise InputError(f"name must be a file name of letters, digits, spaces and . _ + -; got {name!r}")
    folder = Path(folder_paths.get_folder_paths(CURVES)[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{stem}.json"


def fingerprint_of_folder() -> list[Any]:
    """Changes when a curve comes, goes or changes."""
    return [stamp(curve_path(name)) for name in curve_names()]


def find_curve(model: Any, choice: str) -> tuple[Curve | None, str]:
    """The curve for a MODEL with our transformer, and where it comes from; None for the published one of its task.

    Raises:
        InputError: the chosen one is another model's, or there is none for this model.
    """
    spec = bridge.spec_of(model)
    theirs = published_for(spec)
    if choice == AUTO:
        found = _measured(bridge.fingerprint(model))
        if found is not None:
            return found, f"{found.name}, measured on this model"
        reason = mismatch(theirs, spec)
        if reason is not None:
            raise InputError(
                f"{reason}, and models/wan/magcache has none for it: measure one with Wan2.2 Calibrate MagCache"
            )
        assert theirs is not None
        return None, theirs.name
    if choice == PUBLISHED:
        reason = mismatch(theirs, spec)
        if theirs is None:
            raise InputError(f"{reason}: measure one with Wan2.2 Calibrate MagCache")
        return (None, theirs.name) if reason is None else (theirs, f"{theirs.name}, although {reason}")
    curve = load_curve(curve_path(choice))
    reason = mismatch(curve, spec)
    if reason is None and bridge.fingerprint(model) not in {mark for _, mark in curve.models}:
        reason = f"the curve '{curve.name}' was measured on other weights or with other LoRAs"
    if reason is not None:
        raise InputError(f"{reason}: choose '{AUTO}', or measure one with Wan2.2 Calibrate MagCache")
    return curve, f"{curve.name}, measured on this model"


def _measured(mark: str) -> Curve | None:
    """The curve that was measured on the model of this fingerprint; of several the latest."""
    found: list[tuple[float, Curve]] = []
    for name in curve_names():
        path = curve_path(name)
        try:
            curve = load_curve(path)
        except InputError as error:
            bridge.say(f"passed over {error}")
            continue
        if mark in {other for _, other in curve.models}:
            found.append((path.stat().st_mtime, curve))
    return max(found, key=lambda pair: pair[0])[1] if found else None


CHECKPOINT_INPUTS = ("checkpoint", "low_noise")
"""Boxes of Load Wan2.2 Checkpoint, which may name a folder."""


def distilled_names(prompt: Mapping[str, Any] | None, node_id: str | None) -> list[str]:
    """Files and checkpoint folders in the boxes of the nodes that a node's MODELs come from whose names say that they
    were distilled."""
    names: set[str] = set()
    seen: set[str] = set()
    waiting = [] if prompt is None or node_id is None else [str(node_id)]
    while waiting:
        current = waiting.pop()
        inputs = (prompt or {}).get(current, {}).get("inputs", {})
        if current in seen or not isinstance(inputs, Mapping):
            continue
        seen.add(current)
        waiting += [str(value[0]) for value in inputs.values() if isinstance(value, list) and len(value) == 2]
        strengths = [v for k, v in inputs.items() if k.startswith("strength") and isinstance(v, (int, float))]
        if strengths and not any(strengths):
            continue
        files = [
            value
            for name, value in inputs.items()
            if isinstance(value, str) and (name in CHECKPOINT_INPUTS or value.endswith((".safetensors", ".pth")))
        ]
        names |= {name for name in files if DISTILLED.search(name)}
    return sorted(names)
