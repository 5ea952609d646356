"""Modules that own parameters, and the one door through which their values are read.

A host (ComfyUI) may keep a weight in another place or precision than the forward needs, and may patch it on the way.
So nothing in this package touches ``module.weight`` in a forward: it asks ``module.fetch(like)`` and gives the tensors
back with
``module.release(...)``. By itself a module serves its own parameters; a host replaces ``weight_source``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.quantize import Cast, Granularity, QuantizedActivation, quantize_weight, spread_scale, weight_granularity

HIGH_PRECISION = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Storage types that can be computed in without a scale."""
HALF = (torch.bfloat16, torch.float16)


class WeightSource(Protocol):
    """Where the values of a module's parameters come from."""

    def fetch(self, module: Leaf, like: Tensor) -> tuple[Tensor, Tensor | None, Any]:
        """Weight and bias on the device and in the dtype of ``like``, and a handle for ``release``."""

    def fetch_stored(
        self, module: Linear, like: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Any]:
        """FP8 weight and its scale on the device of ``like``, the bias in ``dtype``, and a handle for ``release``."""

    def release(self, module: Leaf, weight: Tensor, bias: Tensor | None, handle: Any) -> None:
        """Called after the last use of what ``fetch`` or ``fetch_stored`` returned."""


class OwnWeights:
    """The module's own parameters, cast if they are stored in another type than the computation's."""

    def fetch(self, module: Leaf, like: Tensor) -> tuple[Tensor, Tensor | None, Any]:
        bias = module.bias
        return (
            module.dequantized(module.weight, like.dtype),
            None if bias is None else bias.to(like.dtype),
            None,
        )

    def fetch_stored(
        self, module: Linear, like: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Any]:
        del like
        scale, bias = module.current_scale(), module.bias
        assert scale is not None
        return module.weight, scale, None if bias is None else bias.to(dtype), None

    def release(self, module: Leaf, weight: Tensor, bias: Tensor | None, handle: Any) -> None:
        del module, weight, bias, handle


class InputQuantizer(Protocol):
    """How an FP8 linear wants its input."""

    def cast(self, device: torch.device, dtype: torch.dtype) -> Cast:
        """What a fused kernel that makes the input does with it."""

    def finish(self, made: Tensor | QuantizedActivation, cast: Cast) -> QuantizedActivation:
        """The input, from what the kernel made."""

    def __call__(self, x: Tensor, gelu: bool = False) -> QuantizedActivation:
        """The input, from a tensor."""


class LowRankBranch(Protocol):
    """A change of low rank that a linear adds to its output."""

    def add_(self, y: Tensor, x: Tensor | QuantizedActivation) -> Tensor:
        """Add the branch of ``x`` to ``y`` in place; returns y."""


OWN_WEIGHTS = OwnWeights()


