"""Step caching: passes whose blocks are not run because their residual has hardly changed since an earlier step."""

from __future__ import annotations

from ..models.passes import Conditioning, RunPosition
from ..models.wan import WanModel
from .curves import Curve, load_curve, published, published_for, save_curve
from .easycache import EasyCache
from .magcache import PHASES, PRESETS, MagCache
from .policy import REUSES, Decision, Policy, RunPlan, Tracker
from .recording import Recording
from .report import CacheReport, sum_line
from .rule import skipped_passes
from .step_cache import Model, StepCache, apply_cache, cache_of
from .taylor import Taylor

__all__ = [
    "PHASES",
    "POLICIES",
    "PRESETS",
    "REUSES",
    "CacheReport",
    "Conditioning",
    "Curve",
    "Decision",
    "EasyCache",
    "MagCache",
    "Policy",
    "Recording",
    "RunPlan",
    "RunPosition",
    "StepCache",
    "Taylor",
    "Tracker",
    "apply_cache",
    "apply_magcache",
    "cache_of",
    "load_curve",
    "published",
    "published_for",
    "remove_cache",
    "remove_magcache",
    "save_curve",
    "skipped_passes",
    "sum_line",
]

POLICIES: dict[str, type[Policy]] = {"magcache": MagCache, "easycache": EasyCache, "taylor": Taylor}
"""By the names that nodes and command lines use."""


def apply_magcache(model: Model, setting: MagCache | None = None) -> Model:
    """MagCache on an engine model; returns it. ``remove_magcache`` undoes it. See ``apply_cache``."""
    return apply_cache(model, setting or MagCache())


def remove_cache(model: WanModel) -> WanModel:
    """Run every pass again; returns the model."""
    return apply_cache(model, None)


remove_magcache = remove_cache
