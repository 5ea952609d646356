"""The first bytes of a file: which format it really is, and a safetensors header checked to the last offset.

Everything here happens before a byte of tensor memory is taken. Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError
from .tensors import TensorInfo

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

_DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
DTYPES: dict[str, torch.dtype] = {
    stored: getattr(torch, name) for stored, name in _DTYPE_NAMES.items() if hasattr(torch, name)
}

_MAGIC = (
    (b"GGUF", "gguf"),
    (b"PK\x03\x04", "zip"),
    (b"\x80", "pickle"),
    (b"version https://git-lfs", "lfs"),
)


@dataclass(frozen=True, slots=True)
class Header:
    """A checked safetensors header."""

    tensors: dict[str, TensorInfo]
    """In the order of the data, so that reading in this order reads the file once, front to back."""
    offsets: dict[str, int]
    """First byte of each tensor from the start of the file."""
    metadata: dict[str, str]
    file_bytes: int


def sniff(path: Path) -> str:
    """``safetensors``, ``zip`` or ``pickle`` (torch archives), ``gguf``, ``lfs``, ``html``, ``json``, ``empty`` or
    ``unknown``, from the first bytes, whatever the name says."""
    with open_binary(path) as file:
        start = file.read(512)
    if not start:
        return "empty"
    # First, for the length of a header may begin with the byte that begins a pickle.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        return "safetensors"
    for magic, name in _MAGIC:
        if start.startswith(magic):
            return name
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "html"
    return "json" if text.startswith(b"{") else "unknown"


def refuse_format(path: Path, form: str) -> CheckpointError:
    """The error for a file that is no tensor file, by what it is."""
    size = path.stat().st_size
    reasons = {
        "empty": "is empty (0 bytes): the download or copy failed; fetch it again",
        "gguf": "is a GGUF file, which this loader does not take; use the .safetensors of the same model, "
        "or a GGUF loader node",
        "lfs": f"is a Git LFS pointer of {size} bytes, not the weights; run 'git lfs pull' or download the file itself",
        "html": "is a web page, not weights: the download saved an error or log-in page; fetch the file again",
        "json": "is a JSON text, not weights; give the .safetensors file or the folder that holds it",
    }
    reasons["zip"] = reasons["pickle"] = (
        "is a PyTorch pickle under a wrong name, not safetensors; pickles are accepted as .pth and only if they hold "
        "plain tensors: download the model's .safetensors file"
    )
    other = f"is no tensor file ({size} bytes); this loader takes .safetensors, and .pth files of plain tensors"
    return CheckpointError(f"{path.name} {reasons.get(form, other)}")


def open_binary(path: Path) -> BinaryIO:
    """Open for unbuffered reading; a missing or unreadable file is a CheckpointError."""
    try:
        return open(path, "rb", buffering=0)  # type: ignore[return-value]
    except IsADirectoryError:
        raise CheckpointError(f"{path.name} is a folder where a file is needed: choose the file in it") from None
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}; check the name and the folder") from None
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be opened ({error.strerror or error}): give ComfyUI's user the right to read it"
        ) from error


def read_header(path: Path) -> Header:
    """Read and check a safetensors header.

    Raises:
        CheckpointError: another format, a file that ends early or goes on too long, a header that contradicts itself.
    """
    form = sniff(path)
    if form != "safetensors":
        if form == "unknown" and path.stat().st_size < 8:
            raise CheckpointError(f"{path.name} is truncated: {path.stat().st_size} bytes; download it again")
        raise refuse_format(path, form)
    with open_binary(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise _truncated(path, 8 + length, size, "its header alone")
        raw = file.read(length)
    return _checked(path, _parsed(path, raw), 8 + length, size)


def _truncated(path: Path, need: int, have: int, what: str = "its header") -> CheckpointError:
    return CheckpointError(
        f"{path.name} is truncated: {what} promises {need:,} bytes and {have:,} are there; download it again"
    )


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is damaged: {why}; download it again")


def _parsed(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise _damaged(path, f"its header names {name!r} twice")
            found[name] = value
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _checked(path: Path, header: dict[str, Any], start: int, size: int) -> Header:
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata is not a table of strings")
    entries = [(_span(path, name, entry), name, entry) for name, entry in header.items()]
    entries.sort(key=lambda item: item[0])
    tensors, offsets, end = {}, {}, 0
    for (first, last), name, entry in entries:
        if first != end:
            raise _damaged(path, f"the bytes of {name!r} do not follow those before it")
        end = last
        tensors[name] = _info(path, name, entry, last - first)
        offsets[name] = start + first
    if start + end > size:
        raise _truncated(path, start + end, size)
    if start + end < size:
        raise _damaged(path, f"{size - start - end:,} bytes follow its last tensor")
    return Header(tensors, offsets, metadata, size)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    span = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(span, list) or len(span) != 2 or not all(map(_natural, span)) or span[0] > span[1]:
        raise _damaged(path, f"its header gives {name!r} no valid place")
    return span[0], span[1]


def _info(path: Path, name: str, entry: dict[str, Any], nbytes: int) -> TensorInfo:
    shape, stored = entry.get("shape"), entry.get("dtype")
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_natural, shape)) or not isinstance(stored, str):
        raise _damaged(path, f"its header gives {name!r} no valid shape and type")
    dtype = DTYPES.get(stored)
    if dtype is not None:
        expected = dtype.itemsize
        for length in shape:
            expected *= length
        if expected != nbytes:
            raise _damaged(path, f"{name!r} is {stored} {shape}, {expected:,} bytes, but has {nbytes:,}")
    return TensorInfo(tuple(shape), dtype, stored, nbytes)
