"""The fewest key blocks that hold a wanted share of the estimated attention mass: a head that looks at little keeps
little, one that looks everywhere keeps everything."""

from __future__ import annotations

from . import Asked, Choice


def choice(asked: Asked) -> Choice:
    """By mass."""
    return Choice(asked.estimated(), "mass", asked.sparsity.coverage)
