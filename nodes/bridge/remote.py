"""A MODEL whose transformer runs in a pool of worker processes: a proxy inside a stock BaseModel, which owns no weights
and takes no memory, and a patcher that merges nothing here.

LoRA nodes of core find the official keys on it and leave their patches on the patcher, as on any MODEL; at the next
forward they go to the workers as plain tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor

from ...wan_fp8 import quant
from ...wan_fp8.checkpoint.detect import official_names
from ...wan_fp8.checkpoint.load import open_transformer, read_parameters
from ...wan_fp8.checkpoint.lora import Diff, Entry, LowRank
from ...wan_fp8.checkpoint.products import Hadamard, Kronecker
from ...wan_fp8.errors import UnsupportedPatchError
from ...wan_fp8.kernels.quantize import dequantized_weight
from ...wan_fp8.models.wan import build_model
from ...wan_fp8.parallel.pools import PoolSpec
from ...wan_fp8.parallel.remote import Remote, RemoteWanModel, ToldReport, Topology, remote_class
from ...wan_fp8.parallel.source import HandedSource, ModelSource
from .core_weights import clean_weights
from .fork import attach, copy_attachments, hosted, is_hosted, shell_of, spec_of
from .hosted_model import HostedModel, adopt, refuse_foreign_patches, weights_change_mid_run
from .voice import say

SOURCE = "wan_fp8_source"
"""Name of the attachment that says where a MODEL's weights lie on disk; clones and forks keep it."""
SCALES = "wan_fp8_scales"
"""Name of the attachment with the file of activation scales that a recipe was given."""
PREFIX = "diffusion_model."


