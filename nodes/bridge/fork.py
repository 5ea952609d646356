"""From any Wan2.2 MODEL to one with our transformer, without touching the one that came in.

A whole-module object patch would share core's bookkeeping between the two, lose LoRAs and leave them in the user's
weights. So a MODEL is *forked*: a BaseModel shell and bookkeeping of its own, Parameters of its own, on the same
storage. Both may be sampled in one graph, in any order, with other LoRAs; core counts and evicts them separately.
"""

from __future__ import annotations

import copy
import inspect
import logging
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor, nn

from ...wan_fp8 import kernels
from ...wan_fp8.attention import attention_report
from ...wan_fp8.caching import StepCache
from ...wan_fp8.checkpoint.quantized import COMFY_SUFFIX, format_name
from ...wan_fp8.checkpoint.save import comfy_mark
from ...wan_fp8.checkpoint.tensors import FP8_DTYPES
from ...wan_fp8.errors import UnsupportedPatchError
from ...wan_fp8.kernels.quantize import weight_granularity
from ...wan_fp8.models.layers import HIGH_PRECISION
from ...wan_fp8.models.memory import extra_tokens, forward_needs, rounding_bytes
from ...wan_fp8.models.specs import ModelSpec
from ...wan_fp8.models.wan import WanModel, build_model, class_of
from ...wan_fp8.quant.convert import share_recipe
from .caching import prepare_cache, report_cache
from .core_weights import assign_weights, clean_weights, core_spec, has_fp8
from .hosted_model import (
    HostedModel,
    HostSettings,
    adopt,
    bind,
    hosted_class,
    refuse_foreign_patches,
    refuse_live_lora,
    settings_of,
)
from .memory import explained
from .pinning import forget_refused_pins, give_own_pages
from .voice import say
from .weights import place_loose_parameters

KEY = "wan_fp8"
"""Name of our callbacks and wrappers on a patcher."""
EXPERT = "wan_fp8_expert"
"""Name of the attachment that says which expert a MODEL holds; clones and forks keep it."""


# ---- questions -----------------------------------------------------------------------------------------------------


def is_hosted(patcher: Any) -> bool:
    """Whether this MODEL's transformer is ours."""
    return isinstance(getattr(getattr(patcher, "model", None), "diffusion_model", None), HostedModel)


def spec_of(patcher: Any) -> ModelSpec:
    """What kind of Wan2.2 transformer this MODEL holds.

    Raises:
        UnsupportedPatchError: it is not a Wan2.2 model; the message names what it is.
    """
    net = getattr(getattr(patcher, "model", None), "diffusion_model", None)
    return net.spec if isinstance(net, HostedModel) else core_spec(net)


def expert_of(patcher: Any) -> str | None:
    """Which of two experts this MODEL holds, ``high_noise`` or ``low_noise``; None where its loader did not say."""
    get = getattr(patcher, "get_attachment", None)
    return get(EXPERT) if callable(get) else None


_FORKS: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()
"""MODEL of core's -> (its patches, our fork of it)."""


# ---- forking -------------------------------------------------------------------------------------------------------


def hosted(patcher: Any) -> Any:
    """This MODEL with our transformer: itself if it has it already, else a fork. For nodes that change no weights.

    The same MODEL with the same patches gives the same fork, which core then finds still loaded.
    """
    if is_hosted(patcher):
        return patcher
    patches, forked = _FORKS.get(patcher, (None, None))
    if forked is None or patches != patcher.patches_uuid:
        forked = fork(patcher)
        _FORKS[patcher] = (patcher.patches_uuid, forked)
    return forked


