"""The exceptions that users meet. Each message says what came, what is allowed and what to do, in one sentence."""

from __future__ import annotations


class WanFP8Error(Exception):
    """Base of every error that this package raises on purpose."""

    __module__ = "wan_fp8.errors"

    def __init_subclass__(cls) -> None:
        # ComfyUI imports a pack under the path of its folder and shows the module of an error in its dialog.
        cls.__module__ = WanFP8Error.__module__


class CheckpointError(WanFP8Error, ValueError):
    """A file or folder is not what was asked for: damaged, mislabelled, incomplete, or another model."""


class InputError(WanFP8Error, ValueError):
    """A tensor, size, count or setting that the model cannot take."""


class BackendUnavailableError(WanFP8Error, RuntimeError):
    """A kernel backend was asked for by name and cannot run here; the message lists the reason of each candidate."""


class UnsupportedPatchError(WanFP8Error, RuntimeError):
    """Another node attached something to the model that our forward cannot honour; it is named, never ignored."""


class PoolError(WanFP8Error, RuntimeError):
    """A pool of worker processes could not start, lost a worker, or does not answer; the rank and its last words are
    named."""
