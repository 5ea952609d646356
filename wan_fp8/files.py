"""Small files, whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from .errors import InputError


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content``; a file of that name is replaced once all of it is on the disk.

    Raises:
        InputError: the folder or the disk cannot take it; nothing is left behind.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"{path.name} could not be written to {path.parent} ({error.strerror or error}): choose another place"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
