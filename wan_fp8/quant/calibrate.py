"""DelayedScaling's memory: maxima of earlier steps, and the scales made of them.

All sites (inputs of linears; q, k and v share one) are entries of a few small tensors, so that one update serves a
whole forward and nothing waits for the GPU. An entry of the history is a *step* of the sampling run: forwards at the
same timestep (the two branches of guidance, in whatever order or batch) raise the same entry, and so do not push each
other's maxima out. A run begins uncalibrated: its first forward casts every input by its own maximum, never by a scale
of 1, and so the same run gives the same bits again. Scales that were loaded from a file are where a run begins instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from ..files import write_whole
from ..kernels.quantize import E4M3_MAX

FORMAT = "wan_fp8_delayed_scales"
VERSION = "1"


class Site:
    """One input of linears: its entries of the scales, and what became of it. Nothing here is an index, so that
    torch.compile makes one graph for all sites."""

    multiplier: Tensor
    """[1]: values are multiplied by it before the cast."""
    dequant: Tensor
    """[1]: its inverse."""
    amax: Tensor
    """[1]: the maximum of the forward that is running."""

    def __init__(self) -> None:
        self.calibrated = False
        """False: this input must be cast by its own maximum."""
        self.touched = False
        """Whether the forward that is running came by."""


def _spread(values: Tensor) -> Tensor:
    """The same values 16 bytes apart: cuBLAS refuses a scale at another address ("not supported")."""
    spaced = values.new_empty(len(values), 4)[:, 0]
    return spaced.copy_(values)


class DelayedScales:
    """History, scales and the maxima of the forward that is running, for every site of one model.

    ``multiplier = 448 / max(history) / 2^margin`` (or the most recent entry); values are multiplied by it before the
    cast, ``dequant`` is its inverse.
    """

    def __init__(self, sites: Sequence[str], *, history_len: int, algorithm: str, margin: int) -> None:
        self.sites = tuple(sites)
        self.algorithm, self.margin = algorithm, margin
        self.frozen = False
        """True: scales stay what they are, and nothing is collected."""
        with torch.inference_mode(False):  # tensors made in inference mode could not be changed outside of it
            self.history = torch.zeros(history_len, len(self.sites))
            self.multiplier, self.dequant = (_spread(torch.ones(len(self.sites))) for _ in range(2))
            self.amax = torch.zeros(len(self.sites))
            self._timestep = torch.full((), float("nan"))
        self.entries = [Site() for _ in self.sites]
        """One for each of ``sites``; views of the tensors above."""
        self._bind()
        self.reduce: Callable[[Tensor], None] | None = None
        """Raises values to the largest of all ranks that run the same step, in place."""
        self._restart = False
        self._start: tuple[Tensor, Tensor] | None = None

    # ---- what a linear's input asks ----------------------------------------------------------------------------------

    def cell(self, site: Site) -> Tensor | None:
        """[1]: raised to the maximum of this forward; None while scales are frozen and known."""
        if self.frozen and site.calibrated:
            return None
        site.touched = True
        return site.amax

    def _bind(self) -> None:
        with torch.inference_mode(False):
            for index, site in enumerate(self.entries):
                for name in ("multiplier", "dequant", "amax"):
                    setattr(site, name, getattr(self, name)[index : index + 1])

    # ---- around a forward --------------------------------------------------------------------------------------------

    def begin_run(self) -> None:
        """The next forward starts a sampling run: forget the last one's maxima (read them until then)."""
        if not self.frozen:
            self._restart = True

    def begin(self, device: torch.device) -> None:
        """Before a forward on ``device``. What a forward that failed had collected is dropped."""
        if self.amax.device != device:
            with torch.inference_mode(False):
                for name in ("history", "amax", "_timestep"):
                    setattr(self, name, getattr(self, name).to(device))
                for name in ("multiplier", "dequant"):
                    setattr(self, name, _spread(getattr(self, name).to(device)))
            self._bind()
        if self._restart:
            self._begin_again()
        if any(site.touched for site in self.entries):
            self._clear()

    def end(self, timestep: Tensor) -> None:
        """After a forward at ``timestep`` (any shape): enter what was collected, and set the scales of the next."""
        if self.frozen or (self.reduce is None and not any(site.touched for site in self.entries)):
            return  # every block was skipped, or scales are frozen
        now = timestep.detach().max().to(self._timestep)
        if self.reduce is not None:
            now = self._agree(now, self.reduce)
        same = now == self._timestep
        latest = torch.where(self.amax.isfinite(), self.amax, self.history[0])
        raised = torch.cat([torch.maximum(self.history[:1], latest[None]), self.history[1:]])
        entered = torch.cat([latest[None], self.history[:-1]])
        self.history.copy_(torch.where(same, raised, entered))
        self._timestep.copy_(now)
        self._set_scales()
        for site in self.entries:
            site.calibrated |= site.touched
        self._clear()

    def _agree(self, now: Tensor, reduce: Callable[[Tensor], None]) -> Tensor:
        """Raise the maxima to those of all ranks; returns their timestep.

        Every rank takes part, whether it ran blocks or not: another one may have. Where none did, the step is taken for
        the last one once more, which changes nothing.
        """
        shared = torch.cat([self.amax, now[None]]).nan_to_num(nan=float("inf"), posinf=float("inf"))
        reduce(shared)
        self.amax.copy_(shared[:-1])
        return torch.where(self.amax.amax() > 0, shared[-1], self._timestep)

    def _clear(self) -> None:
        for site in self.entries:
            site.touched = False
        self.amax.zero_()

    def _set_scales(self) -> None:
        largest = self.history.amax(0) if self.algorithm == "max" else self.history[0]
        fresh = E4M3_MAX / largest / 2.0**self.margin
        # nothing seen (a block that was skipped): keep the scale
        self.multiplier.copy_(torch.where((largest > 0) & fresh.isfinite(), fresh, self.multiplier))
        self.dequant.copy_(1 / self.multiplier)

    def _begin_again(self) -> None:
        self._restart = False
        self._timestep.fill_(float("nan"))
        if self._start is None:
            self.history.zero_()
            for site in self.entries:
                site.calibrated = False
        else:
            history, multiplier = self._start
            self.history.copy_(history)
            self.multiplier.copy_(multiplier)
            self.dequant.copy_(1 / self.multiplier)

    # ---- files -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Tensors to save: ``history`` [entries, sites] and ``multiplier`` [sites]."""
        missing = [name for name, site in zip(self.sites, self.entries, strict=True) if not site.calibrated]
        if missing:
            raise InputError(f"{len(missing)} inputs ({missing[0]}, ...) have no scale yet: run a forward first")
        return {name: getattr(self, name).detach().cpu().clone() for name in ("history", "multiplier")}

    def start_like(self, other: DelayedScales) -> None:
        """Begin runs with the scales that ``other`` had loaded, if it had."""
        if other._start is not None and other.sites == self.sites:
            history, multiplier = other._start
            self.load_state({"history": history, "multiplier": multiplier}, freeze=other.frozen)

    def load_state(self, state: dict[str, Tensor], *, freeze: bool) -> None:
        """Begin every run with these."""
        with torch.inference_mode(False):
            self._start = (state["history"].clone(), state["multiplier"].clone())
        for site in self.entries:
            site.calibrated = True
        self.frozen = freeze
        self._begin_again()

    def forget_start(self) -> None:
        """Begin runs without scales again."""
        self._start, self.frozen = None, False
        self._begin_again()


