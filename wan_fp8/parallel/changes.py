"""What is merged into weights, or runs beside them, as names and plain tensors and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from ..checkpoint.lora import Diff, Entry, LowRank
from ..checkpoint.products import Hadamard, Kronecker
from ..errors import InputError
from ..models.low_rank import LowRankPair
from .wire import Json

Changes = Mapping[str, list[tuple[Entry, float]]]
"""By parameter: what is merged into it, and how strongly."""


def entry_bytes(entry: Entry) -> int:
    """Of one change's tensors."""
    given = [getattr(entry, field.name) for field in dataclasses.fields(entry)]
    return sum(value.numel() * value.element_size() for value in given if isinstance(value, Tensor))


def to_plain(changes: Changes) -> tuple[Json, dict[str, Tensor]]:
    """Changes as names, and the tensors that they name."""
    listed: Json = {}
    tensors: dict[str, Tensor] = {}
    for parameter, entries in changes.items():
        for index, (entry, strength) in enumerate(entries):
            name = f"{index}.{parameter}"
            given = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
            named = {field: f"{name}.{field}" for field, value in given.items() if isinstance(value, Tensor)}
            tensors |= {named[field]: given[field] for field in named}
            numbers = {field: value for field, value in given.items() if field not in named}
            one = {"kind": type(entry).__name__, "tensors": named, "numbers": numbers, "strength": float(strength)}
            listed.setdefault(parameter, []).append(one)
    return listed, tensors


def pair_to_plain(name: str, pair: LowRankPair, tensors: dict[str, Tensor]) -> Json:
    """One half of a live LoRA; its tensors go into ``tensors``."""
    tensors[f"{name}.down"], tensors[f"{name}.up"] = pair.down, pair.up
    return {"down": f"{name}.down", "up": f"{name}.up", "alpha": float(pair.factor * pair.down.shape[0])}


def pair_from_plain(listed: Json, tensors: dict[str, Tensor]) -> LowRank:
    """What ``pair_to_plain`` listed."""
    return LowRank(tensors[listed["down"]], tensors[listed["up"]], listed["alpha"])


KINDS: dict[str, type] = {kind.__name__: kind for kind in (LowRank, Diff, Hadamard, Kronecker)}


def from_plain(listed: Json, tensors: dict[str, Tensor]) -> dict[str, list[tuple[Entry, float]]]:
    """Changes by parameter, as ``to_plain`` listed them.

    Raises:
        InputError: of a kind that this version has not.
    """
    found: dict[str, list[tuple[Entry, float]]] = {}
    for name, entries in listed.items():
        for entry in entries:
            if entry["kind"] not in KINDS:
                raise InputError(
                    f"a pool does not know changes of the kind {entry['kind']!r}: run one version of the pack "
                    "on all hosts"
                )
            named = {field: tensors[given] for field, given in entry["tensors"].items()}
            change: Entry = KINDS[entry["kind"]](**named, **entry["numbers"])
            found.setdefault(name, []).append((change, entry["strength"]))
    return found
