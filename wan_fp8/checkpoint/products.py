"""Changes of a weight that are products of small matrices in other ways than a LoRA's: LoHa and LoKr.

Source: KohakuBlueleaf/LyCORIS ``lycoris/functional/loha.py`` and ``lokr.py``; scaling as ComfyUI's ``weight_adapter``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Hadamard:
    """LoHa: ``(up1 @ down1) * (up2 @ down2)``, element by element."""

    up1: Tensor
    """[out, rank]; with ``core1`` [rank, out]."""
    down1: Tensor
    """[rank, in]"""
    up2: Tensor
    down2: Tensor
    alpha: float | None = None
    core1: Tensor | None = None
    """[rank, rank, ...] of a convolution; both halves have one or neither."""
    core2: Tensor | None = None
    dora_scale: Tensor | None = None
    """See ``LowRank``."""
    like_core: bool = True

    @property
    def factor(self) -> float:
        """alpha / rank, or 1."""
        return 1.0 if self.alpha is None else self.alpha / self.down1.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes."""
        if self.core1 is None:
            return (self.up1.shape[0], self.down1.shape[1])
        return (self.up1.shape[1], self.down1.shape[1], *self.core1.shape[2:])

    def product(self, work: torch.dtype) -> Tensor:
        """The change at strength 1, before ``factor``."""
        return _half(self.up1, self.down1, self.core1, work) * _half(self.up2, self.down2, self.core2, work)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """LoKr: the Kronecker product of two matrices, either of which may be a product of two itself."""

    first: Tensor | None = None
    up1: Tensor | None = None
    down1: Tensor | None = None
    second: Tensor | None = None
    up2: Tensor | None = None
    down2: Tensor | None = None
    core2: Tensor | None = None
    """[rank, rank, ...] of a convolution."""
    alpha: float | None = None
    dora_scale: Tensor | None = None
    """See ``LowRank``."""
    like_core: bool = True

    @property
    def factor(self) -> float:
        """alpha / rank where either matrix is a product, or 1."""
        inner = self.down2 if self.second is None else self.down1 if self.first is None else None
        return 1.0 if self.alpha is None or inner is None else self.alpha / inner.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes."""
        first, second = self._matrices(torch.float32, "meta")
        return (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])

    def product(self, work: torch.dtype) -> Tensor:
        """The change at strength 1, before ``factor``."""
        first, second = self._matrices(work)
        return torch.kron(first.reshape(*first.shape, *(1,) * (second.ndim - first.ndim)), second)

    def _matrices(self, work: torch.dtype, device: str | None = None) -> tuple[Tensor, Tensor]:
        found = []
        for whole, up, down, core in (
            (self.first, self.up1, self.down1, None),
            (self.second, self.up2, self.down2, self.core2),
        ):
            if whole is not None:
                found.append(whole.to(device=device or whole.device, dtype=work))
                continue
            assert up is not None and down is not None
            parts = [None if part is None else part.to(device or part.device) for part in (up, down, core)]
            found.append(_half(parts[0], parts[1], parts[2], work))  # type: ignore[arg-type]
        return found[0], found[1]


def _half(up: Tensor, down: Tensor, core: Tensor | None, work: torch.dtype) -> Tensor:
    if core is None:
        return up.to(work) @ down.to(work)
    return torch.einsum("ij...,jr,ip->pr...", core.to(work), down.to(work), up.to(work)).contiguous()
