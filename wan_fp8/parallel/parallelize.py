"""Attach a layout to a model, and take it away again. The model's own code knows nothing of ranks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..attention import AttentionCore
from ..errors import InputError
from ..models.wan import WanModel
from .dims import Groups, ParallelDims, build_groups
from .exchange import Traffic, gather_rows
from .guidance import GuidanceParallel
from .ulysses import NAME, ParallelCore, SequenceParallel


class SharedMaxima:
    """Maxima over ranks, so that FP8 scales are what one GPU would make of the same forward."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def over_sequence(self, amax: Tensor) -> None:
        """Of one sequence: CurrentScaling. The halves of guidance stay apart, as in two calls on one GPU: each can then
        skip a pass by itself."""
        _raise(amax, self._groups.sequence)

    def over_all(self, amax: Tensor) -> None:
        """Of one step: DelayedScaling, whose history the halves share."""
        _raise(amax, self._groups.everyone)


def _raise(amax: Tensor, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        # NaN is no number to compare: as infinity it makes a NaN of the values again
        amax.nan_to_num_(nan=float("inf"), posinf=float("inf"))
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)


@dataclass(frozen=True, slots=True)
class Layout:
    """What ``parallelize`` attached."""

    dims: ParallelDims
    groups: Groups
    traffic: Traffic
    handles: tuple[RemovableHandle, ...]


def parallelize(model: WanModel, dims: ParallelDims, *, device_type: str | None = None) -> WanModel:
    """Run the forwards of ``model`` over the ranks of torch's process group; every rank calls this, with the same
    weights loaded and the same settings applied.

    Every rank passes the whole inputs and gets the whole velocity. Recipes, attention settings, caches and live LoRAs
    may come before or after; with ``shard`` a recipe must come before, since sharded weights cannot be cast again.

    Args:
        device_type: ``cuda`` or ``cpu``; None: where the weights are.
    Raises:
        InputError: a layout that the model or the process group cannot take; nothing was changed.
    """
    present = layout_of(model)
    if present is not None and present.dims == dims:
        return model
    dims.check(model.spec)
    _check_weights(model)
    device_type = device_type or next(model.parameters()).device.type
    groups = build_groups(dims, device_type)
    remove_parallel(model)
    traffic = Traffic()
    if dims.sequence > 1:
        split = SequenceParallel(model, groups, traffic)
        model.token_multiple = dims.sequence
        model.stack_wrappers[NAME] = split
        for attention in _self_attentions(model):
            core = attention.get_submodule("inner_attention")
            attention.inner_attention = ParallelCore(core, split)
            if isinstance(core, AttentionCore):
                core.sparse_refusal = dims.sparse_refusal
    handles = GuidanceParallel(groups, traffic).attach(model) if dims.cfg > 1 else ()
    _reduce_with(model, SharedMaxima(groups) if dims.world > 1 else None)
    if dims.world > 1:
        model.gather_findings = functools.partial(_by_half, groups, torch.device(device_type))
    model.layout = Layout(dims, groups, traffic, tuple(handles))
    if dims.shard > 1:
        from .fsdp import shard_blocks  # imports torch's compiler: seconds that only this needs

        shard_blocks(model, groups.weights)
    return model


def remove_parallel(model: WanModel) -> WanModel:
    """Run forwards on this rank alone again; returns the model.

    Raises:
        InputError: the weights are sharded; nothing was changed.
    """
    present = layout_of(model)
    if present is None:
        return model
    _check_weights(model)
    for handle in present.handles:
        handle.remove()
    model.token_multiple = 1
    model.stack_wrappers.pop(NAME, None)
    for attention in _self_attentions(model):
        if isinstance(attention.inner_attention, ParallelCore):
            core = attention.inner_attention = attention.inner_attention.core
            if isinstance(core, AttentionCore):
                core.share, core.sparse_refusal = None, None
    _reduce_with(model, None)
    model.gather_findings = model.layout = None
    model.clear_text_cache()
    return model


def layout_of(model: WanModel) -> Layout | None:
    """What is attached to ``model``."""
    return model.layout if isinstance(model.layout, Layout) else None


def _by_half(groups: Groups, device: torch.device, row: Tensor) -> list[list[Tensor]]:
    rows, each = gather_rows(row, groups.everyone, device), groups.dims.sequence
    return [rows[first : first + each] for first in range(0, len(rows), each)]


def _check_weights(model: WanModel) -> None:
    if model.fixed_weights is not None:
        raise InputError(f"the layout cannot be changed: {model.fixed_weights}")


def _reduce_with(model: WanModel, maxima: SharedMaxima | None) -> None:
    model.amax_reduction = maxima
    if model.quantization is not None:
        model.quantization.reduce_with(maxima)


def _self_attentions(model: WanModel) -> list[nn.Module]:
    return [block.get_submodule("self_attn") for block in model.blocks]
