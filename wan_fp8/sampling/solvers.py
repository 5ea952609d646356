"""Solvers of the flow ODE ``dx/dsigma = v(x, sigma)``, by the formulas of the published schedulers.

Conventions: x = (1 - sigma) x0 + sigma noise, v = noise - x0, so the model's estimate of the clean latent is m = x -
sigma v. lambda(sigma) = ln(1 - sigma) - ln(sigma) is half the log signal-to-noise ratio; it is -inf at sigma 1 and
+inf at 0, and every formula below has its limit there.

A solver belongs to one video. It is indexed by step, not looked up by timestep: neighbouring integer timesteps may
coincide, and a look-up then starts at the wrong step. It does not know which expert made the velocity, so its history
carries across the switch.

Source: Wan-Video/Wan2.2 ``wan/utils/fm_solvers_unipc.py`` (UniPC order 2, bh2, arXiv:2302.04867) and
``wan/utils/fm_solvers.py`` (DPM-Solver++ 2M midpoint, arXiv:2211.01095).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .schedules import check_solver


def _log_snr(sigma: float) -> float:
    if sigma >= 1:
        return -math.inf
    return math.inf if sigma <= 0 else math.log1p(-sigma) - math.log(sigma)


class Solver(ABC):
    """One pass over a schedule. ``x = solver.step(velocity, index, x)`` for index 0, 1, … , steps - 1.

    Args:
        sigmas: [steps + 1] noise levels in 0..1, decreasing; a float32 tensor is taken at its exact values. The last
            one need not be 0 (a schedule that ends early leaves noise).
    Raises:
        InputError: the schedule is too short, not decreasing or out of range.
    """

    def __init__(self, sigmas: Tensor | Sequence[float]) -> None:
        values = [float(s) for s in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
        if len(values) < 2:
            raise InputError(
                f"a solver needs at least two sigmas (before and after one step); got {len(values)}: take one step "
                "or more"
            )
        if not all(0 <= s <= 1 for s in values):
            raise InputError(
                f"sigmas of a flow model lie in 0..1; got {min(values):g} to {max(values):g}: make them with Wan2.2 "
                "Sigmas, or with a scheduler of core's on this MODEL"
            )
        for index, (before, after) in enumerate(itertools.pairwise(values)):
            if after >= before:
                raise InputError(
                    f"sigmas must decrease at every step; step {index} goes from {before:.9g} to {after:.9g}. "
                    "Take fewer steps or another schedule"
                )
        self._sigmas = values
        self._log_snrs = [_log_snr(s) for s in values]
        self.reset()

    @property
    def steps(self) -> int:
        """Number of model evaluations of the whole pass."""
        return len(self._sigmas) - 1

    @property
    def next_index(self) -> int:
        """The index that the next call of ``step`` must have."""
        return self._next_index

    def reset(self) -> None:
        """Forget everything of the current video; the next step is step 0."""
        self._next_index = 0

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        """Advance from ``sigmas[index]`` to ``sigmas[index + 1]``.

        Args:
            velocity: The model's output for ``x``, any shape, any float dtype.
            index: Number of this step; steps are called once each, in order.
            x: Latents at ``sigmas[index]``, same shape.
        Returns:
            Latents at ``sigmas[index + 1]`` in the dtype of ``x``, a new tensor.
        Raises:
            InputError: the step is out of order, or the shapes differ.
        Numerics: coefficients in float64; tensors in the dtype of ``x``, but at least float32.
        """
        if index != self._next_index or index == self.steps:
            raise InputError(self._order_message(index))
        if velocity.shape != x.shape:
            raise InputError(
                f"velocity and latents must have one shape; got {tuple(velocity.shape)} for {tuple(x.shape)}"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        sample = x.to(dtype)
        result = self._advance(sample - self._sigmas[index] * velocity.to(dtype), index, sample, velocity.to(dtype))
        self._next_index += 1
        return result.to(x.dtype)

    def _order_message(self, index: int) -> str:
        if self._next_index == self.steps:
            return f"this pass of {self.steps} steps is complete; got step {index}. Call reset() before another video"
        return (
            f"solver steps must be called once each and in order; got step {index}, the next is {self._next_index} of "
            f"0..{self.steps - 1}. Call reset() to start over"
        )

    @abstractmethod
    def _advance(self, clean: Tensor, index: int, x: Tensor, velocity: Tensor) -> Tensor:
        """``clean`` is the x0 estimate at step ``index``; must not change its arguments."""


class Euler(Solver):
    """First order: ``x' = x + (sigma' - sigma) v``. The solver of the four-step distilled models."""

    def _advance(self, clean: Tensor, index: int, x: Tensor, velocity: Tensor) -> Tensor:
        del clean
        return x + (self._sigmas[index + 1] - self._sigmas[index]) * velocity


class DPMpp(Solver):
    """DPM-Solver++ 2M (midpoint), deterministic: first order on the first and last steps, second order between.

    From sigma 1 the second step is effectively first order too, since lambda is -inf there. The published class
    computes in float32 whatever the latents' dtype; this one keeps float64.
    """

    def reset(self) -> None:
        super().reset()
        self._previous: Tensor | None = None

    def _advance(self, clean: Tensor, index: int, x: Tensor, velocity: Tensor) -> Tensor:
        del velocity
        sigma, sigma_next = self._sigmas[index], self._sigmas[index + 1]
        h = self._log_snrs[index + 1] - self._log_snrs[index]
        target = clean
        if self._previous is not None and index < self.steps - 1:
            ratio = (self._log_snrs[index] - self._log_snrs[index - 1]) / h
            target = clean + (0.5 / ratio) * (clean - self._previous)
        self._previous = clean
        return (sigma_next / sigma) * x - (1 - sigma_next) * math.expm1(-h) * target


class UniPC(Solver):
    """UniPC of order 2 (B(h) = expm1(-h), "bh2") with its corrector, predicting the clean latent: the published
    default.

    Each step first corrects the sample that the previous step predicted, with the velocity just computed there, then
    predicts the next one from the corrected sample. The velocity is not recomputed after the correction. Order 1 on
    the first and last steps.
    """

    def reset(self) -> None:
        super().reset()
        self._history: list[Tensor] = []
        """Clean estimates of up to two previous steps, oldest first; made from uncorrected samples."""
        self._corrected: Tensor | None = None
        """Sample that the previous prediction started from."""
        self._order = 0
        """Order of the previous prediction; its correction has the same."""

    def _advance(self, clean: Tensor, index: int, x: Tensor, velocity: Tensor) -> Tensor:
        del velocity
        corrected = x if self._corrected is None else self._correct(clean, index, self._corrected)
        self._history = [*self._history[-1:], clean]
        self._order = min(2, self.steps - index, len(self._history))
        self._corrected = corrected
        return self._predict(index, corrected)

    def _base(self, start: int, x: Tensor, clean: Tensor) -> tuple[Tensor, float, float]:
        """The first-order part of a step from ``start`` to ``start + 1``, the factor of its higher orders, and h."""
        sigma, sigma_next = self._sigmas[start], self._sigmas[start + 1]
        h = self._log_snrs[start + 1] - self._log_snrs[start]
        factor = (1 - sigma_next) * math.expm1(-h)
        return (sigma_next / sigma) * x - factor * clean, factor, h

    def _predict(self, index: int, x: Tensor) -> Tensor:
        base, factor, h = self._base(index, x, self._history[-1])
        if self._order == 1:
            return base
        ratio = (self._log_snrs[index - 1] - self._log_snrs[index]) / h
        return base - (0.5 * factor / ratio) * (self._history[-2] - self._history[-1])

    def _correct(self, clean: Tensor, index: int, x: Tensor) -> Tensor:
        previous = self._history[-1]
        base, factor, h = self._base(index - 1, x, previous)
        if self._order == 1:
            return base - (0.5 * factor) * (clean - previous)
        ratio = (self._log_snrs[index - 2] - self._log_snrs[index - 1]) / h
        older_weight, newer_weight = _corrector_weights(h, ratio)
        change = (older_weight / ratio) * (self._history[-2] - previous) + newer_weight * (clean - previous)
        return base - factor * change


def _corrector_weights(h: float, ratio: float) -> tuple[float, float]:
    """Solve [[1, 1], [ratio, 1]] rho = b of the second-order corrector; ``ratio`` may be -inf (a history that starts
    at sigma 1)."""
    b_h = math.expm1(-h)
    phi_1 = -b_h / h - 1
    phi_2 = -phi_1 / h - 0.5
    b1, b2 = phi_1 / b_h, 2 * phi_2 / b_h
    older = (b2 - b1) / (ratio - 1)
    return older, b1 - older


SOLVERS: dict[str, type[Solver]] = {"unipc": UniPC, "dpm++": DPMpp, "euler": Euler}


def make_solver(name: str, sigmas: Tensor | Sequence[float]) -> Solver:
    """A fresh solver by name ("unipc", "dpm++", "euler"). InputError names the allowed ones."""
    check_solver(name)
    return SOLVERS[name](sigmas)
