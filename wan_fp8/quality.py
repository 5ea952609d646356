"""What a faster setting does to a result: measures against a reference run, by step, in latents and in frames.

Everything is computed in float64 or, for SSIM, in float32 per frame; nothing here knows how a run was made.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, attention_cores
from .errors import InputError
from .quant.linear import Quantization

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
"""Of the Gaussian that Wang et al. (2004) weight each neighbourhood with."""
SSIM_K1, SSIM_K2 = 0.01, 0.03
LPIPS_NET = "alex"
"""The network that the authors of LPIPS advise for comparing pictures."""


# ---- measures ------------------------------------------------------------------------------------------------------


def psnr(ours: Tensor, exact: Tensor, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB; infinite where both are equal.

    Args:
        peak: Of the signal, 1 for pictures in 0..1; None: the range of ``exact``, as for latents.
    """
    _same_shape(ours, exact)
    wanted = exact.double()
    error = float((ours.double() - wanted).square().mean())
    top = float(wanted.max() - wanted.min()) if peak is None else peak
    if error == 0:
        return math.inf
    return 20 * math.log10(top) - 10 * math.log10(error) if top > 0 else -math.inf


def cosine(ours: Tensor, exact: Tensor) -> float:
    """Cosine of the angle between two tensors as vectors; 0 where one of them is zero."""
    _same_shape(ours, exact)
    a, b = ours.double().flatten(), exact.double().flatten()
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths else 0.0


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """L2 distance over the length of ``exact``."""
    _same_shape(ours, exact)
    b = exact.double()
    distance, length = float((ours.double() - b).norm()), float(b.norm())
    return distance / length if length else (math.inf if distance else 0.0)


def ssim(ours_NCHW: Tensor, exact_NCHW: Tensor, peak: float = 1.0) -> float:
    """Mean structural similarity of pictures: Gaussian window of 11 x 11, sigma 1.5, only where it lies inside the
    picture; every channel by itself, then the mean of all.

    Raises:
        InputError: pictures smaller than the window.
    """
    _same_shape(ours_NCHW, exact_NCHW)
    if ours_NCHW.ndim != 4 or min(ours_NCHW.shape[-2:]) < SSIM_WINDOW:
        raise InputError(
            f"SSIM compares pictures [N, C, H, W] of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels; got "
            f"{list(ours_NCHW.shape)}"
        )
    pairs = zip(ours_NCHW, exact_NCHW, strict=True)  # one by one: a video's moments would be ten times its size
    return sum(float(_ssim_map(a, b, peak).mean(dtype=torch.float64)) for a, b in pairs) / len(ours_NCHW)


