"""Diffusers' Animate files as if they held what the official ones do.

Two things differ beside the names: a fuser's key and value projections are two tensors (officially one, keys first),
and biases of the motion encoder's activations have one axis (officially four).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..errors import CheckpointError
from .tensors import FP8_DTYPES, TensorInfo, TensorSource

_KEYS = re.compile(r"(face_adapter\.\d+\.)to_k(\.\w+)")
_VALUES = re.compile(r"face_adapter\.\d+\.to_v\.\w+")
_BIAS = re.compile(r"motion_encoder\..*\.act_fn\.bias")


class DiffusersAnimate(TensorSource):
    """``source`` with ``to_k`` and ``to_v`` of every fuser joined as ``to_kv``, which is diffusers' own name for it."""

    def __init__(self, source: TensorSource, prefix: str, *, owned: bool) -> None:
        """``owned``: closing this closes ``source``."""
        self._source, self._prefix, self._owned = source, prefix, owned
        self._parts: dict[str, tuple[str, str]] = {}
        self.label, self.metadata = source.label, source.metadata
        self.tensors = {}
        for name, info in source.tensors.items():
            bare = name.removeprefix(prefix)
            keys = _KEYS.fullmatch(bare)
            if keys is not None:
                joined = f"{prefix}{keys[1]}to_kv{keys[2]}"
                self._parts[joined] = (name, f"{prefix}{keys[1]}to_v{keys[2]}")
                self.tensors[joined] = self._joined(*self._parts[joined])
            elif _BIAS.fullmatch(bare) and len(info.shape) == 1:
                self.tensors[name] = TensorInfo((1, *info.shape, 1, 1), info.dtype, info.stored, info.nbytes)
            elif not _VALUES.fullmatch(bare):
                self.tensors[name] = info

    def _joined(self, keys: str, values: str) -> TensorInfo:
        first, second = self._source.info(keys), self._source.info(values)
        if first.dtype in FP8_DTYPES or second.dtype in FP8_DTYPES or first.dtype != second.dtype:
            raise CheckpointError(
                f"{self.label} stores {keys} as {first.stored} and {values} as {second.stored}, which this loader "
                "cannot join: use the bf16 files, or the official or ComfyUI checkpoint"
            )
        if not first.shape or first.shape[1:] != second.shape[1:]:
            raise CheckpointError(
                f"{self.label} is damaged: {keys} is {list(first.shape)} and {values} {list(second.shape)}; download "
                "it again"
            )
        shape = (first.shape[0] + second.shape[0], *first.shape[1:])
        return TensorInfo(shape, first.dtype, first.stored, first.nbytes + second.nbytes)

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        scale: Tensor | None = None,
    ) -> Tensor:
        parts = self._parts.get(name)
        if parts is not None:
            return torch.cat([self._source.read(part, dtype, device, scale) for part in parts])
        return self._source.read(name, dtype, device, scale).reshape(self.info(name).shape)

    def close(self) -> None:
        if self._owned:
            self._source.close()
