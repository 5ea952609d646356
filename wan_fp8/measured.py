"""What has been measured on which GPU: ``measurements.json``, drawn from ``benchmarks/results`` by
``benchmarks/summary.py``. Times are of the transformer alone, on one GPU."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields
from pathlib import Path

FILE = Path(__file__).with_name("measurements.json")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row."""

    device: str
    """The GPU's own name."""
    model: str
    """Name of the released model, ``i2v-A14B``."""
    size: str
    frames: int
    recipe: str
    backend: str
    attention: str
    layer_ms: float
    """One block of the transformer."""
    forward_s: float
    """One pass: of cond or of uncond."""
    working_gib: float
    """Most memory beside the weights."""
    date: str
    file: str
    """In ``benchmarks/results``."""


@functools.cache
def measurements() -> tuple[Measurement, ...]:
    """All of them."""
    names = {field.name for field in fields(Measurement)}
    entries = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(Measurement(**{name: entry[name] for name in names}) for entry in entries)


def find(**wanted: object) -> list[Measurement]:
    """Those with these values."""
    return [row for row in measurements() if all(getattr(row, name) == value for name, value in wanted.items())]
