"""Magnitude curves: how the residual of all blocks shrinks from step to step, measured once for a model.

A curve belongs to noise levels, not to step numbers. Between two noise levels the ratios of the steps between them
multiply, so a run with half as many steps has ratios of two steps in one, and a run on the curve's own schedule has
its very ratios. Where the curve knows nothing (below its last noise level, on the other side of the expert switch),
the answer is infinity, and the step is computed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import write_whole
from ..models.specs import SPECS, ModelSpec, Task
from ..sampling import sigmas

FORMAT = "wan_fp8_magcache_curve"
VERSION = 1
MAX_STEPS = 1000
UNKNOWN = math.inf
SNAP = 1e-3
"""Steps of a curve within which a noise level is taken as one of the curve's own: schedules are float32."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Ratios by noise level."""

    name: str
    task: str
    sigmas: tuple[float, ...]
    """[n] noise levels of the measured steps, decreasing, the terminal 0 left out."""
    cond: tuple[float, ...]
    """[n]: magnitude of the residual at ``sigmas[i]`` over that at ``sigmas[i - 1]``; the first one is 1."""
    uncond: tuple[float, ...] | None
    """None where guidance was off."""
    switch: int | None
    """Index of the low-noise expert's first step; None for one transformer."""
    models: tuple[tuple[str, str], ...] = ()
    """(expert or ``only``, fingerprint) of the models that it was measured on; empty for a published curve."""
    source: str = ""
    shape: tuple[int, int] | None = None
    """Width and blocks of the measured model."""

    @property
    def boundary(self) -> float:
        """Noise level from which the high-noise expert was measured; infinity for one transformer."""
        return math.inf if self.switch is None else self.sigmas[self.switch - 1]

    def row(self, kind: int) -> tuple[float, ...]:
        """Ratios of cond (0) or uncond (any other)."""
        return self.cond if kind == 0 or self.uncond is None else self.uncond

    def side(self, sigma: float) -> str | None:
        """Which expert the curve has at ``sigma``."""
        if self.switch is None:
            return None
        return "high_noise" if self.place(sigma) < self.switch - 0.5 else "low_noise"

    def place(self, sigma: float) -> float:
        """``sigma`` in steps of the curve: 0 at its first, fractions in between, above ``n - 1`` below the last one."""
        levels = self.sigmas
        if sigma >= levels[0]:
            return 0.0
        for index, (above, below) in enumerate(pairwise((*levels, 0.0))):
            if sigma >= below:
                at = index + (above - sigma) / (above - below)
                return float(round(at)) if abs(at - round(at)) < SNAP else at
        return float(len(levels))

    def ratio(self, before: float, now: float, kind: int, expert: str | None) -> float:
        """Magnitude at ``now`` over that at ``before`` (noise levels of neighbouring steps of one expert).

        Args:
            expert: Which one runs; ignored for a curve of one transformer.
        """
        first, last = 0, len(self.sigmas) - 1
        start, stop = self.place(before), self.place(now)
        if stop > last:
            return UNKNOWN
        if self.switch is not None:
            first, last = (0, self.switch - 1) if expert == "high_noise" else (self.switch, last)
            # a run may switch a little earlier or later than the curve: one step of the curve on either side
            if start < first - 1 or stop > last + 1:
                return UNKNOWN
            start, stop = min(max(start, first), last), min(max(stop, first), last)
        row, product = self.row(kind), 1.0
        for step in range(math.floor(start) + 1, math.ceil(stop) + 1):
            covered = min(stop, step) - max(start, step - 1)
            product *= row[step] if covered == 1 else row[step] ** covered
        return product

    def coarseness(self, schedule: tuple[float, ...]) -> float:
        """Steps of the curve that one step of ``schedule`` spans, on average."""
        spanned = min(self.place(schedule[-1]), len(self.sigmas)) - self.place(schedule[0])
        return spanned / (len(schedule) - 1)


# ---- published -----------------------------------------------------------------------------------------------------


@cache
def published() -> dict[str, Curve]:
    """The published curves by name."""
    data = json.loads((Path(__file__).parent / "ratios.json").read_text(encoding="utf-8"))
    found = {}
    for name, entry in data["curves"].items():
        values = entry["ratios"]
        shape = SPECS[name.split()[0]]
        found[name] = Curve(
            name=f"published {name}",
            task=entry["task"],
            sigmas=tuple(sigmas(entry["steps"], entry["shift"], entry["solver"])[:-1].tolist()),
            cond=(1.0, *values[0::2]),
            uncond=(1.0, *values[1::2]),
            switch=entry["high_noise_steps"],
            source=data["source"],
            shape=(shape.dim, shape.num_layers),
        )
    return found


