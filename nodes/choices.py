"""Checks of boxes with a list: a prompt queued over the API may bring any text."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from ..wan_fp8.errors import InputError

SHORT = 6
"""Choices that are listed in full."""


def check_choice(box: str, value: object, allowed: Iterable[str], *, first: Iterable[str] = ()) -> None:
    """Raise InputError unless ``value`` is one of the choices of a box.

    Args:
        box: What the user knows the input as.
        allowed: All choices.
        first: The ones to name where there are more than ``SHORT``; names like ``value`` are added.
    """
    names = list(allowed)
    if value in names:
        return
    if len(names) <= SHORT:
        raise InputError(f"{box} must be one of {', '.join(names)}; got {value!r}: choose one of these")
    text = str(value).lower()
    close = [name for name in get_close_matches(text, names, n=3) if name not in set(first)]
    named = ", ".join([*first, *close])
    raise InputError(f"{box} must be one of {named} or the other names listed in its box; got {value!r}: choose one")
