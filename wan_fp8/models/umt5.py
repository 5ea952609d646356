"""The UMT5 encoder of Wan2.2, built from tensors: transformers' module, filled from either naming scheme, at any size.

Weights may be stored in FP8 (``float8_e4m3fn``, one fp32 scale per output row) and are then multiplied at each use;
the embedding table stays in bf16, since a prompt touches a few hundred of its 256,384 rows.

Source: Wan-Video/Wan2.2 ``wan/modules/t5.py``; names of the other scheme: transformers ``UMT5EncoderModel``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BackendUnavailableError, CheckpointError

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

_BLOCK_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
"""Official names inside ``blocks.i.`` to transformers' inside ``encoder.block.i.``."""

_EMBEDDINGS = ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight")
_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
_IGNORED = re.compile(
    r"(^|\.)(spiece_model|scaled_fp8|logit_scale|lm_head\.weight)$|^decoder\.|\.(comfy_quant|scale_input|input_scale)$"
)
"""Markers, activation scales (weights alone are FP8 here) and the unused half of a full UMT5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UMT5Spec:
    """Sizes of one encoder, read from tensor shapes."""

    vocab_size: int
    width: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    num_buckets: int


class Fp8Linear(nn.Module):
    """``y = (x Q^T) * scale`` with Q in e4m3 and one fp32 scale per output row; computed in the dtype of ``x``."""

    weight = None
    """transformers casts activations to ``wo.weight.dtype`` when there is one; FP8 must not be what it sees."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.qdata = nn.Parameter(torch.empty(out_features, in_features, dtype=E4M3), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features, 1, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        # Scaling the output instead of the weight rounds once less and touches [S, D_out] instead of [D_out, D_in].
        return F.linear(x, self.qdata.to(x.dtype)) * self.scale.to(x.dtype).T


