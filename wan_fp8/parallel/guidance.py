"""CFG parallelism: the two halves of a guided batch on different ranks, one gather of the velocity at the end.

It hangs on the model's call as hooks: whoever calls ``model(x, timestep, context, ...)`` with the conditional and the
unconditional rows in one batch gets the whole batch's velocity back, on every rank. A batch that has no two halves runs
whole on every rank.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..caching import MagCache, cache_of
from ..errors import InputError
from ..models.blocks import ForwardOptions
from ..models.passes import RunPosition
from ..models.wan import WanModel
from .dims import Groups
from .exchange import Traffic, gather

_NAMES = ("x", "timestep", "context", "clip_fea", "options")
MAX_PROMPTS = 16
"""Halves of prompts, faces and sounds that are kept: views."""


class GuidanceParallel:
    """Each rank's half of a batch, in order: rank 0 the first half."""

    def __init__(self, groups: Groups, traffic: Traffic) -> None:
        self.groups, self.traffic = groups, traffic
        self._halved = False
        self._prompts: OrderedDict[int, tuple[weakref.ref[Tensor], Tensor]] = OrderedDict()

    def attach(self, model: WanModel) -> tuple[RemovableHandle, RemovableHandle]:
        """Around every call of ``model`` from now on; the handles take it away."""
        return (
            model.register_forward_pre_hook(self._narrow, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._gather),
        )

    def _narrow(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        assert isinstance(model, WanModel)
        given = dict(zip(_NAMES, args, strict=False)) | kwargs
        options = given.get("options") or ForwardOptions()
        x, context = given.get("x"), given.get("context")
        self._halved = _has_halves(x, context, options.position)
        if not self._halved:
            return args, kwargs
        assert isinstance(x, Tensor) and isinstance(context, Tensor)
        self._refuse(model)
        batch = x.shape[0]
        half = slice(self.groups.cfg_rank * batch // 2, (self.groups.cfg_rank + 1) * batch // 2)
        for name, value in given.items():
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
                kept = name == "context" or name in model.task_inputs  # encoded once, found again by identity
                given[name] = self._kept(value, half) if kept else value[half]
        given["options"] = dataclasses.replace(
            options,
            text_key=None if options.text_key is None else (options.text_key, self.groups.cfg_rank),
            position=None if options.position is None else self._position(options.position),
        )
        return (), given

    def _gather(self, model: nn.Module, args: Any, velocity: Tensor) -> Tensor:
        del model, args
        if not self._halved:
            return velocity
        whole, sent = gather(velocity, self.groups.cfg, 0)
        self.traffic.velocity += sent
        return whole

    def _kept(self, whole: Tensor, half: slice) -> Tensor:
        """The same view for the same tensor: what is made of it is kept under it."""
        kept = self._prompts.get(id(whole))
        if kept is None or kept[0]() is not whole:
            kept = (weakref.ref(whole), whole[half])
            self._prompts[id(whole)] = kept
        self._prompts.move_to_end(id(whole))
        while len(self._prompts) > MAX_PROMPTS:
            self._prompts.popitem(last=False)
        return kept[1]

    def _position(self, position: RunPosition) -> RunPosition:
        """This half's conditionings; a cache still knows that there are others."""
        given = position.conditionings
        if len(given) == 1:  # samples of one conditioning
            return position
        each = len(given) // 2
        mine = given[self.groups.cfg_rank * each : (self.groups.cfg_rank + 1) * each]
        return dataclasses.replace(
            position, conditionings=mine, elsewhere=position.elsewhere | {part.kind for part in given}
        )

    def _refuse(self, model: WanModel) -> None:
        cache = cache_of(model)
        if cache is None:
            return
        policy, dims = cache.policy, self.groups.dims
        if policy.looks_at_tokens:
            raise InputError(
                f"{policy.name} decides from one conditioning for the other, which cfg 2 computes elsewhere: use "
                "MagCache, or ulysses and ring without cfg"
            )
        if isinstance(policy, MagCache) and policy.phase == "published" and dims.shard > dims.sequence:
            raise InputError(
                "MagCache as published skips cond and uncond at different steps, and their ranks gather weights "
                f"together: use phase 'in_phase', or shard over {dims.sequence} ranks or fewer"
            )


def _has_halves(x: Any, context: Any, position: RunPosition | None) -> bool:
    """Whether a batch falls into two halves that lie between conditionings; the model itself refuses what is wrong."""
    if not (isinstance(x, Tensor) and isinstance(context, Tensor) and x.ndim and context.ndim):
        return False
    count = 1 if position is None else len(position.conditionings)
    return x.shape[0] == context.shape[0] and x.shape[0] % 2 == 0 and x.shape[0] > 0 and (count == 1 or count % 2 == 0)
