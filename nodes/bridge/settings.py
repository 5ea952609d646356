"""Choices that touch no weight: kept on the MODEL, read by the forward."""

from __future__ import annotations

import dataclasses
from typing import Any

from .fork import hosted
from .hosted_model import SETTINGS, HostSettings


def settings_of(patcher: Any) -> HostSettings:
    """The settings that this MODEL carries."""
    return patcher.model_options.get("transformer_options", {}).get(SETTINGS) or HostSettings()


def with_settings(patcher: Any, **changes: Any) -> Any:
    """A clone of this MODEL (forked first if its transformer is core's) with some of its ``HostSettings`` changed.

    Both MODELs share one loaded transformer.
    """
    changed = dataclasses.replace(settings_of(patcher), **changes)
    clone = hosted(patcher).clone()
    clone.model_options.setdefault("transformer_options", {})[SETTINGS] = changed
    return clone
