"""Read the weights of core's own Wan model, in every way that core stores them, under our names.

Core's formats: plain tensors (fp8 without a scale included), ``scaled_fp8`` (fp8 with ``scale_weight`` and perhaps
``scale_input`` beside it) and ``QuantizedTensor`` (a tensor subclass with the bytes in ``_qdata`` and the scale in its
layout's parameters; the name and type of those differ between versions, so they are looked for).
"""

from __future__ import annotations

from typing import Any

import comfy.ldm.wan.model
import comfy.ldm.wan.model_animate
import torch
from torch import Tensor, nn

from ...wan_fp8.checkpoint.detect import BLUR_KERNEL
from ...wan_fp8.errors import CheckpointError, UnsupportedPatchError
from ...wan_fp8.models.layers import HIGH_PRECISION, Leaf
from ...wan_fp8.models.s2v import INJECTED
from ...wan_fp8.models.specs import ModelSpec, Task

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_TASKS = {(16, 16): Task.T2V, (36, 16): Task.I2V, (48, 48): Task.TI2V}
"""(input channels, output channels) of the Wan2.2 models without further inputs."""
_EXTENDED = {"WanModel_S2V": (Task.S2V, (16, 16)), "AnimateWanModel": (Task.ANIMATE, (36, 16))}
"""The others, by core's class."""
_INJECTORS = ("audio_injector.injector.", "audio_injector.injector_adain_layers.")
"""Core builds twelve of each, whatever the number of blocks."""


