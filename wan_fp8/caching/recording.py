"""Measure a model's magnitude curve while it samples: one normal run, nothing skipped, one number a token kept."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError
from ..models.blocks import ForwardState
from ..models.specs import ModelSpec
from ..models.wan import StackFunction
from .curves import Curve


@dataclass(slots=True)
class _Run:
    """One model's part of a run."""

    model: Hashable
    expert: str | None
    schedule: tuple[float, ...]
    """Noise levels that it was going to serve, the terminal one left out."""


@dataclass(eq=False)
class Recording:
    """A stack wrapper for one or both experts, and what it has measured.

    It is one object however often a host copies the settings that hold it.
    """

    keeps_input = False
    runs: list[_Run] = field(default_factory=list)
    ratios: dict[tuple[float, int], list[Tensor]] = field(default_factory=dict)
    """By noise level and kind: one scalar for each conditioning (or context window)."""
    _norms: dict[Hashable, tuple[float, Tensor]] = field(default_factory=dict)

    def __copy__(self) -> Recording:
        return self

    def __deepcopy__(self, memo: object) -> Recording:
        del memo
        return self

    def begin(self, model: Hashable, expert: str | None, sigmas: Sequence[float]) -> None:
        """A model is going to serve these noise levels (the terminal one last): what was measured at or below the first
        of them is of an earlier run."""
        top = sigmas[0] * (1 + 1e-6)
        self.runs = [run for run in self.runs if run.schedule[-1] > top]
        kept = {sigma for run in self.runs for sigma in run.schedule}
        self.ratios = {key: value for key, value in self.ratios.items() if key[0] in kept}
        self._norms.clear()
        self.runs.append(_Run(model, expert, tuple(sigmas[:-1])))

    def end(self) -> None:
        """A run is over, however it ended: free what it took on the GPU."""
        self._norms.clear()
        self.ratios = {key: [value.cpu() for value in values] for key, values in self.ratios.items()}

    def __call__(self, tokens_BSD: Tensor, state: ForwardState, inner: StackFunction) -> Tensor:
        position = state.options.position
        assert position is not None, "set by whoever installs a recording"
        sigma = position.schedule[position.step]
        before = tokens_BSD[:, : state.num_tokens].to(state.compute_dtype, copy=True)
        out = inner(tokens_BSD, state)
        norms = torch.sub(out[:, : state.num_tokens], before).norm(dim=-1, dtype=torch.float32)
        each = norms.shape[0] // len(position.conditionings)
        for index, conditioning in enumerate(position.conditionings):
            now = norms[index * each : (index + 1) * each]
            key = (conditioning.key, tuple(now.shape), tuple(sorted(state.options.block_replace)))
            earlier = self._norms.get(key)
            if earlier is not None and earlier[0] > sigma:
                ratio = (now / earlier[1].clamp_min(1e-30)).mean()
                self.ratios.setdefault((sigma, min(conditioning.kind, 1)), []).append(ratio)
            if earlier is None or earlier[0] != sigma:
                self._norms[key] = (sigma, now)
        return out

    def take(self) -> list[tuple[float, int, float]]:
        """What was measured since it was last taken: noise level, kind and ratio, for whoever keeps the run."""
        found = [(sigma, kind, float(value)) for (sigma, kind), values in self.ratios.items() for value in values]
        self.ratios.clear()
        return found

    def enter(self, found: Iterable[tuple[float, int, float]]) -> None:
        """Keep what another process measured, as ``take`` told it."""
        for sigma, kind, ratio in found:
            self.ratios.setdefault((sigma, kind), []).append(torch.tensor(ratio))

    def curve(self, name: str, spec: ModelSpec, models: Sequence[tuple[str, str]] = ()) -> Curve:
        """The measured curve.

        Raises:
            InputError: nothing was measured, or a run did not come to its end.
        """
        if not self.runs:
            raise InputError(
                "nothing has been measured: put the MODEL of Wan2.2 Calibrate MagCache into the sampler, and connect "
                "what the sampler returns to 'latent'"
            )
        levels = [sigma for run in self.runs for sigma in run.schedule]
        starts = {run.schedule[0] for run in self.runs}
        rows = [self._row(kind, levels, starts) for kind in (0, 1)]
        if rows[0] is None or len(levels) < 2:
            raise InputError(
                f"the run was cut short: of its {len(levels)} steps some were not measured; let it run to its end"
            )
        if len(self.runs) > 2:
            raise InputError(
                f"the run had {len(self.runs)} parts; a curve has one, or one for each expert: sample with one or two "
                "samplers"
            )
        return Curve(
            name=name,
            task=str(spec.task),
            sigmas=tuple(levels),
            cond=rows[0],
            uncond=rows[1],
            switch=len(self.runs[0].schedule) if len(self.runs) == 2 else None,
            models=tuple(models),
            source="measured in one run of the user's own model",
            shape=(spec.dim, spec.num_layers),
        )

    def _row(self, kind: int, levels: list[float], starts: set[float]) -> tuple[float, ...] | None:
        """Ratios at every level, 1 where a model begins; None where one is missing."""
        found = []
        for sigma in levels:
            values = [float(value) for value in self.ratios.get((sigma, kind), [])]
            if sigma in starts and not values:
                found.append(1.0)
            elif values and all(math.isfinite(value) and value > 0 for value in values):
                found.append(sum(values) / len(values))
            else:
                return None
        return tuple(found)
