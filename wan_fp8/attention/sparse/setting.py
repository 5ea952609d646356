"""What a user asks of block-sparse attention: how blocks are chosen, where, and how far the result may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import InputError
from .calibration import Calibration

POLICIES = ("coverage", "density", "window", "calibrated")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparsity:
    """Block-sparse self-attention in a window of steps and blocks, measured while it runs."""

    policy: str = "coverage"
    """Who chooses: ``coverage`` keeps the blocks that hold a share of the estimated attention mass, ``density`` a share
    of the blocks, those with the most mass, ``window`` the same share, those nearest in space and time,
    ``calibrated`` a share for each head and step from a table."""
    coverage: float = 0.9
    """Of ``coverage``: the share of the estimated mass that is kept at first; the bound moves it."""
    density: float = 0.45
    """Of ``density`` and ``window``: the share of the key blocks that is kept at first; the bound moves it."""
    bound: float | None = 0.05
    """Relative error of a head's attention output, measured on samples in every sparse step. A head above it keeps
    more, one well below it less, one that stays above it is computed densely. None: measured, and nothing moves."""
    least: float = 0.1
    """Share of the blocks or of the mass below which no head goes."""
    skip_first: float = 0.2
    """Share of a run's steps at the start that stay dense."""
    skip_last: float = 0.05
    """Share of a run's steps at the end that stay dense."""
    skip_first_blocks: int = 1
    skip_last_blocks: int = 1
    dense_blocks: tuple[int, ...] = ()
    """Further transformer blocks that stay dense, by number from 0."""
    reuse: int = 1
    """Steps that one choice of blocks serves. Above 1 it is kept: 57 MB for a transformer block and conditioning at
    75,600 tokens and 40 heads."""
    backend: str = "auto"
    """Who computes it: a name of ``SPARSE``, or ``auto``."""
    calibration: Calibration | None = None
    """Of ``calibrated``: its table."""
    remainder: bool = False
    """Dropped blocks take part by their mean key and value instead of not at all."""

    def __post_init__(self) -> None:
        from .registry import SPARSE, register_backends

        register_backends()
        SPARSE.check_name(self.backend)
        if self.policy not in POLICIES:
            raise InputError(f"sparsity: policy must be one of {', '.join(POLICIES)}; got {self.policy!r}")
        for name in ("coverage", "density", "least"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"sparsity: {name} is a share above 0 and up to 1; got {getattr(self, name)}")
        for name in ("skip_first", "skip_last"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"sparsity: {name} is a share of the steps from 0 to below 1; got {getattr(self, name)}"
                )
        if self.bound is not None and not self.bound > 0:
            raise InputError(f"sparsity: bound is a relative error above 0, or None; got {self.bound}")
        if self.reuse < 1 or min((self.skip_first_blocks, self.skip_last_blocks, *self.dense_blocks)) < 0:
            raise InputError("sparsity: reuse counts steps from 1, and blocks are counted from 0")
        if (self.policy == "calibrated") != (self.calibration is not None):
            raise InputError("sparsity: policy 'calibrated' takes a calibration, and the others take none")

    @property
    def needs_step(self) -> bool:
        """Whether a forward must say which step it is."""
        return bool(self.skip_first or self.skip_last or self.calibration or self.reuse > 1)

    def steps(self, total: int) -> range:
        """The sparse steps of a run."""
        return range(math.ceil(self.skip_first * total), total - math.ceil(self.skip_last * total))

    def allows_block(self, block: int, num_blocks: int) -> bool:
        """Whether a transformer block may be sparse."""
        return self.skip_first_blocks <= block < num_blocks - self.skip_last_blocks and block not in self.dense_blocks


PRESETS: dict[str, Sparsity] = {}


def presets() -> dict[str, Sparsity]:
    """``safe``, ``balanced`` and ``fast``, by name; made at first use, since a setting looks at the backends."""
    if not PRESETS:
        PRESETS["safe"] = Sparsity(coverage=0.97, bound=0.02, skip_first=0.25)
        PRESETS["balanced"] = Sparsity()
        PRESETS["fast"] = Sparsity(coverage=0.8, bound=0.1, skip_first=0.15)
    return PRESETS
