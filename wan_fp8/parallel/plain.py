"""Settings as plain data and back: what a header may carry, and nothing that could run code.

Only the frozen dataclasses in ``TYPES`` are known; each checks its own values when it is made again.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from ..attention import Attention, Step
from ..attention.sparse.calibration import Calibration
from ..attention.sparse.setting import Sparsity
from ..caching import Conditioning, Curve, EasyCache, MagCache, RunPosition, Taylor
from ..compile import Compile
from ..errors import InputError
from ..models.blocks import ForwardOptions
from ..models.functional import RopeOptions
from ..models.specs import ModelSpec, Task
from ..quant import Recipe
from .dims import ParallelDims
from .source import HandedSource, ModelSource, TextSource, VAESource
from .wire import DTYPES, Json, WireError

TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Attention, Sparsity, Calibration, Step, Compile, RopeOptions, Recipe, MagCache, EasyCache, Taylor, Curve,
        RunPosition, Conditioning, ParallelDims, ModelSource, HandedSource, ModelSpec, VAESource, TextSource,
    )
}  # fmt: skip
"""By name; whoever has another one adds it."""


OPTIONS = ("cache_text", "attention", "step", "position", "rope", "compile", "stream_dtype", "tf32")
"""Fields of ``ForwardOptions`` that travel as plain data."""


def to_plain(value: Any) -> Any:
    """``value`` as JSON can carry it.

    Raises:
        WireError: something that is no setting.
    """
    if isinstance(value, Task):
        return {"task": value.value}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list):
        return [to_plain(part) for part in value]
    for name, kind in (("tuple", tuple), ("set", set | frozenset)):
        if isinstance(value, kind):
            return {name: [to_plain(part) for part in value]}
    if dataclasses.is_dataclass(value) and type(value).__name__ in TYPES:
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"type": type(value).__name__, "fields": fields}
    raise WireError(f"{type(value).__name__} is no setting that crosses to a pool")


def from_plain(value: Any) -> Any:
    """What ``to_plain`` made plain.

    Raises:
        WireError: something that it never makes.
        InputError: a setting with values that it refuses.
    """
    try:
        return _made(value)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        # parts of another kind than a setting's own code expects
        raise WireError(f"{str(value)[:100]} is no setting of ours ({error})") from None


def _made(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_made(part) for part in value]
    if isinstance(value, dict):
        keys = value.keys()
        if keys == {"float"} and value["float"] in ("inf", "-inf", "nan"):
            return float(value["float"])
        if keys == {"dtype"} and value["dtype"] in DTYPES:
            return DTYPES[value["dtype"]]
        if keys == {"task"} and value["task"] in [task.value for task in Task]:
            return Task(value["task"])
        if keys == {"tuple"}:
            return tuple(_made(part) for part in value["tuple"])
        if keys == {"set"}:
            return frozenset(_made(part) for part in value["set"])
        if keys == {"type", "fields"} and value["type"] in TYPES:
            kind = TYPES[value["type"]]
            known = {f.name for f in dataclasses.fields(kind) if f.init}
            if value["fields"].keys() <= known:
                return kind(**{name: _made(part) for name, part in value["fields"].items()})
    raise WireError(f"{str(value)[:100]} is no setting of ours")


def option_fields(options: ForwardOptions) -> Json:
    """The options of a forward that travel as plain data, those that differ from the defaults only."""
    defaults = {field.name: field.default for field in dataclasses.fields(ForwardOptions)}
    return {name: to_plain(getattr(options, name)) for name in OPTIONS if getattr(options, name) != defaults[name]}
