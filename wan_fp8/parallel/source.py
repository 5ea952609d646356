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


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
