"""Where the engine's modules get their values inside ComfyUI: from core, which may keep them elsewhere and patch them
on the way.

Core recognises a module that it may leave in host memory, and cast for each forward, by three attributes on the
instance (``comfy_cast_weights``, ``weight_function``, ``bias_function``). Every leaf gets them; a leaf without would
be neither loaded nor cast.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn

from ...wan_fp8.models.layers import HIGH_PRECISION, Leaf, Linear
from . import homes
from .pinning import pin_streamed


class ComfyWeights:
    """A ``WeightSource`` that goes through ``comfy.ops.cast_bias_weight``, and so takes part in offload and on-the-fly
    LoRA.

    It also polls ComfyUI's cancel flag, as core's own layers do: a forward of a large model takes many seconds.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = weakref.ref(net)
        accepted = inspect.signature(comfy.ops.cast_bias_weight).parameters
        self._offloadable = {"offloadable": True} if "offloadable" in accepted else {}
        """Asks for asynchronous transfers, and promises to say when the weight was last used; older cores have
        neither."""

    def fetch(self, module: Leaf, like: Tensor) -> tuple[Tensor, Tensor | None, Any]:
        """Weight and bias in the dtype and on the device of ``like``."""
        if not torch.compiler.is_compiling():
            comfy.model_management.throw_exception_if_processing_interrupted()
        patched = bool(module.weight_function or module.bias_function)  # type: ignore[arg-type]
        if not (module.comfy_cast_weights or patched):
            bias = module.bias
            return module.dequantized(module.weight, like.dtype), None if bias is None else bias.to(like.dtype), None
        if module.weight.dtype in HIGH_PRECISION:
            return self._cast(module, like, like.dtype, like.dtype)
        return self._fetch_fp8(module, like)

    def release(self, module: Leaf, weight: Tensor, bias: Tensor | None, handle: Any) -> None:
        """Tell core that the last use of what ``fetch`` returned is queued."""
        if handle is not None:
            self._uncast(module, weight, bias, handle)

    def _hooked(self) -> bool:
        """Whether the run that asks swaps LoRAs between forwards."""
        patcher: Any = self._net()._patcher()  # type: ignore[union-attr, operator]
        return bool(getattr(patcher, "hook_patches", None))

    def _cast(
        self, module: Leaf, like: Tensor, dtype: torch.dtype, bias_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Any]:
        result = comfy.ops.cast_bias_weight(module, like, dtype=dtype, bias_dtype=bias_dtype, **self._offloadable)
        return result if self._offloadable else (*result, None)

    def _uncast(self, module: Leaf, weight: Tensor, bias: Tensor | None, handle: Any) -> None:
        comfy.ops.uncast_bias_weight(module, weight, bias, handle)

    def fetch_stored(
        self, module: Linear, like: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Any]:
        """FP8 weight and scale on the device of ``like``. One that is patched on the fly is merged in high precision
        and cast again, for this forward."""
        if not torch.compiler.is_compiling():
            comfy.model_management.throw_exception_if_processing_interrupted()
        scale = module.current_scale()
        bias: Tensor | None = module.bias
        assert scale is not None
        if not (module.comfy_cast_weights or module.weight_function or module.bias_function):
            return module.weight, scale, None if bias is None else bias.to(dtype), None
        value, merged, bias, handle = self._stored_parts(module, like, dtype)
        if merged:
            return *module.quantized(value), bias, handle
        return value, scale.to(value.device, non_blocking=True), bias, handle

    def _fetch_fp8(self, module: Leaf, like: Tensor) -> tuple[Tensor, Tensor | None, Any]:
        """Real values of an FP8 weight."""
        value, merged, bias, handle = self._stored_parts(module, like, like.dtype)
        return value.to(like.dtype) if merged else module.dequantized(value, like.dtype), bias, handle

    def _stored_parts(
        self, module: Leaf, like: Tensor, bias_dtype: torch.dtype
    ) -> tuple[Tensor, bool, Tensor | None, Any]:
        """The bytes of an FP8 weight, or its merged real values; which of the two; bias and handle.

        Core moves the stored bytes; patches are added here, to real values.

        Left to core they would be added to the bytes before the scale is multiplied in: some versions call
        ``convert_weight`` on the way and some don't.
        """
        functions, module.weight_function = module.weight_function, []  # type: ignore[assignment]
        try:
            stored, bias, handle = self._cast(module, like, module.weight.dtype, bias_dtype)
        finally:
            module.weight_function = functions  # type: ignore[assignment]
        if not functions:
            return stored, False, bias, handle
        # A hooked LoRA writes into the stored bytes: what they were made of is no longer what they hold.
        real = module.stored_values if self._hooked() else module.convert_weight
        value: Tensor = real(stored)  # type: ignore[operator]
        for function in functions:  # type: ignore[union-attr]
            patches = getattr(function, "patches", None)
            key = getattr(function, "key", None)
            if patches is not None and key in patches:
                value = comfy.lora.calculate_weight(patches[key], value, key)
            else:
                value = function(value)
        return value, True, bias, handle


@functools.cache
def keep_transfers_out_of_graphs() -> None:
    """torch.compile calls what fetches weights from elsewhere as it is: events and streams of core's own, and patches
    whose number differs from layer to layer. Done at the first compiled forward: it imports torch's compiler."""
    for name in ("_cast", "_fetch_fp8", "_stored_parts", "_uncast"):
        setattr(ComfyWeights, name, torch.compiler.disable(getattr(ComfyWeights, name)))


def attach_weight_source(net: nn.Module) -> None:
    """Make every leaf of ``net`` one that core can load, offload, cast and patch."""
    source = ComfyWeights(net)
    defaults = _cast_defaults()
    for module in net.modules():
        if isinstance(module, Leaf):
            module.weight_source = source
            module.mover = homes.move
            for name, value in defaults.items():
                setattr(module, name, list(value) if isinstance(value, list) else value)


def _cast_defaults() -> dict[str, Any]:
    """The attributes that core's own layers start with: those that this core declares, and the three that every core
    reads."""
    declared = {
        name: value
        for name, value in vars(getattr(comfy.ops, "CastWeightBiasOp", object)).items()
        if not name.startswith("__") and (value is None or isinstance(value, (bool, list)))
    }
    return {"comfy_cast_weights": False, "weight_function": [], "bias_function": [], **declared}


def place_loose_parameters(
    patcher: Any,
    device_to: Any,
    lowvram_model_memory: Any = 0,
    force_patch_weights: bool = False,
    full_load: bool = False,
) -> None:
    """ON_LOAD callback: move and patch the parameters that core's loader passes over.

    It walks modules without children. ``blocks.N.modulation`` and ``head.modulation`` sit on modules that have some:
    under partial load they stay behind, and a LoRA for them is accepted and never applied, at full load too. Core's
    backup restores what is merged here.
    """
    net = patcher.model.diffusion_model
    net.forget_run()  # the weights that made the kept keys and values may have changed
    for name in loose_parameters(net):
        key = f"diffusion_model.{name}"
        if key in patcher.patches and key not in patcher.backup:
            patcher.patch_weight_to_device(key, device_to)
        parameter = net.get_parameter(name)
        if device_to is not None and parameter.device != torch.device(device_to):
            comfy.utils.set_attr_param(net, name, parameter.detach().to(device_to))
    pin_streamed(patcher)


def loose_parameters(net: nn.Module) -> list[str]:
    """Names of the parameters that belong to no leaf."""
    return [
        f"{path}.{name}" if path else name
        for path, module in net.named_modules()
        if not isinstance(module, Leaf)
        for name, _ in module.named_parameters(recurse=False)
    ]
