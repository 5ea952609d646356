"""What a run has to say while a node executes: in the log, and as text on that node, whichever sampler it is. And
whether anybody still listens."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
from comfy_execution.utils import get_executing_context

from ..notices import logger, show_on_node

_kept: tuple[Any, list[str]] = (None, [])
"""The execution that last spoke, and what it said that is to stay: a sampler of two experts has two runs."""


def say(text: str, *, level: int = logging.INFO, keep: bool = False) -> None:
    """Log ``text`` and show it on the node that executes now; nowhere else when there is none.

    Args:
        keep: Stay above what the same execution says later; otherwise the next text takes its place.
    """
    global _kept
    for line in text.splitlines():
        logger.log(level, line)
    context = get_executing_context()
    if context is None:
        return
    lines = _kept[1] if _kept[0] == context else []
    show_on_node(context.node_id, "\n".join([*lines, text]))
    _kept = (context, [*lines, text] if keep else lines)


def kept_words() -> list[str]:
    """What was said to stay since the node that executes now began."""
    context = get_executing_context()
    return list(_kept[1]) if context is not None and _kept[0] == context else []


def stop_if_cancelled() -> None:
    """Raise core's InterruptProcessingException if the user has cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()
