"""Linears with FP8 weights, the casts of their inputs, and what all of them share.

The parameters are plain tensors: ``weight`` in e4m3 and ``weight_scale`` in fp32, ``w ~= weight * weight_scale``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gemm import GEMM, GemmRequest, GemmRunner, register_backends, token_multiple
from ..hardware import device_caps
from ..kernels.quantize import (
    Cast,
    Granularity,
    QuantizedActivation,
    collect_amax,
    current_multiplier,
    quantize,
    quantize_current,
    quantize_weight,
)
from ..models.layers import Linear
from ..models.wan import AmaxReduction
from ..registry import Resolution
from .calibrate import DelayedScales, Site
from .recipe import Recipe


class Quantization:
    """A recipe at work in one model: its backend on each device, and its scales."""

    def __init__(self, recipe: Recipe, sites: Sequence[str]) -> None:
        self.recipe = recipe
        self.scales = (
            DelayedScales(
                sites,
                history_len=recipe.amax_history_len,
                algorithm=recipe.amax_compute_algo,
                margin=recipe.margin,
            )
            if recipe.is_delayed
            else None
        )
        self.fused: bool | None = None
        """The Triton kernels or their eager references, as the running forward has it."""
        self.padding: tuple[int, int] | None = None
        """(tokens with padding, tokens) of the running forward; None where nothing is padded."""
        self.reduction: AmaxReduction | None = None
        """How maxima are agreed on with other ranks."""
        self._resolved: dict[tuple[torch.device, torch.dtype], Resolution[GemmRequest]] = {}

    def resolve(self, device: torch.device, dtype: torch.dtype) -> Resolution[GemmRequest]:
        """Who multiplies on ``device``, and why others do not.

        Raises:
            BackendUnavailableError: nobody can, or not the one asked for; with the reasons.
        """
        if (device, dtype) not in self._resolved:
            register_backends()
            request = GemmRequest(device_caps(device), self.recipe.granularity, dtype)
            self._resolved[device, dtype] = GEMM.resolve(self.recipe.backend, request)
        return self._resolved[device, dtype]

    def runner(self, device: torch.device, dtype: torch.dtype) -> GemmRunner:
        """The backend's functions."""
        runner = self.resolve(device, dtype).backend.run
        assert isinstance(runner, GemmRunner)
        return runner

    def compile_refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why blocks with this recipe cannot be compiled on ``device``; None where they can."""
        name = self.recipe.backend
        if name == "auto":
            name = self.resolve(device, dtype).backend.name
        if name != "transformer_engine":
            return None
        return (
            "Transformer Engine is called through objects that cannot be traced; choose the backend torch, or no "
            "compilation"
        )

    @property
    def backends(self) -> list[str]:
        """Who has multiplied so far."""
        return sorted({resolution.backend.name for resolution in self._resolved.values()})

    def reduce_with(self, reduction: AmaxReduction | None) -> None:
        """Agree on maxima with other ranks; None: there are none."""
        self.reduction = reduction
        if self.scales is not None:
            self.scales.reduce = None if reduction is None else reduction.over_all

    def begin_run(self) -> None:
        """A sampling run starts with the next forward."""
        if self.scales is not None:
            self.scales.begin_run()

    def begin(self, device: torch.device, dtype: torch.dtype, fused: bool) -> int:
        """Before a forward; returns what the number of tokens must be a multiple of."""
        self.fused = fused
        if self.scales is not None:
            self.scales.begin(device)
        self.padding = None
        return token_multiple(self.runner(device, dtype), self.recipe.granularity)

    def padded(self, tokens: int, num_tokens: int) -> None:
        """The forward that began has ``num_tokens`` tokens, padded to ``tokens``."""
        self.padding = None if tokens == num_tokens else (tokens, num_tokens)

    def end(self, timestep: Tensor) -> None:
        """After a forward."""
        if self.scales is not None:
            self.scales.end(timestep)


class InputQuantizer:
    """How the input of one or several linears is cast: within the kernel that makes it, or by itself."""

    def __init__(self, quantization: Quantization, site: int | None, *, text: bool = False) -> None:
        """
        Args:
            site: index among the delayed scales; None: the scale comes from the tensor itself.
            text: the input is the prompt: every rank has the whole of it, without the padding of video tokens.
        """
        self.quantization, self.text = quantization, text
        self.site: Site | None = None
        if site is not None:
            assert quantization.scales is not None
            self.site = quantization.scales.entries[site]

    def cast(self, device: torch.device, dtype: torch.dtype) -> Cast:
        """What the kernel that makes the input should do with it; ``finish`` does the rest."""
        granularity = self.quantization.recipe.granularity
        static = self._static()
        if static is not None:
            return static
        if granularity is Granularity.MX or self.quantization.runner(device, dtype).quantize is not None:
            return Cast(None)
        if granularity is Granularity.TENSOR:
            amax = torch.zeros(1, dtype=torch.float32, device=device)
            return Cast(None, amax=amax, padding=self._padding)
        return Cast(granularity, power_of_2=True)

    def finish(self, made: Tensor | QuantizedActivation, cast: Cast) -> QuantizedActivation:
        """The input in FP8, from what the kernel made of ``cast``."""
        if isinstance(made, QuantizedActivation):
            return made
        if cast.amax is None:
            return self(made)
        self._record(cast.amax)
        multiplier = current_multiplier(self._agreed(cast.amax))
        fused = self.quantization.fused
        return quantize(made, Cast(Granularity.TENSOR, multiplier=multiplier, dequant=1 / multiplier), fused=fused)

    def __call__(self, x: Tensor, gelu: bool = False) -> QuantizedActivation:
        """Cast ``x`` [..., D], after a GELU (tanh form) where asked."""
        own = self.quantization.runner(x.device, x.dtype).quantize
        fused, padding = self.quantization.fused, self._padding
        granularity = self.quantization.recipe.granularity
        if own is not None and padding is not None and granularity is Granularity.TENSOR and x.shape[1] == padding[0]:
            x[:, padding[1] :] = 0  # a maximum of its own making takes every row in
        static = self._static()
        if static is None and granularity is Granularity.TENSOR and self._is_shared:
            amax = collect_amax(x, gelu=gelu, fused=fused, padding=padding)
            self._record(amax)
            multiplier = current_multiplier(self._agreed(amax))
            static = Cast(Granularity.TENSOR, multiplier=multiplier, dequant=1 / multiplier)
        if static is not None:
            return quantize(x, static, gelu=gelu, fused=fused) if own is None else own(x, static, gelu)
        if own is not None:
            made = own(x, Cast(granularity, power_of_2=True), gelu)
            if self.site is not None:
                self._record(448.0 * made.scale)
            return made
        if granularity is Granularity.TENSOR:
            return quantize_current(x, gelu=gelu, amax=self._cell(), fused=fused, padding=padding)
        return quantize(x, Cast(granularity, power_of_2=True), gelu=gelu, fused=fused)

    def _static(self) -> Cast | None:
        """One scale from before, where there is one."""
        site = self.site
        if site is None or not site.calibrated:
            return None
        return Cast(
            Granularity.TENSOR,
            multiplier=site.multiplier,
            dequant=site.dequant,
            amax=self._cell(),
            padding=self._padding,
        )

    @property
    def _padding(self) -> tuple[int, int] | None:
        return None if self.text else self.quantization.padding

    @property
    def _is_shared(self) -> bool:
        """Whether other ranks hold the rest of this input."""
        return self.quantization.reduction is not None and not self.text

    def _agreed(self, amax: Tensor) -> Tensor:
        """``amax`` [1], raised to that of the ranks that hold the rest; a first step agrees with all of them, since
        delayed scales do."""
        reduction = self.quantization.reduction
        if reduction is not None and not self.text:
            (reduction.over_sequence if self.site is None else reduction.over_all)(amax)
        return amax

    def _cell(self) -> Tensor | None:
        scales = self.quantization.scales
        return None if scales is None or self.site is None else scales.cell(self.site)

    def _record(self, amax: Tensor) -> None:
        """Raise the site's maximum; nothing where there is no site."""
        cell = self._cell()
        if cell is not None:
            torch.maximum(cell, amax.reshape(1), out=cell)


