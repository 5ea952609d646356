"""How the scales of FP8 linears come about: numbers only, nothing about who multiplies."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BackendUnavailableError, InputError
from ..gemm import GEMM, register_backends
from ..kernels.quantize import E8M0, Granularity

GRANULARITIES = {
    "DelayedScaling": Granularity.TENSOR,
    "Float8CurrentScaling": Granularity.TENSOR,
    "Float8BlockScaling": Granularity.BLOCK,
    "rowwise": Granularity.ROW,
    "MXFP8BlockScaling": Granularity.MX,
}
RECIPES = ("none", *GRANULARITIES)
"""Names that ``Recipe`` takes."""
NOT_OFFERED = {
    "NVFP4BlockScaling": "it packs two 4-bit values into a byte, and weights here are one e4m3 byte a value",
}
"""Recipes of other software that are refused with a reason of their own."""
AMAX_ALGORITHMS = ("max", "most_recent")
LINEARS = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "ffn.0",
    "ffn.2",
)
"""The linears of a block that a recipe converts. Everything else stays in high precision."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """E4M3 for the ten linears of every block.

    | name | activations | weights |
    | --- | --- | --- |
    | ``DelayedScaling`` | one scale, from the maxima of earlier steps | one scale |
    | ``Float8CurrentScaling`` | one scale, from the tensor itself | one scale |
    | ``Float8BlockScaling`` | one scale for 128 channels of a token | one scale for 128 x 128 |
    | ``rowwise`` | one scale a token | one scale an output channel |
    | ``MXFP8BlockScaling`` | one power of two for 32 channels of a token | one for 32 inputs of an output channel |
    | ``none`` | high precision | high precision |

    Raises:
        InputError: a name, count or backend that does not exist.
        BackendUnavailableError: a recipe that is not offered (NVFP4), or that this torch has no type for (MXFP8).
    """

    name: str = "rowwise"
    backend: str = "auto"
    """Who multiplies: ``auto``, ``torch``, ``transformer_engine``, ``reference``, or ``weight-only``, which leaves
    activations in high precision."""
    amax_history_len: int = 16
    """DelayedScaling: steps whose maxima are remembered."""
    amax_compute_algo: str = "max"
    """DelayedScaling: ``max`` of the history, or its ``most_recent`` entry."""
    margin: int = 0
    """DelayedScaling: the scale leaves room for values ``2^margin`` times the maximum."""
    keep: tuple[str, ...] = ()
    """Beginnings of parameter names that stay in high precision: ``blocks.0.``, ``blocks.39.``, or ``cross_attn`` for
    that linear group in every block."""

    def __post_init__(self) -> None:
        register_backends()
        if self.name in NOT_OFFERED:
            raise BackendUnavailableError(
                f"recipe {self.name} is not offered ({NOT_OFFERED[self.name]}): choose one of "
                f"{', '.join(GRANULARITIES)}"
            )
        if GRANULARITIES.get(self.name) is Granularity.MX and E8M0 is None:
            raise BackendUnavailableError(
                f"recipe {self.name} needs torch 2.7, which is the first with the type of its scales: update torch, or "
                "choose rowwise"
            )
        if self.name not in RECIPES:
            raise InputError(f"unknown FP8 recipe {self.name!r}; choose one of {', '.join(RECIPES)}")
        GEMM.check_name(self.backend)
        if self.amax_compute_algo not in AMAX_ALGORITHMS:
            raise InputError(
                f"amax_compute_algo is {' or '.join(map(repr, AMAX_ALGORITHMS))}; got {self.amax_compute_algo!r}"
            )
        for name, low, high in (("amax_history_len", 1, 4096), ("margin", 0, 16)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name} is a whole number from {low} to {high}; got {value!r}")
        if isinstance(self.keep, str) or not all(isinstance(prefix, str) and prefix for prefix in self.keep):
            raise InputError(f"keep is a tuple of parameter name prefixes, such as ('blocks.0.',); got {self.keep!r}")
        object.__setattr__(self, "keep", tuple(self.keep))

    @property
    def is_none(self) -> bool:
        """True if everything stays in high precision."""
        return self.name == "none"

    @property
    def granularity(self) -> Granularity:
        """What shares a scale (not for ``none``)."""
        return GRANULARITIES[self.name]

    @property
    def is_delayed(self) -> bool:
        """True if scales of activations follow a history."""
        return self.name == "DelayedScaling" and not self.is_weight_only

    @property
    def is_weight_only(self) -> bool:
        """True if activations stay in high precision."""
        return self.backend == "weight-only"

    def converts(self, name: str) -> bool:
        """Whether the linear called ``name`` (``blocks.3.ffn.0``) becomes FP8."""
        parts = name.split(".", 2)
        if self.is_none or len(parts) != 3 or parts[0] != "blocks" or parts[2] not in LINEARS:
            return False
        return not any(f"{name}.".startswith(prefix) or f"{parts[2]}.".startswith(prefix) for prefix in self.keep)