class RemoteHostedModel(HostedModel, RemoteWanModel):  # type: ignore[misc]
    """Core's face on a model that runs elsewhere."""

    is_remote = True

    _changes_of: Any = None
    """Name of the patches and hooks that ``remote.changes`` were made of."""

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        patcher = self._patcher()
        if patcher is not None:
            _refuse_patches(patcher)
            hooked = hooks_at_work(patcher)
            named = (patcher.patches_uuid, hooked)
            if self._changes_of != named:
                self.remote.changes = changes_of(patcher)
                self.remote.merged = " ".join(map(str, named)) if self.remote.changes else ""
                self._changes_of = named
            self.remote.swaps = weights_change_mid_run(patcher)
        return super()._run(*args, **kwargs)

    def weights_named(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some of the weights, as they are stored, where somebody wants to know them again."""
        source = self.remote.source
        if isinstance(source, HandedSource):
            assert self.remote.state is not None
            state = self.remote.state()
            return {name: state[name] for name in names}
        opened, detected = open_transformer(source.path, source.expert)
        with opened:
            stored = official_names(opened, detected)
            return {name: opened.read(stored[name]) for name in names}

    def real_weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some of the weights as a worker has them before any recipe: FP8 ones dequantised."""
        source = self.remote.source
        if not isinstance(source, HandedSource):
            dtype = torch.float32 if source.keep_fp8 else source.dtype or torch.bfloat16
            return read_parameters(source.path, source.expert, names, dtype)
        assert self.remote.state is not None
        state, found = self.remote.state(), {}
        for name in names:
            scale = state.get(f"{name.removesuffix('.weight')}.weight_scale")
            found[name] = (
                state[name].cpu() if scale is None else dequantized_weight(state[name], scale, torch.float32).cpu()
            )
        return found

    def sparse_reports(self) -> list[ToldReport]:
        """What sparse attention did in the run that ends."""
        attention = self.settings_of_run.attention
        return [] if attention is None or attention.sparsity is None else self.remote.sparse_reports()

    def report_pool(self) -> None:
        """Tell the user how the pool did in the run that ends."""
        line = self.remote.status_line()
        if line is not None:
            say(line, keep=True)


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """Core's bookkeeping for a model that has no weights here: nothing is moved, merged or counted."""

    def model_size(self) -> int:
        return 0

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: Any = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        self.model.device = device_to
        self.model.model_lowvram = False
        self.model.current_weight_patches_uuid = self.patches_uuid
        for callback in self.get_all_callbacks(comfy.patcher_extension.CallbacksMP.ON_LOAD):
            callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

    def patch_hooks(self, hooks: Any) -> None:
        """Hooks change no weight here: the next forward sends what they change."""
        self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set: Any = None) -> None:
        self.current_hooks = None

    def partially_unload(self, device_to: Any, memory_to_free: Any = 0, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_key_patches(self, filter_prefix: Any = None) -> Any:
        raise UnsupportedPatchError(
            "the weights of this MODEL lie in the processes of a pool, where nodes that merge or read weights do not "
            "reach: put such a node before Wan2.2 Multi-GPU"
        )


def is_remote(patcher: Any) -> bool:
    """Whether this MODEL runs in a pool."""
    return isinstance(getattr(getattr(patcher, "model", None), "diffusion_model", None), RemoteHostedModel)


def source_of(patcher: Any) -> ModelSource | None:
    """Where this MODEL's weights lie on disk; None where its loader did not say."""
    return cast(ModelSource | None, patcher.get_attachment(SOURCE))


def in_pool(patcher: Any, pool: PoolSpec, topology: Topology) -> Any:
    """A MODEL like this one that runs in ``pool``; what is attached to this one comes along. Workers read its file; the
    weights of a MODEL that knows of none (core's loader) are sent to them, once, and stay in memory here.

    Raises:
        UnsupportedPatchError: not a Wan2.2 MODEL, or foreign patches on its modules.
    """
    refuse_foreign_patches(patcher)
    if is_remote(patcher):
        old = remote_of(patcher)
        return _around(patcher, Remote(old.spec, old.source, pool, topology, old.recipe, old.scales, old.state))
    source = source_of(patcher)
    if source is not None and is_hosted(patcher):
        recipe = quant.recipe_of(patcher.model.diffusion_model)
        scales = patcher.get_attachment(SCALES)
        return _around(patcher, Remote(spec_of(patcher), source, pool, topology, recipe, scales))
    held = hosted(patcher)
    recipe, handed = quant.recipe_of(held.model.diffusion_model), HandedSource(spec=spec_of(held))
    state = functools.partial(_weights_of, held)
    return _around(held, Remote(handed.spec, handed, pool, topology, recipe, patcher.get_attachment(SCALES), state))


def _weights_of(patcher: Any) -> dict[str, Tensor]:
    """What a MODEL holds under its recipe and without its LoRAs."""
    weights = clean_weights(patcher)
    for name, module in patcher.model.diffusion_model.named_modules():
        original = getattr(module, "original", None)
        if original is not None:
            weights[f"{name}.weight"], scale = original
            weights.pop(f"{name}.weight_scale", None)
            if scale is not None:
                weights[f"{name}.weight_scale"] = scale
    return weights


def remote_with_recipe(patcher: Any, recipe: quant.Recipe, scales: Path | None) -> Any:
    """This MODEL of a pool under another recipe; nothing is cast here."""
    old: Remote = patcher.model.diffusion_model.remote
    file = None if scales is None else str(scales)
    changed = _around(patcher, old.with_recipe(recipe, file))
    changed.set_attachments(SCALES, file)
    return changed


def remote_of(patcher: Any) -> Remote:
    """The pool's side of this MODEL."""
    return patcher.model.diffusion_model.remote


def _around(patcher: Any, remote: Remote) -> Any:
    old = patcher.model.diffusion_model
    with torch.device("meta"):
        net = build_model(remote.spec, model_class=remote_class(remote.spec.task, RemoteHostedModel))
    for parameter in net.parameters():
        parameter.data = parameter.data.to(old.dtype if old.dtype.is_floating_point else torch.bfloat16)
    hosted = cast(RemoteHostedModel, adopt(net))
    hosted.dtype = old.dtype
    remote.poll = comfy.model_management.throw_exception_if_processing_interrupted
    remote.say = functools.partial(say, keep=True)
    hosted.remote = remote
    shell = shell_of(patcher, hosted)
    new = RemotePatcher(shell, load_device=patcher.load_device, offload_device=patcher.offload_device)
    copy_attachments(patcher, new)
    attach(new)
    return new


# ---- patches ---------------------------------------------------------------------------------------------------------


def hooks_at_work(patcher: Any) -> tuple[tuple[int, float], ...]:
    """LoRA hooks of the prompt that runs, and how strong each is at this step."""
    hooks = patcher.current_hooks
    if hooks is None:
        return ()
    found = hooks.get_type(comfy.hooks.EnumHookType.Weight)
    return tuple((id(hook.hook_ref), float(hook.strength)) for hook in found if hook.hook_ref in patcher.hook_patches)


def changes_of(patcher: Any) -> dict[str, list[tuple[Entry, float]]]:
    """Core's patches on this MODEL, then those of its hooks, as changes of parameters: LoRA, LoHa, LoKr and
    differences as what they are made of. Whatever else core can compute (other adapters, a strength of the model, a
    part of a weight) it computes here, and the difference that it makes is sent.

    Raises:
        UnsupportedPatchError: core cannot compute it from the weight alone, or gives the weight another shape.
    """
    changes: dict[str, list[tuple[Entry, float]]] = {}
    computed: dict[str, list[Any]] = {}
    hooked = patcher.get_combined_hook_patches(patcher.current_hooks)
    for key in {**patcher.patches, **hooked}:
        patches = [*patcher.patches.get(key, ()), *hooked.get(key, ())]
        entries = [(_entry(patch), float(patch[0])) for patch in patches]
        known = [(entry, strength) for entry, strength in entries if entry is not None]
        if len(known) == len(entries):
            changes[key.removeprefix(PREFIX)] = known
        else:
            computed[key] = patches
    if computed:
        weights = patcher.model.diffusion_model.real_weights([key.removeprefix(PREFIX) for key in computed])
        for key, patches in computed.items():
            name = key.removeprefix(PREFIX)
            changes[name] = [(Diff(_difference(name, patches, weights.pop(name))), 1.0)]
    return changes


def _difference(name: str, patches: list[Any], weight: Tensor) -> Tensor:
    """What core's patches make of a weight, less the weight."""
    refused = next((_kind(patch[1]) for patch in patches if _kind(patch[1]) in NEED_MORE), None)
    if refused is None:
        try:
            changed = comfy.lora.calculate_weight(patches, weight.to(torch.float32, copy=True), PREFIX + name)
        except Exception as error:
            refused = f"{_kind(patches[0][1])} ({type(error).__name__}: {error})"
        else:
            if changed.shape == weight.shape:
                return (changed - weight.float()).to(weight.dtype if weight.dtype.itemsize == 2 else torch.float32)
            refused = f"{_kind(patches[0][1])} (which makes it {tuple(changed.shape)})"
    raise UnsupportedPatchError(
        f"a node changes {name!r} by a patch of the kind {refused}, which cannot be sent to the processes of a pool "
        "(LoRAs, LoHas, LoKrs, differences and what changes a weight by itself can): remove that node, or Wan2.2 "
        "Multi-GPU"
    )


NEED_MORE = ("model_as_lora",)
"""Kinds of patches that core computes from more than the weight."""


def _kind(value: Any) -> str:
    name = getattr(value, "name", None)
    if name is None and isinstance(value, tuple):
        return str(value[0]) if isinstance(value[0], str) else "diff"
    return str(name or type(value).__name__)


def _entry(patch: Any) -> Entry | None:
    """One of core's patches as a change that workers know; None: core has to compute it."""
    _, value, strength_model, offset, function = patch
    if strength_model != 1.0 or offset is not None or function is not None:
        return None
    kind, weights = getattr(value, "name", None), getattr(value, "weights", None)
    if kind == "lora" and weights is not None:
        up, down, alpha, mid, dora, reshape = weights
        return None if reshape is not None else LowRank(down, up, _float(alpha), mid, dora, like_core=True)
    if kind == "loha" and weights is not None:
        up1, down1, alpha, up2, down2, core1, core2, dora = weights
        return Hadamard(up1, down1, up2, down2, _float(alpha), core1, core2, dora)
    if kind == "lokr" and weights is not None:
        first, second, alpha, up1, down1, up2, down2, core2, dora = weights
        return Kronecker(first, up1, down1, second, up2, down2, core2, _float(alpha), dora)
    if isinstance(value, tuple) and len(value) in (1, 2):
        kind, inner = ("diff", value) if len(value) == 1 else value
        if kind == "diff" and isinstance(inner[0], Tensor) and not (len(inner) > 1 and inner[1].get("pad_weight")):
            return Diff(inner[0])
    return None


def _float(alpha: Any) -> float | None:
    return None if alpha is None else float(alpha)


def _refuse_patches(patcher: Any) -> None:
    wrapped = sorted(getattr(patcher, "weight_wrapper_patches", {}))
    if wrapped:
        raise UnsupportedPatchError(
            f"a node wraps the weight {wrapped[0]!r} with code of its own, which cannot run in the processes of a "
            "pool: "
            "remove that node, or Wan2.2 Multi-GPU"
        )
