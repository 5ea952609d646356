"""A fixed share of the key blocks, those with the most estimated mass: the time is known beforehand."""

from __future__ import annotations

from . import Asked, Choice


def choice(asked: Asked) -> Choice:
    """By number."""
    return Choice(asked.estimated(), "count", asked.sparsity.density)