def fork(patcher: Any) -> Any:
    """A MODEL with our transformer on the weights of this one; LoRAs and everything else attached to it come along.

    Works for a MODEL from core's loaders (bf16, fp16, fp32, plain fp8, scaled fp8, mixed precision) and for one of
    ours. If the weights lie on the GPU they are unloaded first: two models on one GPU copy would be counted once.

    Raises:
        UnsupportedPatchError: not a Wan2.2 model, a storage format that we don't read, or foreign patches on its
            modules.
    """
    patcher = _classic(patcher)
    spec = spec_of(patcher)
    refuse_foreign_patches(patcher)
    if is_hosted(patcher) and patcher.model.diffusion_model.is_remote:
        raise UnsupportedPatchError(
            "this MODEL runs in the processes of a pool, and this node needs its weights here: put the node before "
            "Wan2.2 Multi-GPU"
        )
    _leave_device(patcher)
    with torch.device("meta"):
        net = build_model(spec, model_class=_engine_class(patcher, spec))
    assign_weights(net, clean_weights(patcher))
    net = adopt(net)
    net.dtype = patcher.model.diffusion_model.dtype
    if is_hosted(patcher):
        _copy_choices(patcher.model.diffusion_model, net)
    shell = shell_of(patcher, net)
    forked = _patcher_of(patcher, shell)
    attach(forked)
    return forked


def _classic(patcher: Any) -> Any:
    """The same MODEL in core's classic patcher, where a newer core pages weights in by itself ("dynamic" patchers)."""
    is_dynamic = getattr(patcher, "is_dynamic", None)
    if not (callable(is_dynamic) and is_dynamic()):
        return patcher
    if "disable_dynamic" not in inspect.signature(patcher.clone).parameters:
        raise UnsupportedPatchError(
            f"this MODEL is held by {type(patcher).__name__}, which cannot be turned into a classic one here: load it "
            "with Load Wan2.2 Checkpoint, or start ComfyUI with --disable-dynamic-vram"
        )
    return patcher.clone(disable_dynamic=True)


def _engine_class(patcher: Any, spec: ModelSpec) -> type[WanModel]:
    net = patcher.model.diffusion_model
    return type(net) if isinstance(net, HostedModel) else hosted_class(class_of(spec.task))


def _leave_device(patcher: Any) -> None:
    """Bring the weights back to where they rest, through core's own list of loaded models."""
    management = comfy.model_management
    listed = getattr(management, "current_loaded_models", [])
    loaded = [m for m in listed if m.model is not None and patcher.is_clone(m.model)]
    for entry in loaded:
        entry.model_unload()
        listed.remove(entry)
    rest = torch.device(patcher.offload_device)
    if any(p.device.type not in (rest.type, "meta") for p in patcher.model.diffusion_model.parameters()):
        patcher.detach()


