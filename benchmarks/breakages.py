"""Mistakes made on purpose, to see that a check of quality catches them. Eager kernels only, but for ``means``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

BREAKAGES = ("scale", "means", "cache")
ENDLESS = 10**6


@contextmanager
def broken(what: str) -> Iterator[None]:
    """While inside: every FP8 scale is 1 (``scale``), FP8 attention keeps the means of K and V (``means``). ``cache``
    is the business of whoever makes the policy: see ``ENDLESS``. An empty name breaks nothing.

    Recipes must be applied inside.
    """
    with ExitStack() as stack:
        if what == "scale":
            _scales_of_one(stack)
        if what == "means":
            cast = importlib.import_module("wan_fp8.kernels.attention_cast")
            with_means = functools.partial(cast.eager, smooth=False)
            stack.enter_context(mock.patch.object(cast, "fused", with_means))
            stack.enter_context(mock.patch.object(cast, "eager", with_means))
        yield


def _scales_of_one(stack: ExitStack) -> None:
    quantize = importlib.import_module("wan_fp8.kernels.quantize")
    linear = importlib.import_module("wan_fp8.quant.linear")
    calibrate = importlib.import_module("wan_fp8.quant.calibrate")

    def factors(amax: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return torch.ones_like(amax), torch.ones_like(amax)

    def current(amax: Tensor, margin: int = 0) -> Tensor:
        return torch.ones_like(amax)

    def keep(scales: object) -> None:
        """DelayedScales begin with scales of 1."""

    patches = (
        (quantize, "_factors", factors),
        (quantize, "current_multiplier", current),
        (linear, "current_multiplier", current),
        (calibrate.DelayedScales, "_set_scales", keep),
    )
    for owner, name, replacement in patches:
        stack.enter_context(mock.patch.object(owner, name, replacement))
