"""Measures of quality against other implementations of them, in float64."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch
from scipy import ndimage

from wan_fp8 import quality
from wan_fp8.errors import InputError


def pictures(seed: int, count: int = 2, height: int = 24, width: int = 31, noise: float = 0.1):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 6, generator=generator)
    exact = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (exact + noise * torch.randn(exact.shape, generator=generator)).clamp(0, 1), exact


def published_ssim(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    """Wang et al. 2004, one plane, with scipy's Gaussian cut off at five pixels, borders left out."""

    def blurred(x):
        return ndimage.gaussian_filter(x, sigma=1.5, truncate=3.5, mode="reflect")[5:-5, 5:-5]

    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    ma, mb = blurred(a), blurred(b)
    va, vb, cov = blurred(a * a) - ma**2, blurred(b * b) - mb**2, blurred(a * b) - ma * mb
    return float(np.mean((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))))


@pytest.mark.parametrize("noise", [0.001, 0.1, 0.6])
@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_ssim_is_the_published_one(noise, peak):
    ours, exact = (peak * x for x in pictures(0, noise=noise))
    planes = zip(ours.double().flatten(0, 1).numpy(), exact.double().flatten(0, 1).numpy(), strict=True)
    expected = np.mean([published_ssim(a, b, peak) for a, b in planes])
    assert quality.ssim(ours, exact, peak) == pytest.approx(expected, abs=2e-5)


def test_ssim_of_constants_has_a_closed_form():
    """Without variance only the first term is left."""
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.7)
    assert quality.ssim(a, b) == pytest.approx((2 * 0.14 + 1e-4) / (0.04 + 0.49 + 1e-4), rel=1e-4)
    assert quality.ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert quality.ssim(b, a) == pytest.approx(quality.ssim(a, b))


def test_psnr_has_a_closed_form():
    exact = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert quality.psnr(exact + 0.01, exact, 1.0) == pytest.approx(40, abs=1e-4)
    latents = torch.linspace(-3, 5, 1000)
    assert quality.psnr(latents + 0.08, latents) == pytest.approx(40, abs=1e-4), "the peak is the range"
    assert quality.psnr(exact, exact) == math.inf and quality.finite(math.inf) is None
    assert quality.psnr(torch.ones(4), torch.zeros(4)) == -math.inf, "a constant has no range"


def test_cosine_and_relative_error_are_those_of_numpy():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(2, 16, 3, 4, 5, generator=generator) for _ in range(2))
    x, y = (t.double().numpy().ravel() for t in (a, b))
    assert quality.cosine(a, b) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    assert quality.relative_error(a, b) == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-12)
    assert quality.cosine(3 * b, b) == pytest.approx(1) and quality.cosine(-b, b) == pytest.approx(-1)
    assert quality.relative_error(1.25 * b, b) == pytest.approx(0.25, rel=1e-6)
    zero = torch.zeros(3)
    assert quality.cosine(zero, zero) == 0 and quality.relative_error(zero, zero) == 0
    assert quality.relative_error(torch.ones(3), zero) == math.inf


def test_half_precision_is_compared_in_float64():
    exact = torch.full((100_000,), 1.0)
    ours = exact.clone()
    ours[0] = 1 + 2**-7
    found = quality.relative_error(ours.bfloat16(), exact.bfloat16())
    assert found == pytest.approx(2**-7 / math.sqrt(100_000), rel=1e-6)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match=r"two results of one shape are compared; got \[2\] and \[3\]"):
        quality.psnr(torch.zeros(2), torch.zeros(3))
    with pytest.raises(InputError, match=r"at least 11 x 11 pixels; got \[1, 3, 10, 32\]"):
        quality.ssim(torch.zeros(1, 3, 10, 32), torch.zeros(1, 3, 10, 32))
    with pytest.raises(InputError, match=r"the reference run has no step 4"):
        quality.Trajectory().compare(3, torch.zeros(2))


def test_a_trajectory_keeps_copies_by_step():
    trajectory, clean = quality.Trajectory(), torch.ones(4)
    trajectory.record(0, clean)
    clean.mul_(2)
    assert trajectory.compare(0, torch.ones(4)) == {"step": 1, "cosine": pytest.approx(1), "relative_error": 0}
    assert trajectory.compare(0, clean)["relative_error"] == pytest.approx(1)


def test_lpips_is_used_where_it_is_installed(monkeypatch):
    ours, exact = pictures(0)
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: None)
    assert quality.lpips_distance(ours, exact) == "not measured: the package lpips is not installed"
    asked = []

    class LPIPS:
        def __init__(self, net, verbose):
            asked.append(net)

        def __call__(self, a, b):
            assert a.shape == (1, 3, 24, 31) and -1 <= float(a.min()) < 0 < float(a.max()) <= 1
            return (a - b).abs().mean().reshape(1, 1, 1, 1)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: object())
    assert quality.lpips_distance(ours, exact) == pytest.approx(2 * float((ours - exact).abs().mean()), rel=1e-5)
    assert asked == ["alex"]

    def offline(net, verbose):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=offline))
    assert quality.lpips_distance(ours, exact) == "not measured: lpips could not get its weights (no network)"