def save_scales(model: nn.Module, path: str | Path) -> None:
    """Write the activation scales of a DelayedScaling model to a safetensors file, whole or not at all; one of that
    name is replaced.

    Raises:
        InputError: the model has no such scales, or none yet, or the file cannot be written.
    """
    scales = _scales_of(model)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "settings": json.dumps(_settings(scales)),
        "sites": "\n".join(scales.sites),
    }
    write_whole(Path(path), save(scales.state(), metadata=metadata))


def load_scales(model: nn.Module, path: str | Path, *, freeze: bool = True) -> nn.Module:
    """Begin every run of a DelayedScaling model with saved scales; returns the model.

    Args:
        freeze: keep them as they are, so that equal inputs give equal bits whatever ran before. False: they are where
            each run's history begins.
    Raises:
        InputError: the model has no DelayedScaling.
        CheckpointError: not a file of such scales, or one of another model or recipe.
    """
    scales, path = _scales_of(model), Path(path)
    try:
        with safetensors.safe_open(str(path), framework="pt") as opened:
            metadata = opened.metadata() or {}
        state = load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path.name} is no readable safetensors file ({error}): save the scales again") from None
    if (
        metadata.get("format") != FORMAT
        or metadata.get("version") != VERSION
        or not state.keys() >= {"history", "multiplier"}
    ):
        raise CheckpointError(
            f"{path.name} holds no DelayedScaling scales of this version: save them with Wan2.2 Save FP8 Scales or "
            "save_scales"
        )
    if tuple(metadata.get("sites", "").split("\n")) != scales.sites:
        raise CheckpointError(f"{path.name} belongs to a model with other FP8 layers: save the scales of this one")
    wanted, said = _settings(scales), metadata.get("settings", "nothing")
    if said != json.dumps(wanted):  # as save_scales writes it: no parser meets what a stranger put there
        raise CheckpointError(
            f"{path.name} was made with {said[:200]!r}, this recipe has {json.dumps(wanted)}: set the recipe to the "
            "same, or save scales anew"
        )
    for name in ("history", "multiplier"):
        found, ours = state[name], getattr(scales, name)
        if found.shape != ours.shape or found.dtype != ours.dtype:
            raise CheckpointError(
                f"{path.name} is damaged: its {name} is {found.dtype} {list(found.shape)}: save it again"
            )
    sound = state["multiplier"].isfinite().all() and (state["multiplier"] > 0).all()
    if not (sound and state["history"].isfinite().all() and (state["history"] >= 0).all()):
        raise CheckpointError(f"{path.name} holds scales that are no positive numbers: save them again")
    scales.load_state(state, freeze=freeze)
    return model


def forget_scales(model: nn.Module) -> nn.Module:
    """Begin every run uncalibrated again, whatever was loaded; returns the model.

    Raises:
        InputError: the model has no DelayedScaling.
    """
    _scales_of(model).forget_start()
    return model


def freeze_scales(model: nn.Module, frozen: bool = True) -> nn.Module:
    """Stop (or resume) following the maxima of activations; returns the model.

    Raises:
        InputError: the model has no DelayedScaling, or no scales yet.
    """
    scales = _scales_of(model)
    if frozen:
        scales.state()  # says so if there are none
    scales.frozen = frozen
    return model


def _settings(scales: DelayedScales) -> dict[str, Any]:
    return {
        "amax_history_len": scales.history.shape[0],
        "amax_compute_algo": scales.algorithm,
        "margin": scales.margin,
    }


def _scales_of(model: nn.Module) -> DelayedScales:
    scales = getattr(getattr(model, "quantization", None), "scales", None)
    if not isinstance(scales, DelayedScales):
        raise InputError("the model has no DelayedScaling recipe: apply one first")
    return scales