def _copy_choices(old: HostedModel, new: HostedModel) -> None:
    for name in ("stream_dtype_override", "fused_kernels", "token_multiple", "compile_setting", "lora"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    for name, wrapper in old.stack_wrappers.items():
        new.stack_wrappers[name] = wrapper.for_model(new) if isinstance(wrapper, StepCache) else wrapper
    share_recipe(old, new)


def shell_of(patcher: Any, net: HostedModel) -> nn.Module:
    """A BaseModel around ``net`` that shares everything else with the one it came from, and claims no memory."""
    old = patcher.model
    shell = copy.copy(old)
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(shell, name, dict(getattr(old, name)))
    for path, original in patcher.object_patches_backup.items():
        if "." not in path and path in shell._modules:
            shell._modules[path] = original  # a patch that is applied to the original right now is not part of it
        elif "." not in path:
            setattr(shell, path, original)
    shell.diffusion_model = net
    shell.model_config = _unquantised(old.model_config)
    shell.device = patcher.offload_device
    shell.__class__ = shell_class(type(old))
    for name, value in {
        "current_patcher": None,
        "model_loaded_weight_memory": 0,
        "lowvram_patch_counter": 0,
        "model_lowvram": False,
        "current_weight_patches_uuid": None,
        "model_offload_buffer_memory": 0,
    }.items():
        if hasattr(shell, name):
            setattr(shell, name, value)
    bind(net, shell)
    return shell


def _unquantised(config: Any) -> Any:
    """The model's config without core's own notes on quantised storage, which would be written into files that are
    saved."""
    config = copy.copy(config)
    for name in ("scaled_fp8", "layer_quant_config", "quant_config"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    return config


def _patcher_of(patcher: Any, shell: nn.Module) -> Any:
    """A patcher for ``shell`` with all that is attached to ``patcher``, and no memory of what core did to the other
    model."""
    if type(patcher) is comfy.model_patcher.ModelPatcher:
        new = patcher.clone()
        new.model = shell
        new.size = 0
    else:
        new = _rebuilt(patcher, shell)
    fresh: dict[str, Callable[[], Any]] = {
        "backup": dict,
        "backup_buffers": dict,
        "object_patches_backup": dict,
        "hook_backup": dict,
        "cached_hook_patches": dict,
        "pinned": set,
        "patches_uuid": uuid.uuid4,
        "clone_base_uuid": uuid.uuid4,
    }
    for name, make in fresh.items():
        if hasattr(new, name):
            setattr(new, name, make())
    for name in (
        "parent",
        "current_hooks",
        "cached_patcher_init",
    ):  # the last one would load core's model again in place of ours
        if hasattr(new, name):
            setattr(new, name, None)
    new.weight_inplace_update = False  # a merge in place would write into storage that two models share
    return new


def _rebuilt(patcher: Any, shell: nn.Module) -> Any:
    """A classic patcher with the attachments of one whose class we don't know, and so cannot clone into another
    model."""
    new = comfy.model_patcher.ModelPatcher(
        shell, load_device=patcher.load_device, offload_device=patcher.offload_device
    )
    copy_attachments(patcher, new)
    return new


def copy_attachments(patcher: Any, new: Any) -> None:
    """Give a fresh patcher all that nodes put on another one."""
    new.patches = {key: list(entries) for key, entries in patcher.patches.items()}
    new.model_options = copy.deepcopy(patcher.model_options)
    for name in ("object_patches", "weight_wrapper_patches", "attachments", "additional_models", "hook_patches"):
        if hasattr(patcher, name):
            setattr(new, name, dict(getattr(patcher, name)))
    for name in ("callbacks", "wrappers"):
        if hasattr(patcher, name):
            kinds = getattr(patcher, name)
            setattr(new, name, {kind: {k: list(v) for k, v in by_key.items()} for kind, by_key in kinds.items()})
    for name in ("force_cast_weights", "hook_mode", "forced_hooks"):
        if hasattr(patcher, name):
            setattr(new, name, getattr(patcher, name))


# ---- what every hosted MODEL carries -------------------------------------------------------------------------------


def attach(patcher: Any) -> None:
    """Our callbacks and wrapper, each once."""
    calls, wraps = comfy.patcher_extension.CallbacksMP, comfy.patcher_extension.WrappersMP
    for kind, callback in ((calls.ON_LOAD, _on_load), (calls.ON_DETACH, _on_detach)):
        patcher.remove_callbacks_with_key(kind, KEY)
        patcher.add_callback_with_key(kind, KEY, callback)
    patcher.remove_wrappers_with_key(wraps.OUTER_SAMPLE, KEY)
    patcher.add_wrapper_with_key(wraps.OUTER_SAMPLE, KEY, _around_run)
    forget_refused_pins()
    give_own_pages(patcher.model.diffusion_model)
    if has_fp8(patcher.model.diffusion_model):
        # The other mode caches merged real values and later copies them straight into the FP8 tensor.
        patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram


def _around_run(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE wrapper: refuse before weights are loaded; leave no prompt's keys and values behind, however the
    run ends."""
    patcher = executor.class_obj.model_patcher
    refuse_foreign_patches(patcher)
    net = patcher.get_model_object("diffusion_model")
    net.forget_run()
    net.settings_of_run = settings = settings_of(patcher)
    net.expert_of_run = expert_of(patcher)
    prepare_cache(patcher, net, kwargs["sigmas"] if "sigmas" in kwargs else args[3])
    try:
        result = executor(*args, **kwargs)
        _report_attention(net)
        report_cache(net)
        if net.is_remote:
            net.report_pool()
        return result
    except comfy.model_management.OOM_EXCEPTION as error:
        told = explained(error, net, patcher.load_device)
        if told is None:
            raise
        raise told from error
    finally:
        net.forget_run()
        if settings.recording is not None:
            settings.recording.end()


def _report_attention(net: HostedModel) -> None:
    """Tell the user what a low-precision or sparse attention did in the run that ends."""
    for report in attention_report(net):
        _tell(report.lines(), report.as_asked)
    sparse = net.sparse_reports()
    net.sparse_facts = tuple(report.facts() for report in sparse)
    for found in sparse:
        _tell(found.lines(), found.as_asked)


def _tell(lines: list[str], as_asked: bool) -> None:
    say("\n".join(lines), level=logging.INFO if as_asked else logging.WARNING, keep=True)


def _on_load(patcher: Any, *args: Any, **kwargs: Any) -> None:
    net = patcher.model.diffusion_model
    net.settings_of_run = settings_of(patcher)
    if net.is_remote:
        return
    place_loose_parameters(patcher, *args, **kwargs)


def _on_detach(patcher: Any, unpatch_all: bool = True) -> None:
    # Without unpatch_all no weight moves: a clone goes, perhaps collected in the middle of another one's run.
    if unpatch_all:
        net = patcher.model.diffusion_model
        net.forget_run()
        net.settings_of_run = HostSettings()  # it may hold the matrices of a LoRA
        if net.is_remote:
            net.remote.drop()


_SHELLS: dict[type, type] = {}


def shell_class(base: Any) -> Any:
    """``base`` (WAN21, WAN22, …) that knows what our forward needs and what our weights look like in a file."""
    if getattr(base, "hosts_wan_fp8", False):
        return base
    if base not in _SHELLS:
        _SHELLS[base] = _make_shell_class(base)
    return _SHELLS[base]


def _make_shell_class(base: Any) -> type:

    def memory_required(self: Any, input_shape: Any, cond_shapes: Any = None) -> float:
        if self.diffusion_model.is_remote:
            return 0.0  # the pool's processes need it, not this one
        compute = self.manual_cast_dtype or self.get_dtype()
        compute = compute if compute in HIGH_PRECISION else torch.bfloat16
        patcher, net = self.current_patcher, self.diffusion_model
        device = comfy.model_management.get_torch_device() if patcher is None else torch.device(patcher.load_device)
        fused = net.fused_kernels != "eager" and kernels.refusal(device, compute) is None
        attention = net.settings_of_run.attention
        quantised = attention is not None and not attention.is_exact
        lora, cache = net.settings_of_run.lora or net.lora, net.settings_of_run.cache
        matrices = 0 if lora is None else lora.device_bytes(compute)
        recording = net.settings_of_run.recording is not None  # it copies the tokens before the blocks, as a cache does
        kept = int(recording) if cache is None else cache.depth
        rounded = rounding_bytes(parameter.nbytes for parameter in net.parameters())
        return (
            net.lacked
            + matrices
            + rounded
            + forward_needs(
                net.spec,
                input_shape,
                compute,
                fused=fused,
                low_precision_attention=quantised,
                kept_residuals=kept,
                extra_tokens=extra_tokens(net.spec, cond_shapes),
                quantized=net.quantization is not None,
            ).total
        )

    def state_dict_for_saving(self: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        net = self.diffusion_model
        refuse_live_lora(net.settings_of_run.lora, net.lora)
        saved = base.state_dict_for_saving(self, *args, **kwargs)
        return _with_fp8_marks(saved)

    members = {
        "hosts_wan_fp8": True,
        "memory_required": memory_required,
        "state_dict_for_saving": state_dict_for_saving,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
    }
    return type(base.__name__, (base,), members)


def _with_fp8_marks(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the layers that are stored as FP8, the way that core's newer loader and ours read (``X.comfy_quant``), for
    core's own saving nodes. Row and block scales get names of ours, at which core stops."""
    for key in [k for k in saved if k.endswith(".weight_scale")]:
        layer = key.removesuffix(".weight_scale")
        weight = saved[f"{layer}.weight"]
        if weight.dtype in FP8_DTYPES:
            form = format_name(weight.dtype, weight_granularity(saved[key], weight.shape))
            saved[layer + COMFY_SUFFIX] = comfy_mark(form)
    return saved
