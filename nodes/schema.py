"""What every node's schema shares: the socket type of our text encoder, menu names, and keywords that older hosts do
not know."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

LOADING = "Wan FP8/loaders"
CONDITIONING = "Wan FP8/conditioning"
SAMPLING = "Wan FP8/sampling"
SETTINGS = "Wan FP8/settings"
INSPECT = "Wan FP8/inspect"

TextEncoderSocket = io.Custom("WAN_TEXT_ENCODER")
"""Carries an ``encoder.TextEncoderHandle``."""

NEWER_KEYWORDS = frozenset({"search_aliases"})
"""Keywords of ``io.Schema`` that the oldest supported host lacks; any other unknown keyword is our mistake and raises.
"""


def node_schema(**fields: Any) -> io.Schema:
    """An ``io.Schema``, without those newer keywords that this ComfyUI does not take."""
    known = inspect.signature(io.Schema).parameters
    return io.Schema(**{name: value for name, value in fields.items() if name in known or name not in NEWER_KEYWORDS})
