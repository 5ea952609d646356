"""PyTorch archives (.pth, .pt, .ckpt): tensors only. Code in them is refused by name and never run."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .tensors import DictSource, TensorSource

MAX_PICKLE_BYTES = 256 << 20
"""Names and shapes of the largest checkpoints take a few megabytes."""
WRAPPERS = ("state_dict", "model", "module", "generator")
"""Keys under which training code puts the state dict."""


def open_archive(path: Path, form: str) -> TensorSource:
    """Open a ``zip`` (mapped, not read) or legacy ``pickle`` archive.

    Raises:
        CheckpointError: truncated or damaged, pickled code, or something other than a state dict.
    """
    if form == "zip":
        _check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=form == "zip")
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except Exception as error:  # a broken pickle makes its reader trip in any way there is
        first_line = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise CheckpointError(f"{path.name} is damaged or cut off ({first_line}); download it again") from error
    return DictSource(_state_dict(path, content), path.name)


def _check_zip(path: Path) -> None:
    """The archive's own table of contents, before torch opens it: complete, uncompressed, no program in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise CheckpointError(
            f"{path.name} is truncated: its table of contents is missing; download it again"
        ) from None
    names = {member.filename.partition("/")[2]: member for member in members}
    if "constants.pkl" in names or any(name.startswith("code/") and name.endswith(".py") for name in names):
        raise CheckpointError(f"{path.name} is a TorchScript program, not plain tensors; use a .safetensors file")
    record = names.get("data.pkl")
    if record is None:
        raise CheckpointError(
            f"{path.name} is a zip file, but not a PyTorch archive; unpack it and give the file inside"
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path.name} is a compressed zip file, not a PyTorch archive; use a .safetensors file")
    if record.file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path.name} has {record.file_size:,} bytes of pickled objects; use a .safetensors file")


def _refused(path: Path, message: str) -> CheckpointError:
    found = re.search(r"GLOBAL ([\w.]+)|(?:class|function) [`'\"]?([\w.]+)", message)
    what = f" ({found[1] or found[2]})" if found else ""
    return CheckpointError(
        f"{path.name} holds pickled code{what}, which was not run; this loader takes plain tensors: "
        "use the .safetensors of the same model"
    )


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """Unwrap what training code wraps; drop step counters and the like beside tensors."""
    for _ in range(2):
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{path.name} holds a {type(content).__name__}, not a table of named tensors; give the "
                "model's weight file"
            )
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path.name} holds no named tensors; give the model's weight file")
    return tensors
