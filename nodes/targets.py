"""Names that users give to files which a node writes, as paths inside one of ComfyUI's model folders."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..wan_fp8.errors import InputError

SUFFIX = ".safetensors"


def target_path(kind: str, name: str, ending: str = "") -> Path:
    """``models/<kind>/<name><ending>.safetensors``; the name may bring folders and the suffix.

    Raises:
        InputError: no name, or one that leads out of the folder.
    """
    folders = folder_paths.get_folder_paths(kind)
    root = next((folder for folder in folders if os.path.basename(folder) == kind), folders[0])
    bare = name.strip().removesuffix(SUFFIX)
    path = Path(os.path.abspath(os.path.join(root, f"{bare}{ending}{SUFFIX}")))
    inside = str(path).startswith(os.path.abspath(root) + os.sep)
    if not os.path.basename(bare) or not inside or "\0" in name:
        raise InputError(
            f"{name!r} is no name for a file in models/{kind}: give one such as 'wan2.2_t2v', with folders before it "
            "if you like, and no '..'"
        )
    return path
