"""Named tensors whose shapes are known before their values are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ..errors import CheckpointError

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a stored tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for a stored type that this torch has no name for."""
    stored: str
    """The file's own name of the type (``BF16``, ``F8_E4M3``, ...)."""
    nbytes: int


class TensorSource(ABC):
    """A set of named tensors, in file order, that are read one by one. A context manager: leaving it closes the files;
    tensors already read stay valid."""

    label: str
    """How messages call it: a file or folder name."""
    tensors: Mapping[str, TensorInfo]
    """Every tensor, in file order."""
    metadata: Mapping[str, str]
    """Free text stored beside the tensors; empty where a format has none."""

    @abstractmethod
    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        scale: Tensor | None = None,
    ) -> Tensor:
        """One tensor.

        Args:
            name: a key of ``tensors``.
            dtype: the wanted type; None keeps the stored one.
            device: where it goes.
            scale: multiplied in fp32 before the one rounding to ``dtype``: a scalar, or [rows, 1] for one per row.
        Returns:
            A tensor that the caller owns. On the CPU, in its stored type and without scale, it may be a private
            (copy-on-write) view of the mapped file: writing to it never reaches the file.
        Raises:
            CheckpointError: the file changed or ended early, or its type cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Give file handles and worker threads back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Shape and type of one tensor; CheckpointError when there is no such name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.label} has no tensor named {name}: the file is incomplete or another model's; download it again"
            ) from None


class DictSource(TensorSource):
    """Tensors that are in memory (or mapped) already."""

    def __init__(
        self, state_dict: Mapping[str, Tensor], label: str = "the state dict", metadata: Mapping[str, str] | None = None
    ) -> None:
        self.label, self.metadata = label, dict(metadata or {})
        self._values = dict(state_dict)
        for name, value in self._values.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{label} holds {type(value).__name__} under {name!r}: a state dict maps names to tensors"
                )
        self.tensors = {
            name: TensorInfo(tuple(t.shape), t.dtype, str(t.dtype).removeprefix("torch."), t.numel() * t.element_size())
            for name, t in self._values.items()
        }

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        scale: Tensor | None = None,
    ) -> Tensor:
        self.info(name)
        return convert(self._values[name].detach(), dtype, device, scale)

    def close(self) -> None:
        self._values = {}


def convert(value: Tensor, dtype: torch.dtype | None, device: torch.device | str, scale: Tensor | None) -> Tensor:
    """``value * scale`` in fp32, rounded once to ``dtype``, on ``device``. The bytes travel in their stored type."""
    value = value.to(device)
    if scale is None:
        return value if dtype is None else value.to(dtype)
    factor = scale.to(device=value.device, dtype=torch.float32)
    return (value.to(torch.float32) * factor).to(dtype or torch.float32)