class FP8Linear(Linear):
    """``y = x W^T + b`` with both operands in e4m3; made of a ``Linear`` in place by ``apply_recipe``."""

    quantization: Quantization
    input_quantizer: InputQuantizer | None  # type: ignore[assignment]
    """None: the input stays in high precision (backend ``weight-only``)."""
    original: tuple[Tensor, Tensor | None] | None
    """Weight and scale that this layer was made of; None where they are gone."""
    rounded_again: bool = False
    """It was made of FP8 under other scales: its values are rounded twice."""

    def forward(self, x: Tensor | QuantizedActivation, gelu: bool = False) -> Tensor:
        """[B, S, D_in] -> [B, S, D_out] in the type of ``x``; an input that is cast already is taken as it is.

        The model pads video tokens once a forward; text of an odd length is padded here, once a prompt.
        """
        if isinstance(x, Tensor):
            runner = self.quantization.runner(x.device, x.dtype)
            extra = -x.shape[1] % token_multiple(runner, self.quantization.recipe.granularity)
            if extra:
                return self.forward(F.pad(x, (0, 0, 0, extra)), gelu)[:, :-extra].contiguous()
        if isinstance(x, Tensor) and self.input_quantizer is not None:
            x = self.input_quantizer(x)
        stored = x if isinstance(x, Tensor) else x.qdata
        weight, scale, bias, handle = self.weight_source.fetch_stored(self, stored, x.dtype)
        y = self.quantization.runner(x.device, x.dtype)(x, weight, scale, bias)
        self.release(weight, bias, handle)
        if self.low_rank is not None:
            y = self.low_rank.add_(y, x)
        return F.gelu(y, approximate="tanh") if gelu else y

    def quantized(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Real values [D_out, D_in] as this layer stores them: bytes and scale."""
        granularity = self.quantization.recipe.granularity
        return quantize_weight(values, granularity, power_of_2=granularity is Granularity.BLOCK)
