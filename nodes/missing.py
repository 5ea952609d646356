"""What an output socket carries when there is nothing to put on it: an object that says why, at the moment somebody
uses it."""

from __future__ import annotations

from typing import Any, NoReturn

from ..wan_fp8.errors import InputError


class MissingPartError(InputError, AttributeError):
    """A part was used that its node could not provide. Also an AttributeError, so that ``hasattr`` on a ``Missing``
    answers False."""


class Missing:
    """Stands for a MODEL, VAE or text encoder that was not loaded; any use raises MissingPartError with the reason.

    An output that nobody uses must not fail its node, and None would fail in the using node without a word about the
    cause.
    """

    def __init__(self, reason: str) -> None:
        self.__dict__["reason"] = reason

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise MissingPartError(self.__dict__["reason"])

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise MissingPartError(self.__dict__["reason"])


def require(part: Any) -> Any:
    """``part`` itself, or MissingPartError if it is a ``Missing``."""
    if isinstance(part, Missing):
        raise MissingPartError(part.__dict__["reason"])
    return part