def _ssim_map(a_CHW: Tensor, b_CHW: Tensor, peak: float) -> Tensor:
    """Variances are taken around the middle of the range, where float32 loses least."""
    a, b = a_CHW.float() - peak / 2, b_CHW.float() - peak / 2
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a * a) - mean_a * mean_a, _blurred(b * b) - mean_b * mean_b
    covariance = _blurred(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + peak / 2, mean_b + peak / 2
    c1, c2 = (SSIM_K1 * peak) ** 2, (SSIM_K2 * peak) ** 2
    light = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    return light * (2 * covariance + c2) / (var_a + var_b + c2)


def _blurred(x_CHW: Tensor) -> Tensor:
    offsets = torch.arange(SSIM_WINDOW, device=x_CHW.device, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    row = (weights / weights.sum()).to(x_CHW.dtype)
    planes = x_CHW[:, None]
    return F.conv2d(F.conv2d(planes, row.view(1, 1, 1, -1)), row.view(1, 1, -1, 1))


def lpips_distance(ours_NCHW: Tensor, exact_NCHW: Tensor) -> float | str:
    """Mean LPIPS of pictures in 0..1, or the reason why there is none.

    The package ``lpips`` is looked for, never required; it fetches the weights of its AlexNet at its first use.
    """
    _same_shape(ours_NCHW, exact_NCHW)
    if importlib.util.find_spec("lpips") is None:
        return "not measured: the package lpips is not installed"
    import lpips  # type: ignore[import-not-found, unused-ignore]

    try:
        measure = lpips.LPIPS(net=LPIPS_NET, verbose=False)
    except OSError as error:  # a machine without a network
        return f"not measured: lpips could not get its weights ({error})"
    pairs = zip(ours_NCHW, exact_NCHW, strict=True)
    with torch.inference_mode():
        values = [float(measure(a[None].float() * 2 - 1, b[None].float() * 2 - 1)) for a, b in pairs]
    return sum(values) / len(values)


def _same_shape(ours: Tensor, exact: Tensor) -> None:
    if ours.shape != exact.shape:
        raise InputError(f"two results of one shape are compared; got {list(ours.shape)} and {list(exact.shape)}")


# ---- scores --------------------------------------------------------------------------------------------------------


def latent_scores(ours: Tensor, exact: Tensor) -> dict[str, Any]:
    """Of latents; a PSNR of None goes with ``identical``."""
    return {
        "identical": torch.equal(ours, exact),
        "psnr_db": finite(psnr(ours, exact)),
        "cosine": cosine(ours, exact),
        "relative_error": relative_error(ours, exact),
    }


def video_scores(ours_NCHW: Tensor, exact_NCHW: Tensor) -> dict[str, Any]:
    """Of frames in 0..1."""
    return {
        "identical": torch.equal(ours_NCHW, exact_NCHW),
        "psnr_db": finite(psnr(ours_NCHW, exact_NCHW, 1.0)),
        "ssim": ssim(ours_NCHW, exact_NCHW),
        "lpips": lpips_distance(ours_NCHW, exact_NCHW),
    }


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


@dataclass(slots=True)
class Trajectory:
    """Clean estimates of a run by step, on the host: 20 MB a step at 1280x720x81."""

    clean: dict[int, Tensor] = field(default_factory=dict)

    def record(self, step: int, clean: Tensor) -> None:
        """Keep one step's estimate; ``step`` counts from 0."""
        self.clean[step] = clean.detach().to("cpu", torch.float32, copy=True)

    def compare(self, step: int, clean: Tensor) -> dict[str, float]:
        """Another run's estimate at the same step against the one kept.

        Raises:
            InputError: this run had no such step.
        """
        if step not in self.clean:
            raise InputError(f"the reference run has no step {step + 1}: both runs take the same steps")
        exact = self.clean[step]
        ours = clean.detach().to("cpu", torch.float32)
        return {
            "step": step + 1,
            "cosine": cosine(ours, exact),
            "relative_error": relative_error(ours, exact),
        }


# ---- who computed --------------------------------------------------------------------------------------------------


def kernels_used(model: nn.Module, attention: Attention | None = None) -> dict[str, dict[str, int] | list[str]]:
    """Backends that a model has used since its run began.

    Args:
        attention: The setting of the run, where it came with each forward; None: the model's own.
    Returns:
        ``attention``: names, with self-attentions served for a low-precision or sparse setting; ``gemm``: who
        multiplied in FP8.
    """
    names: set[str] = set()
    counts: dict[str, int] = {}
    for core in attention_cores(model):
        setting = attention or core.setting
        for name, calls in core.answered.get(setting, {}).items():
            counts[name] = counts.get(name, 0) + calls
        run = None if setting.sparsity is None else core.sparse_runs.get(setting.sparsity)
        for name, calls in () if run is None else run.answered.items():
            if name != "dense" or setting.is_exact:  # else the low-precision setting has counted it
                shown = name if name == "dense" else f"{name} block-sparse"
                counts[shown] = counts.get(shown, 0) + calls
        if setting.is_exact and not core.always_exact:
            names |= core.backends_of(setting.backend)
    quantization = getattr(model, "quantization", None)
    gemm = quantization.backends if isinstance(quantization, Quantization) else []
    return {"attention": counts or sorted(names), "gemm": gemm}
