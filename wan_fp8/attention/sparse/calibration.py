"""Densities by step, transformer block and head, as a run under the guarantee settled them; kept as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import InputError

FORMAT, VERSION = "wan_fp8.sparsity", 1


@dataclass(frozen=True, eq=False, slots=True)
class Calibration:
    """A table of shares of key blocks. Two with the same numbers are equal."""

    total: int
    """Steps of the run that it was measured in."""
    densities: tuple[tuple[int, int, tuple[float, ...]], ...]
    """(step, transformer block, share for each head), in order; only what ran sparsely."""
    _hash: int = field(init=False, repr=False)
    """Of the numbers, made once: settings are looked up in every attention."""

    def __post_init__(self) -> None:
        for step, block, heads in self.densities:
            if not (0 <= step < self.total and block >= 0 and heads and all(0 < share <= 1 for share in heads)):
                raise InputError(
                    "a table of densities holds steps below its total, blocks from 0 and a share above 0 and up to 1 "
                    f"for each head; step {step}, block {block} does not"
                )
        if len({len(heads) for _, _, heads in self.densities}) != 1:
            raise InputError("a table of densities has one share for each head, and as many heads everywhere")
        object.__setattr__(self, "_hash", hash((self.total, self.densities)))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        same = isinstance(other, Calibration) and self._hash == other._hash
        return same and (self.total, self.densities) == (other.total, other.densities)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return self._hash

    @property
    def heads(self) -> int:
        """Heads of a block."""
        return len(self.densities[0][2])

    def shares(self, step: int, total: int, block: int) -> tuple[float, ...] | None:
        """Densities of a block's heads: those of the step that stands nearest in its run; None where the block never
        ran sparsely."""
        there = [(abs(s / self.total - step / total), heads) for s, b, heads in self.densities if b == block]
        return min(there)[1] if there else None

    def to_json(self) -> str:
        """The file's text."""
        table = [{"step": s, "block": b, "heads": list(heads)} for s, b, heads in self.densities]
        return json.dumps({"format": FORMAT, "version": VERSION, "steps": self.total, "densities": table}, indent=1)

    @classmethod
    def from_json(cls, text: str, name: str = "the table") -> Calibration:
        """The reverse.

        Raises:
            InputError: it is no such table.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT or data["version"] != VERSION:
                raise InputError(
                    f"{name} is not a table of densities of version {VERSION}: save one after a sparse run"
                )
            rows = [(int(r["step"]), int(r["block"]), tuple(float(x) for x in r["heads"])) for r in data["densities"]]
            return cls(int(data["steps"]), tuple(sorted(rows)))
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{name} is not a table of densities ({error}): save one after a sparse run") from error

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """From a file.

        Raises:
            InputError: it cannot be read, or holds no such table.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{Path(path).name} is not a table of densities ({error}): save one after a sparse run"
            ) from None
        return cls.from_json(text, Path(path).name)