def normalized_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under transformers' names, without prefix; markers and a decoder left out, ``X.scale_weight`` as
    ``X.weight_scale``.

    Raises:
        CheckpointError: no text encoder is in there.
    """
    prefix = _find_prefix(state_dict)
    result: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or _IGNORED.search(name):
            continue
        for suffix in _SCALE_SUFFIXES:
            if name.endswith(suffix):
                name = name.removesuffix(suffix) + ".weight_scale"
        result[_transformers_name(name)] = tensor
    table = result.pop("shared.weight", None)
    if table is not None:
        result["encoder.embed_tokens.weight"] = table
    return result


def _find_prefix(state_dict: Mapping[str, Tensor]) -> str:
    for ending in _EMBEDDINGS:
        for key in state_dict:
            if key == ending or key.endswith("." + ending):
                return key.removesuffix(ending)
    sample = ", ".join(list(state_dict)[:3]) or "nothing"
    raise CheckpointError(
        f"this is no UMT5 text encoder (it holds {sample}, …); use models_t5_umt5-xxl-enc-bf16.pth, "
        "a umt5_xxl_*.safetensors or the text_encoder folder of a Diffusers checkpoint"
    )


def _transformers_name(name: str) -> str:
    if name == "token_embedding.weight":
        return "shared.weight"
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    match = re.match(r"blocks\.(\d+)\.(.+)\.(weight|weight_scale)$", name)
    if match and match[2] in _BLOCK_NAMES:
        return f"encoder.block.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"
    return name


def spec_of(tensors: Mapping[str, Tensor]) -> UMT5Spec:
    """Sizes of the encoder that ``normalized_names`` returned.

    Raises:
        CheckpointError: tensors that say so are missing, or it is a T5 (one position bias shared by all layers).
    """
    layers = {int(m[1]) for key in tensors if (m := re.match(r"encoder\.block\.(\d+)\.", key))}
    first = "encoder.block.0.layer"
    bias_name = "SelfAttention.relative_attention_bias.weight"
    try:
        table = tensors["encoder.embed_tokens.weight"]
        bias = tensors[f"{first}.0.{bias_name}"]
        query = tensors[f"{first}.0.SelfAttention.q.weight"]
        gate = tensors[f"{first}.1.DenseReluDense.wi_0.weight"]
    except KeyError as error:
        raise CheckpointError(
            f"the text encoder is incomplete: {error.args[0]} is missing; download it again"
        ) from error
    if len(layers) > 1 and f"encoder.block.1.layer.0.{bias_name}" not in tensors:
        raise CheckpointError(
            "this is a T5 text encoder (one position bias for all layers), as Flux and SD3 use; "
            "Wan2.2 needs UMT5-XXL, for example models_t5_umt5-xxl-enc-bf16.pth"
        )
    return UMT5Spec(
        vocab_size=table.shape[0],
        width=table.shape[1],
        num_heads=bias.shape[1],
        head_dim=query.shape[0] // bias.shape[1],
        ffn_dim=gate.shape[0],
        num_layers=len(layers),
        num_buckets=bias.shape[0],
    )


def build_umt5(
    tensors: dict[str, Tensor],
    spec: UMT5Spec,
    *,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: Any,
) -> nn.Module:
    """transformers' ``UMT5EncoderModel`` holding ``tensors``, in eval mode, without gradients.

    Args:
        tensors: As ``normalized_names`` returns them; emptied on the way, so that the weights never exist twice.
        spec: As ``spec_of`` returns it.
        storage_dtype: Of the linears: a float type, or float8_e4m3fn.
        compute_dtype: Of everything else, and of the activations.
        device: Where the weights go, one tensor at a time.
    Raises:
        CheckpointError: tensors are missing, left over or of another shape.
    """
    model = _skeleton(spec, fp8=storage_dtype == E4M3)
    state = dict(_converted(tensors, fp8=storage_dtype == E4M3, dtype=compute_dtype, device=device))
    state["shared.weight"] = state["encoder.embed_tokens.weight"]
    _check_complete(model, state)
    model.load_state_dict(state, strict=True, assign=True)
    # One module for both names, so that a move to another device copies the table once.
    model.encoder.set_input_embeddings(model.shared)  # type: ignore[operator,union-attr]
    return model.eval().requires_grad_(False)


def _skeleton(spec: UMT5Spec, *, fp8: bool) -> nn.Module:
    try:
        from transformers import UMT5Config, UMT5EncoderModel
    except Exception as error:  # one of another torch raises what it likes
        raise BackendUnavailableError(
            f"the text encoder needs the transformers package, which does not import here: {error}; "
            "run 'pip install transformers'"
        ) from error
    config = UMT5Config(
        vocab_size=spec.vocab_size,
        d_model=spec.width,
        d_kv=spec.head_dim,
        d_ff=spec.ffn_dim,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        relative_attention_num_buckets=spec.num_buckets,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        dropout_rate=0.0,
    )
    config._attn_implementation = "eager"  # the published order: bias added in the storage type, softmax in fp32
    with torch.device("meta"):
        model: nn.Module = UMT5EncoderModel(config)
        if fp8:
            for name, module in list(model.named_modules()):
                if isinstance(module, nn.Linear):
                    model.set_submodule(name, Fp8Linear(module.in_features, module.out_features))
    return model


def is_linear(module: str) -> bool:
    """Whether a module of a block, by its name, is one that may be FP8."""
    return re.search(r"\.(SelfAttention|DenseReluDense)\.(q|k|v|o|wi_0|wi_1|wo)$", module) is not None


def _converted(
    tensors: dict[str, Tensor], *, fp8: bool, dtype: torch.dtype, device: Any
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under its final name, in its final type, on its final device; taken out of ``tensors``."""
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".weight_scale")}
    for name in list(tensors):
        tensor, module = tensors.pop(name), name.removesuffix(".weight")
        scale = scales.get(f"{module}.weight_scale")
        if fp8 and is_linear(module):
            qdata, row_scale = quantize_rows(tensor.to(device), scale)
            yield f"{module}.qdata", qdata
            yield f"{module}.scale", row_scale
        else:
            yield name, dequantize(tensor.to(device), scale, dtype)


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``weight * scale`` in ``dtype``, the product taken in fp32; a weight without scale is only cast."""
    if scale is None:
        return weight.to(dtype)
    return (weight.float() * scale.to(weight.device, torch.float32)).to(dtype)


def quantize_rows(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """e4m3 data and an fp32 scale [D_out, 1] per row. A weight that is e4m3 already is kept as it is.

    Args:
        weight: [D_out, D_in], a float or FP8 type.
        scale: Its scale in the file (scalar or [D_out, 1]), if any.
    """
    rows = weight.shape[0]
    if weight.dtype == E4M3:
        factor = torch.ones(rows, 1) if scale is None else scale.float().reshape(-1, 1).expand(rows, 1)
        return weight, factor.to(weight.device, torch.float32).contiguous()
    value = dequantize(weight, scale, torch.float32)
    # A row of zeros gets a scale of 1 by clamping its largest value away from zero.
    largest = value.abs().amax(dim=1, keepdim=True)
    row_scale = torch.where(largest > 0, largest / E4M3_MAX, torch.ones_like(largest))
    return (value / row_scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), row_scale


def _check_complete(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing:
        raise CheckpointError(f"the text encoder lacks {_some(missing)}; the file is incomplete, download it again")
    if extra:
        raise CheckpointError(f"the text encoder has tensors that UMT5 does not have: {_some(extra)}; use UMT5-XXL")
    wrong = [
        f"{key} {tuple(state[key].shape)} for {shape}" for key, shape in wanted.items() if state[key].shape != shape
    ]
    if wrong:
        raise CheckpointError(f"the text encoder has tensors of another shape: {_some(wrong)}; download it again")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
