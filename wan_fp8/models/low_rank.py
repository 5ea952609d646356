"""LoRAs that stay beside the weights: a low-rank branch on each linear, its strength free to change from run to run.

A ``LiveLora`` names linears, their matrices and a strength, wherever those tensors lie; it never changes, so that it
can be handed on by reference. The first forward that is asked for it puts its matrices on the device, all LoRAs of a
linear stacked into one pair, strength multiplied in; ``begin_run`` and ``remove`` take them away again. A linear
without a branch runs the code that it always ran.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels import low_rank
from ..kernels.quantize import QuantizedActivation
from .layers import Linear

log = logging.getLogger("wan_fp8")

COMPUTED = ("blocks.", "text_embedding.", "img_emb.", "face_encoder.", "face_adapter.", "audio_injector.")
"""Beginnings of the names of linears that run in the model's compute type; the others run in its high one."""


class LowRankPair(Protocol):
    """The change ``factor * up @ down`` of a weight."""

    @property
    def down(self) -> Tensor:
        """[rank, D_in], or with trailing axes of 1."""

    @property
    def up(self) -> Tensor:
        """[D_out, rank], or with trailing axes of 1."""

    @property
    def factor(self) -> float:
        """alpha / rank, or 1."""


@dataclass(frozen=True, slots=True, eq=False)
class LiveTerm:
    """One LoRA of several."""

    label: str
    """What messages call it."""
    strength: float
    pairs: Mapping[str, LowRankPair]
    """By the name of the linear, ``blocks.0.self_attn.q``."""


@dataclass(frozen=True, slots=True, eq=False)
class LiveLora:
    """LoRAs whose changes are added up. Two of these are the same only if they are one object."""

    terms: tuple[LiveTerm, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveLora:
        """Hosts copy their settings in depth; nothing here ever changes."""
        return self

    def plus(self, term: LiveTerm) -> LiveLora:
        """These LoRAs and one more."""
        return LiveLora((*self.terms, term))

    def stacked(self) -> dict[str, list[tuple[float, LowRankPair]]]:
        """Factors (strength included) and matrices by linear, in the order of the LoRAs; those of strength 0 are not
        there."""
        found: dict[str, list[tuple[float, LowRankPair]]] = {}
        for term in self.terms:
            if term.strength != 0:
                for name, pair in term.pairs.items():
                    found.setdefault(name, []).append((term.strength * pair.factor, pair))
        return found

    def device_bytes(self, dtype: torch.dtype) -> int:
        """What its matrices take on the device during a run."""
        values = 0
        for pairs in self.stacked().values():
            rank, first = sum(pair.down.shape[0] for _, pair in pairs), pairs[0][1]
            values += _padded(rank) * (first.down.shape[1] + first.up.shape[0])
        return values * dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """The low-rank branch of one linear, ready to run."""

    down_RD: Tensor
    up_NR: Tensor
    fused: bool
    """The Triton kernels, or their eager references."""

    def add_(self, y: Tensor, x: Tensor | QuantizedActivation) -> Tensor:
        """``y += x A^T B^T`` in place: x [..., D], y [..., N] in the type of the matrices; returns y."""
        return low_rank.add_(y, low_rank.project(x, self.down_RD, fused=self.fused), self.up_NR, fused=self.fused)


@dataclass(slots=True)
class Placed:
    """What a model carries at the moment."""

    key: tuple[LiveLora, torch.device, torch.dtype, bool]
    linears: list[Linear]

    def remove(self) -> None:
        """Take every branch off."""
        for linear in self.linears:
            del linear.low_rank  # the class's None shows again: torch.compile sees the module that it knew


def place(
    model: nn.Module, lora: LiveLora, device: torch.device, dtype: torch.dtype, high_dtype: torch.dtype, fused: bool
) -> Placed:
    """Give the linears of ``model`` their branches; they must have none.

    Args:
        dtype: type of the inputs of blocks and text embedding.
        high_dtype: that of the other linears' inputs.
    Raises:
        InputError: the LoRA names a linear that the model has not, or one of another shape; no branch is left.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    branches: dict[str, Branch] = {}
    for name, pairs in lora.stacked().items():
        linear = linears.get(name)
        if linear is None:
            raise InputError(
                f"a live LoRA changes {name}, which is no linear of this model: merge it, or choose another"
            )
        kind = dtype if name.startswith(COMPUTED) else high_dtype
        branches[name] = _branch(name, linear, pairs, device, kind, fused)
    for name, branch in branches.items():
        linears[name].low_rank = branch
    return Placed((lora, device, dtype, fused), [linears[name] for name in branches])


def _branch(
    name: str,
    linear: Linear,
    pairs: list[tuple[float, LowRankPair]],
    device: torch.device,
    dtype: torch.dtype,
    fused: bool,
) -> Branch:
    """All changes of one linear as one: ranks add up, strengths go into ``up`` in fp32, which is rounded once."""
    work = torch.promote_types(dtype, torch.float32)
    rank = sum(pair.down.shape[0] for _, pair in pairs)
    down = torch.zeros(_padded(rank), linear.in_features, dtype=dtype, device=device)
    up = torch.zeros(linear.out_features, _padded(rank), dtype=dtype, device=device)
    start = 0
    for factor, pair in pairs:
        thin, wide = pair.down.flatten(1), pair.up.flatten(1)
        if thin.shape[1] != linear.in_features or wide.shape[0] != linear.out_features:
            raise InputError(
                f"a live LoRA changes {name} [{wide.shape[0]}, {thin.shape[1]}], which is "
                f"[{linear.out_features}, {linear.in_features}] here: choose a LoRA of this model's size"
            )
        end = start + thin.shape[0]
        down[start:end] = thin.to(device)
        up[:, start:end] = wide.to(device, work) * factor
        start = end
    return Branch(down, up, fused)


def _padded(rank: int) -> int:
    return rank + -rank % low_rank.RANK_MULTIPLE
