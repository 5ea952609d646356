"""What an FP8 matrix product is asked to do, and the registry of those who do it.

M tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hardware import DeviceCaps
from ..kernels.quantize import Cast, Granularity, QuantizedActivation
from ..registry import KernelRegistry


@dataclass(frozen=True, slots=True)
class GemmRequest:
    """What a backend is asked to do; refusals are decided from this alone."""

    caps: DeviceCaps
    granularity: Granularity
    dtype: torch.dtype
    """Type of the output."""


@dataclass(frozen=True, slots=True)
class GemmRunner:
    """One way to multiply, and what it asks of those around it."""

    multiply: Callable[..., Tensor]
    """``(x, weight [N, K] e4m3, weight_scale, bias [N]) -> [..., N]`` in ``x.dtype``. The weight's scale has the
    granularity of ``x``: (), [N, 1], [N / 128, K / 128] or [N, K / 32]; the bias is added before the only rounding."""
    quantize: Callable[[Tensor, Cast, bool], QuantizedActivation] | None = None
    """``(x, cast, gelu)``: a cast of its own. A ``tensor`` cast without a multiplier takes the tensor's own maximum.
    None: ours."""
    multiples: tuple[tuple[Granularity, int], ...] = ()
    """Token counts that it needs to be divisible by something."""
    takes_values: bool = False
    """``x`` comes as a plain tensor in high precision: only the weight is in FP8."""

    def __call__(
        self, x: QuantizedActivation | Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        assert isinstance(x, Tensor) is self.takes_values
        return self.multiply(x, weight, weight_scale, bias)


GEMM: KernelRegistry[GemmRequest] = KernelRegistry("FP8 GEMM")
"""``run`` of each backend is a ``GemmRunner``."""


def token_multiple(runner: GemmRunner, granularity: Granularity) -> int:
    """What the number of tokens must be a multiple of; the model pads once per forward."""
    return dict(runner.multiples).get(granularity, 1)


def padded_block_scale(scale: Tensor) -> Tensor:
    """A weight's block scales [N / 128, K / 128] as wide as a multiple of four, as GEMMs read them. Wan's widths are so
    already: nothing is copied."""
    extra = -scale.shape[1] % 4
    return F.pad(scale, (0, extra)) if extra else scale


def register_backends() -> None:
    """Import every backend file; done at first use, so that importing the models stays light."""
    from . import backends

    assert backends.__all__
