"""Weights that leave the GPU without being copied back.

Core brings a module to the GPU and away from it with ``.to``. On the way back every weight would cross the bus again,
into fresh pageable memory: seconds for an expert of 14 GB, at every switch of experts on a card that holds one, and
host memory in place of a mapped file's pages. Nothing writes to a weight on the GPU (merges make new Parameters), so
the host's tensor is kept and put back. Both experts lay in host memory before the run; what they take there is never
more than that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...wan_fp8.models.layers import Leaf


@dataclass(frozen=True, slots=True)
class Home:
    """Where a parameter that is on another device came from."""

    host: Tensor
    parameter: weakref.ref[nn.Parameter]
    """What ``host`` was moved to, while it holds the same values."""
    address: int

    def serves(self, parameter: nn.Parameter) -> bool:
        """Whether ``parameter`` still holds what ``host`` does."""
        moved = self.parameter() is parameter and self.address == parameter.data_ptr()
        return moved and parameter.shape == self.host.shape and parameter.dtype == self.host.dtype


def move(leaf: Leaf, function: Callable[[Tensor], Tensor]) -> None:
    """``nn.Module._apply`` for the parameters of one leaf; those that go home are put back."""
    for name, parameter in leaf._parameters.items():
        if parameter is None:
            continue
        before, home = parameter.data, leaf.homes.pop(name, None)
        known = home is not None and home.serves(parameter)
        after = home.host if home is not None and known and _goes_to(function, before, home.host) else function(before)
        if torch._has_compatible_shallow_copy_type(parameter, after):
            parameter.data = after
        else:
            parameter = leaf._parameters[name] = nn.Parameter(after, requires_grad=False)
        if before.device.type == "cpu" and after.device.type != "cpu" and before.dtype == after.dtype:
            leaf.homes[name] = Home(before, weakref.ref(parameter), parameter.data_ptr())
        elif home is not None and known and home.serves(parameter):
            leaf.homes[name] = home  # it stays where it was: core moves what is there already at every load


def _goes_to(function: Callable[[Tensor], Tensor], before: Tensor, host: Tensor) -> bool:
    """Whether ``function`` would bring ``before`` to where ``host`` is, as the same type."""
    probe = function(torch.empty(0, dtype=before.dtype, device=before.device))
    return probe.device == host.device and probe.dtype == host.dtype
