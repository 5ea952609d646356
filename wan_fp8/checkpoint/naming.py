"""What a file or folder name says: which expert, which Wan version. Tensors cannot tell either."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

HIGH_NOISE, LOW_NOISE = "high_noise", "low_noise"
EXPERTS = (HIGH_NOISE, LOW_NOISE)

_SUBFOLDERS = {"high_noise_model": HIGH_NOISE, "low_noise_model": LOW_NOISE, "transformer_2": LOW_NOISE}
_NO_EXPERT = "v?ram|mem|res|quality|step|rank|bit|poly"
"""What follows "high" or "low" when the name speaks of something else."""
_EXPERT = re.compile(rf"(?:^|[^a-z])(high|low)(?![\W_]*(?:{_NO_EXPERT}))[\W_]*(?:noise)?(?:[^a-z]|$)")
_WAN_21 = re.compile(r"wan[\s._-]*2[._]?1(?!\d)")
_WAN_22 = re.compile(r"(?<!\d)2[._]?2(?!\d)|a14b|(?<![a-z0-9])5b(?![a-z0-9])")


def _words(text: str) -> str:
    """Lower case, with a break where camelCase has one."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()


def expert_from_name(path: str | PurePath | None, metadata: Mapping[str, str] | None = None) -> str | None:
    """``high_noise``, ``low_noise`` or None, from the file's stem, its title in the metadata, or an official folder.

    A name that says both, or neither, gives None: the expert is never guessed.
    """
    texts = []
    if path is not None:
        pure = PurePath(path)
        if pure.name in _SUBFOLDERS:
            return _SUBFOLDERS[pure.name]
        texts.append(pure.stem if pure.suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".gguf") else pure.name)
    if metadata and "modelspec.title" in metadata:
        texts.append(metadata["modelspec.title"])
    for text in texts:
        found = set(_EXPERT.findall(_words(text)))
        if len(found) == 1:
            return f"{found.pop()}_noise"
        if found:
            return None
    if path is not None and PurePath(path).parent.name in _SUBFOLDERS:
        return _SUBFOLDERS[PurePath(path).parent.name]
    return None


def version_from_name(path: str | PurePath | None) -> str | None:
    """``2.2``, ``2.1`` or None, from the last part of a path. An expert counts as 2.2, which alone has experts."""
    if path is None:
        return None
    words = _words(PurePath(path).name)
    if expert_from_name(path) is not None or _WAN_22.search(words):
        return "2.2"
    return "2.1" if _WAN_21.search(words) else None