def core_spec(net: Any) -> ModelSpec:
    """What core's ``WanModel`` holds.

    Raises:
        UnsupportedPatchError: anything else; the message names it.
    """
    wanted = (
        "Wan FP8 takes Wan2.2 T2V-A14B, I2V-A14B, TI2V-5B, Animate-14B and S2V-14B: connect the MODEL of such a "
        "checkpoint"
    )
    task, channels = _EXTENDED.get(_class_name(net), (None, None))
    if task is None and type(net) is not comfy.ldm.wan.model.WanModel:
        raise UnsupportedPatchError(f"this MODEL holds a {_kind(net)}. {wanted}")
    weights = dict(net.named_parameters())
    if task is None and any(name.startswith("img_emb.") for name in weights):
        raise UnsupportedPatchError(
            f"this MODEL is a Wan2.1 image-to-video model (it has a CLIP vision branch). {wanted}"
        )
    if any(name.startswith("ref_conv.") for name in weights):
        raise UnsupportedPatchError(f"this MODEL is a Fun model with a reference image (ref_conv). {wanted}")
    patch, head = weights["patch_embedding.weight"].shape, weights["head.head.weight"].shape
    patch_size = (int(patch[2]), int(patch[3]), int(patch[4]))
    found = (int(patch[1]), int(head[0]) // (patch_size[0] * patch_size[1] * patch_size[2]))
    if found != channels and (task is not None or found not in _TASKS):
        raise UnsupportedPatchError(
            f"this MODEL is a Wan model with {found[0]} input and {found[1]} output channels (a Fun or control "
            f"model). {wanted}"
        )
    return ModelSpec(
        task=task or _TASKS[found],
        dim=int(patch[0]),
        ffn_dim=int(weights["blocks.0.ffn.0.weight"].shape[0]),
        num_heads=int(net.num_heads),
        num_layers=len(net.blocks),
        in_dim=found[0],
        out_dim=found[1],
        text_dim=int(weights["text_embedding.0.weight"].shape[1]),
        freq_dim=int(weights["time_embedding.0.weight"].shape[1]),
        patch_size=patch_size,
        eps=float(net.eps),
    )


def clean_weights(patcher: Any) -> dict[str, Tensor]:
    """The transformer's weights as they were loaded, whatever is merged into them at this moment.

    New tensor objects on the same storage; ``X.weight_scale`` beside an FP8 ``X.weight`` that has one.
    """
    net, prefix = patcher.model.diffusion_model, "diffusion_model."
    # Not state_dict(): on a QuantizedTensor it detaches, which fails in inference mode.
    stored = {name: value for name, value in (*net.named_parameters(), *net.named_buffers())}
    for key, kept in patcher.backup.items():
        if key.startswith(prefix):
            stored[key.removeprefix(prefix)] = kept.weight
    weights: dict[str, Tensor] = {}
    for name, value in stored.items():
        if name.endswith((".scale_input", ".input_scale")):
            continue  # for a GEMM with static activation scales
        if name.endswith(".scale_weight"):
            layer = name.removesuffix(".scale_weight")
            if stored[f"{layer}.weight"].dtype in FP8:
                weights[f"{layer}.weight_scale"] = value.detach().float()
        elif hasattr(value, "_qdata"):
            data, scale = _plain_parts(name, value)
            weights[name] = data
            weights[name.removesuffix("weight") + "weight_scale"] = scale
        else:
            weights[name] = value.detach()
    return {name: value for name, value in weights.items() if not _is_left_out(name, net)}


def _is_left_out(name: str, net: Any) -> bool:
    """Constants that our definition makes itself, and injectors that stand after no block."""
    if not name.startswith(_INJECTORS):
        return BLUR_KERNEL.fullmatch(name) is not None
    number = int(name.split(".")[2])
    return INJECTED[number] >= len(net.blocks)


def assign_weights(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Fill a model that was built on ``meta``: every parameter becomes a new Parameter on the given storage.

    Raises:
        CheckpointError: a weight is missing, left over, or of another shape.
    """
    for name in [n for n in weights if n.endswith(".weight_scale")]:
        leaf = net.get_submodule(name.removesuffix(".weight_scale"))
        assert isinstance(leaf, Leaf), name
        leaf.weight_scale = nn.Parameter(torch.empty_like(weights[name], device="meta"), requires_grad=False)
    missing = sorted(net.state_dict().keys() - weights.keys())
    extra = sorted(weights.keys() - net.state_dict().keys())
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which no Wan2.2 transformer has"
        raise CheckpointError(
            f"this MODEL {what} ({len(missing)} missing, {len(extra)} unknown): load a Wan2.2 checkpoint"
        )
    net.load_state_dict(weights, strict=True, assign=True)


def _plain_parts(name: str, value: Any) -> tuple[Tensor, Tensor]:
    """Bytes and scale of one of core's QuantizedTensors."""
    data: Tensor = value._qdata
    scale = None
    for attribute in ("_layout_params", "_params", "params"):
        parameters = getattr(value, attribute, None)
        if parameters is not None:
            scale = parameters.get("scale") if isinstance(parameters, dict) else getattr(parameters, "scale", None)
            break
    if data.dtype not in FP8 or not isinstance(scale, Tensor) or data.shape != value.shape:
        layout = getattr(value, "_layout_type", getattr(value, "_layout_cls", type(value).__name__))
        raise UnsupportedPatchError(
            f"{name} is stored as {layout}; Wan FP8 reads bf16, fp16, fp32 and fp8 weights: load one of those files "
            "instead"
        )
    scale = scale.detach().float()
    return data.detach(), scale.reshape(-1, 1) if scale.numel() == data.shape[0] > 1 else scale.reshape(())


def _class_name(net: Any) -> str:
    """The name of core's own class, not of one that is derived from it."""
    known = (comfy.ldm.wan.model, comfy.ldm.wan.model_animate)
    return type(net).__name__ if any(getattr(m, type(net).__name__, None) is type(net) for m in known) else ""


def _kind(net: Any) -> str:
    if net is None:
        return "no diffusion model"
    known = {
        "VaceWanModel": "Wan VACE model",
        "CameraWanModel": "Wan Fun camera model",
        "HumoWanModel": "HuMo model",
        "OptimizedModule": "model that is already compiled (put the compile node after ours)",
    }
    return known.get(type(net).__name__, f"{type(net).__name__}, not a Wan model")


def has_fp8(net: nn.Module) -> bool:
    """Whether any leaf keeps its weight in FP8."""
    return any(m.weight.dtype not in HIGH_PRECISION for m in net.modules() if isinstance(m, Leaf))
