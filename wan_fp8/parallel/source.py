"""Where a pool's workers read a model from: named, not carried."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models.specs import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A checkpoint on a disk that every worker can read, and how to read it (see ``load_transformer``)."""

    path: str
    expert: str | None = None
    dtype: torch.dtype | None = torch.bfloat16
    keep_fp8: bool = False
    stamp: tuple[tuple[str, int, int], ...] = ()
    """Name, size and time of its files, so that a file that was written again is another source."""

    @classmethod
    def of(
        cls,
        path: str | Path,
        expert: str | None = None,
        *,
        dtype: torch.dtype | None = torch.bfloat16,
        keep_fp8: bool = False,
    ) -> ModelSource:
        """The checkpoint as it lies there now."""
        whole = os.path.abspath(path)
        return cls(path=whole, expert=expert, dtype=dtype, keep_fp8=keep_fp8, stamp=_stamp(Path(whole)))

    @property
    def label(self) -> str:
        """How messages call it."""
        return os.path.basename(self.path) + (f" ({self.expert})" if self.expert else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class HandedSource:
    """Weights that the caller has in memory and hands over before it asks for the model."""

    spec: ModelSpec
    label: str = "a MODEL without a file"


@dataclass(frozen=True, kw_only=True, slots=True)
class VAESource:
    """A Wan VAE on a disk that every worker can read, or one that the caller has in memory and hands over."""

    path: str = ""
    handed: str = ""
    """Name of one that has no file."""
    dtype: torch.dtype = torch.float32
    """What it is kept and computed in."""
    stamp: tuple[tuple[str, int, int], ...] = ()
    version: str = "2.1"
    """Its design, ``2.1`` or ``2.2``."""

    @classmethod
    def of(cls, path: str | Path, dtype: torch.dtype = torch.float32, version: str = "2.1") -> VAESource:
        """The file or folder as it lies there now."""
        whole = os.path.abspath(path)
        return cls(path=whole, dtype=dtype, stamp=_stamp(Path(whole)), version=version)

    @property
    def label(self) -> str:
        """How messages call it."""
        return os.path.basename(self.path) or "a VAE without a file"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource:
    """A text encoder on a disk that the pool's first rank can read, and how to read it (``load_text_encoder``)."""

    path: str
    dtype: torch.dtype = torch.bfloat16
    tokenizer: str | None = None
    stamp: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def of(
        cls, path: str | Path, dtype: torch.dtype = torch.bfloat16, tokenizer: str | Path | None = None
    ) -> TextSource:
        """The file or folder as it lies there now."""
        whole = os.path.abspath(path)
        tokens = None if tokenizer is None else os.path.abspath(tokenizer)
        stamps = _stamp(Path(whole)) + (() if tokens is None else _stamp(Path(tokens), "*"))
        return cls(path=whole, dtype=dtype, tokenizer=tokens, stamp=stamps)

    @property
    def label(self) -> str:
        """How messages call it."""
        return os.path.basename(self.path)


def _stamp(path: Path, pattern: str = "*.safetensors") -> tuple[tuple[str, int, int], ...]:
    files = sorted(path.rglob(pattern)) if path.is_dir() else [path]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