class Leaf(nn.Module):
    """A module without children that owns a ``weight`` and perhaps a ``bias`` and a ``weight_scale``."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: nn.Parameter | None
    weight_source: WeightSource = OWN_WEIGHTS
    mover: Callable[[Leaf, Callable[[Tensor], Tensor]], None] | None = None
    """Set by a host that moves parameters in its own way (``.to`` and its like)."""

    def __init__(self) -> None:
        super().__init__()
        self.homes: dict[str, Any] = {}
        """The mover's notes, by parameter; void when one is written to in place."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Leaf:
        if self.mover is None:
            return super()._apply(fn, recurse)
        self.mover(self, fn)
        return self

    def fetch(self, like: Tensor) -> tuple[Tensor, Tensor | None, Any]:
        """Weight, bias and a handle, ready to be used with ``like`` (its device, its dtype)."""
        return self.weight_source.fetch(self, like)

    def release(self, weight: Tensor, bias: Tensor | None, handle: Any) -> None:
        """Tell the source that the tensors of one ``fetch`` are no longer needed."""
        self.weight_source.release(self, weight, bias, handle)

    def dequantized(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``weight`` in ``dtype``, multiplied by the module's ``weight_scale`` where it is stored in FP8."""
        if weight.dtype in HIGH_PRECISION:
            return weight.to(dtype)
        scale = self.current_scale()
        value = weight.to(dtype)
        return value if scale is None else value * spread_scale(scale, weight.shape).to(value)

    def current_scale(self) -> Tensor | None:
        """Scale of the weight as it is now; None where the stored values are the real ones."""
        return getattr(self, "weight_scale", None)


class Linear(Leaf):
    """``y = x W^T + b``, in the dtype of ``x``. An FP8 weight is dequantised by ``weight_scale`` (scalar, [D_out, 1]
    or [D_out / 128, D_in / 128])."""

    input_quantizer: InputQuantizer | None = None
    """Set where the input may come in FP8: then whoever makes it casts it once for all that read it."""
    low_rank: LowRankBranch | None = None
    """Set while a live LoRA changes this linear."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.register_parameter("weight_scale", None)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """[..., D_in] -> [..., D_out]; with ``gelu`` (tanh form) the activation runs in the GEMM's epilogue on a GPU,
        on fp32 sums (unless a gradient is wanted)."""
        weight, bias, handle = self.fetch(x)
        if self.low_rank is not None:
            y = self.low_rank.add_(F.linear(x, weight, bias), x)
            y = torch.ops.aten.gelu_(y, approximate="tanh") if gelu else y  # F's own would hold a second copy
        elif not gelu:
            y = F.linear(x, weight, bias)
        elif x.is_cuda and bias is not None and x.dtype in HALF and not _needs_gradient(x, weight):
            y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])
        else:
            y = F.gelu(F.linear(x, weight, bias), approximate="tanh")
        self.release(weight, bias, handle)
        return y

    # ---- merging (ComfyUI calls these two by name around a LoRA merge; so may any other merger) ----------------------

    source: Tensor | None = None
    """High-precision original of an FP8 weight, where it is kept: merges then start from it and are rounded once."""
    _merged: tuple[weakref.ref[nn.Parameter], Tensor] | None = None
    """A merged FP8 weight, which this does not keep alive, and its scale. The scale counts while that Parameter is the
    weight: whoever puts the old one back needs to restore nothing else."""

    @property
    def is_merged(self) -> bool:
        """Whether the FP8 weight is one that ``set_weight`` made, and not the one that was loaded."""
        return self._merged is not None and self._merged[0]() is self.weight

    def current_scale(self) -> Tensor | None:
        if self._merged is not None and self.is_merged:
            return self._merged[1]
        return self.weight_scale

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: Any) -> Tensor:
        """Real values of ``weight``, which holds this module's stored ones in any dtype (high precision: as it is)."""
        del inplace  # what comes in may be the stored tensor itself
        if self.weight.dtype in HIGH_PRECISION:
            return weight
        if self.source is not None and not self.is_merged:
            return self.source.to(weight.device, torch.float32, copy=True)
        return self.stored_values(weight)

    def stored_values(self, weight: Tensor) -> Tensor:
        """What the FP8 bytes of ``weight`` stand for under the scale of now, in fp32."""
        scale, value = self.current_scale(), weight.float()
        return value if scale is None else value * spread_scale(scale, value.shape).to(value)

    def quantized(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Real values [D_out, D_in] as this module stores them: bytes, and a scale of the same kind as its own."""
        scale = self.weight_scale
        kind = Granularity.TENSOR if scale is None else weight_granularity(scale, values.shape)
        return quantize_weight(values, kind, dtype=self.weight.dtype)

    def set_weight(
        self,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **_: Any,
    ) -> Tensor | None:
        """Take merged real values.

        Args:
            weight: What the weight becomes.
            inplace_update: Write into the stored tensor with the scale that it has: whoever asks for this copies the
                old bytes back later, and no scale.
            seed: Unused: rounding is to nearest.
            return_weight: Change nothing and return the values (a merge on the fly, for one forward).
        """
        del seed
        if return_weight:
            return weight
        if inplace_update:
            self.homes.clear()
        if self.weight.dtype in HIGH_PRECISION:
            if inplace_update:
                self.weight.data.copy_(weight)
            else:
                self.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        elif inplace_update:
            scale = self.current_scale()
            value = weight if scale is None else weight / spread_scale(scale, weight.shape).to(weight)
            self.weight.data.copy_(_rounded(value, self.weight.dtype))
        else:
            qdata, scale = self.quantized(weight)
            self.weight = nn.Parameter(qdata, requires_grad=False)
            self._merged = (weakref.ref(self.weight), scale)
        return None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scale = self.current_scale()
        if scale is not None and scale is not self.weight_scale:
            destination[prefix + "weight_scale"] = scale.detach()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _needs_gradient(x: Tensor, weight: Tensor) -> bool:
    """True while training: the GEMM with GELU in its epilogue has no derivative in torch."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """To FP8: clamped first, since a cast does not saturate."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


class PatchEmbedding(Leaf):
    """A Conv3d whose stride is its kernel, as one matrix product over patches: [B, C, F, H, W] -> [B, S, D].

    Patches are taken time-major, then rows, then columns (the official flatten order). The weight keeps the official
    shape
    [D, C, p_t, p_h, p_w], so that checkpoints and LoRAs fit.
    """

    def __init__(self, in_dim: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(dim, in_dim, *patch_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        pt, ph, pw = self.patch_size
        b, c, f, h, w = x_BCFHW.shape
        patches = x_BCFHW.reshape(b, c, f // pt, pt, h // ph, ph, w // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        patches = patches.reshape(b, (f // pt) * (h // ph) * (w // pw), c * pt * ph * pw)
        weight, bias, handle = self.fetch(patches)
        y = F.linear(patches, weight.flatten(1), bias)
        self.release(weight, bias, handle)
        return y


class NormWeight(Leaf):
    """The learned gain (and offset) of a norm; the arithmetic is in ``functional``, where it can be fused."""

    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False) if bias else None
