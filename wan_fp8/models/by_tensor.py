"""Values that belong to tensors: made once for a tensor, found again by its identity, forgotten with the oldest."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Kept(Generic[Value]):
    owners: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int | None, ...]
    value: Value


class ByTensor(Generic[Value]):
    """The last ``limit`` values.

    A tensor that was written to since is another one; torch does not count writes to tensors made under inference mode.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[Hashable, _Kept[Value]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def get(
        self, owners: tuple[Tensor, ...], make: Callable[[], Value], *, also: Hashable, name: Hashable = None
    ) -> Value:
        """The value of these very tensors (or of ``name``, where the caller gives one), made now if it is new.

        Args:
            also: what else the value depends on.
        """
        identity = tuple(map(id, owners)) if name is None else name
        key = (identity, tuple((owner.shape, owner.device) for owner in owners), also)
        versions = tuple(None if owner.is_inference() else owner._version for owner in owners)
        kept = self._kept.get(key)
        if kept is None or (name is None and not _same(kept, owners, versions)):
            kept = _Kept(tuple(map(weakref.ref, owners)), versions, make())
            self._kept[key] = kept
        self._kept.move_to_end(key)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return kept.value


def _same(kept: _Kept[Value], owners: tuple[Tensor, ...], versions: tuple[int | None, ...]) -> bool:
    return kept.versions == versions and all(ref() is owner for ref, owner in zip(kept.owners, owners, strict=True))