def published_for(spec: ModelSpec, *, per_frame: bool = False) -> Curve | None:
    """The published curve of a task, whatever the model's size; None for a task that has none."""
    if spec.task is Task.TI2V:
        return published()["ti2v-5B i2v" if per_frame else "ti2v-5B t2v"]
    return published().get(f"{spec.task}-A14B")


def mismatch(curve: Curve | None, spec: ModelSpec) -> str | None:
    """Why ``curve`` (a published one, if None) is not of this model; None where it is."""
    if curve is None:
        return f"no curve has been published for {spec.task} models"
    if curve.task != spec.task:
        return f"the curve '{curve.name}' was measured on a {curve.task} model, and this one is {spec.task}"
    if curve.shape not in (None, (spec.dim, spec.num_layers)):
        assert curve.shape is not None
        return (
            f"the curve '{curve.name}' was measured on a model of width {curve.shape[0]} with {curve.shape[1]} blocks, "
            f"and this one has width {spec.dim} and {spec.num_layers}"
        )
    return None


# ---- files ---------------------------------------------------------------------------------------------------------


def save_curve(curve: Curve, path: str | Path) -> None:
    """Write a measured curve as JSON, whole or not at all.

    Raises:
        InputError: the folder or the disk cannot take it.
    """
    data = {
        "format": FORMAT,
        "version": VERSION,
        "name": curve.name,
        "task": curve.task,
        "shape": None if curve.shape is None else list(curve.shape),
        "models": [list(pair) for pair in curve.models],
        "switch": curve.switch,
        "sigmas": list(curve.sigmas),
        "cond": list(curve.cond),
        "uncond": None if curve.uncond is None else list(curve.uncond),
        "source": curve.source,
    }
    write_whole(Path(path), (json.dumps(data, indent=1) + "\n").encode())


def load_curve(path: str | Path) -> Curve:
    """Read a measured curve.

    Raises:
        InputError: it is no such file, or its numbers cannot be a curve; the message says which.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path.name} is no readable JSON ({error}): choose a curve that Wan2.2 Save MagCache Curve wrote"
        ) from None
    try:
        return _checked(data, path.stem)
    except InputError as error:
        raise InputError(f"{path.name}: {error}; measure the curve again with Wan2.2 Calibrate MagCache") from None


def _checked(data: Any, name: str) -> Curve:
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise InputError(f"it is no curve of version {VERSION} (its format must read '{FORMAT}')")
    levels = _numbers(data, "sigmas")
    if len(levels) < 2 or any(after >= before for before, after in pairwise(levels)):
        raise InputError(f"its sigmas must be at least two and fall from step to step; got {len(levels)}")
    if levels[-1] <= 0 or levels[0] > 1:
        raise InputError(f"its sigmas must lie between 0 and 1; got {levels[0]:g} to {levels[-1]:g}")
    cond = _ratios(data, "cond", len(levels))
    uncond = None if data.get("uncond") is None else _ratios(data, "uncond", len(levels))
    switch = data.get("switch")
    if switch is not None and not (_whole(switch) and 0 < switch < len(levels)):
        raise InputError(f"its switch must be null or a step from 1 to {len(levels) - 1}; got {switch!r}")
    tasks = [str(task) for task in Task]
    if data.get("task") not in tasks:
        raise InputError(f"its task must be one of {', '.join(tasks)}; got {data.get('task')!r}")
    shape = data.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(_whole(n) and n > 0 for n in shape)):
        raise InputError(f"its shape must be the model's width and number of blocks; got {shape!r}")
    models = data.get("models")
    if not isinstance(models, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in models
    ):
        raise InputError("its models must be pairs of an expert's name and a fingerprint")
    return Curve(
        name=name,
        task=data["task"],
        sigmas=levels,
        cond=cond,
        uncond=uncond,
        switch=switch,
        models=tuple((expert, mark) for expert, mark in models),
        source=str(data.get("source", "")),
        shape=(shape[0], shape[1]),
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(data: dict[str, Any], name: str) -> tuple[float, ...]:
    values = data.get(name)
    if not isinstance(values, list) or not 0 < len(values) <= MAX_STEPS:
        raise InputError(f"its {name} must be a list of 1 to {MAX_STEPS} numbers")
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
            raise InputError(f"its {name} must be finite numbers; entry {index} is {value!r}")
        if isinstance(value, int) and abs(value) > MAX_STEPS:  # too long for a float, or to be repeated
            raise InputError(f"its {name} must be noise levels or ratios; entry {index} is a whole number far above")
    return tuple(float(value) for value in values)


def _ratios(data: dict[str, Any], name: str, count: int) -> tuple[float, ...]:
    values = _numbers(data, name)
    if len(values) != count:
        raise InputError(f"its {name} has {len(values)} ratios for {count} sigmas")
    if not all(0 < value < 100 for value in values):
        raise InputError(f"its {name} must be ratios of magnitudes, above 0 and below 100; got {min(values):g}")
    return values
