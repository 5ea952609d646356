"""What each preset comes to on machines that are not here: by compute capability, memory and what is installed."""

from __future__ import annotations

import pytest
import torch

from wan_fp8 import presets
from wan_fp8.attention import ATTENTION, Attention
from wan_fp8.errors import InputError
from wan_fp8.hardware import DeviceCaps
from wan_fp8.models.specs import I2V_A14B, SPECS, TI2V_5B
from wan_fp8.registry import Backend

GIB = 2**30


def caps(name: str, capability: tuple[int, int] | None, gib: float | None, cuda: str | None = "13.0") -> DeviceCaps:
    return DeviceCaps(
        device=torch.device("cuda" if capability else name),
        name=name,
        capability=capability,
        total_memory_bytes=None if gib is None else int(gib * GIB),
        torch_version="2.11.0",
        cuda_version=cuda,
    )


H100, B200, RTX4090 = caps("H100", (9, 0), 79.1), caps("B200", (10, 0), 178), caps("RTX 4090", (8, 9), 23.6)
RTX5090, RTX3090, A100 = caps("RTX 5090", (12, 0), 31.4), caps("RTX 3090", (8, 6), 23.7), caps("A100", (8, 0), 79.1)
MI300 = caps("AMD Instinct MI300X", (9, 4), 191, cuda=None)
CPU, MPS = caps("cpu", None, None), caps("mps", None, None, cuda=None)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Choose which low-precision kernels say that they run."""

    def choose(*names: str) -> None:
        presets.register_attention()
        for name in presets.LOW_PRECISION:
            real = ATTENTION.backend(name)
            answer = (lambda request: None) if name in names else (lambda request, n=name: f"{n} is not installed")
            monkeypatch.setitem(ATTENTION._backends, name, Backend(name, real.run, answer, False, 0))

    choose()
    return choose


def chosen(name: str, device: DeviceCaps, spec=I2V_A14B) -> presets.Preset:
    return presets.choose(name, device, torch.bfloat16, spec)


@pytest.mark.parametrize("device", [H100, B200, RTX4090, RTX5090, RTX3090, A100, MI300, CPU, MPS], ids=lambda d: d.name)
def test_lossless_changes_nothing_anywhere(device: DeviceCaps, installed) -> None:
    installed("fa3-fp8", "sage")
    made = chosen("lossless", device)
    assert made.recipe.is_none and made.attention == Attention() and made.cache is None


@pytest.mark.parametrize("device", [H100, B200, RTX4090, RTX5090], ids=lambda d: d.name)
def test_gpus_that_multiply_fp8_do(device: DeviceCaps, installed) -> None:
    for name in ("balanced", "fast", "few-step"):
        made = chosen(name, device)
        assert (made.recipe.name, made.recipe.backend) == ("rowwise", "auto")


def test_without_fp8_arithmetic_memory_decides(installed) -> None:
    """I2V-A14B takes 26.6 GiB of bf16 weights: an A100 has room for them and an RTX 3090 has not; the 5B fits there."""
    assert chosen("balanced", A100).recipe.is_none
    small = chosen("balanced", RTX3090)
    assert (small.recipe.name, small.recipe.backend) == ("rowwise", "weight-only")
    assert "compute capability 8.9" in small.reasons[0] and "would not fit" in small.reasons[0]
    assert chosen("balanced", RTX3090, TI2V_5B).recipe.is_none
    assert chosen("balanced", MI300).recipe.is_none and "AMD" in chosen("balanced", MI300).reasons[0]
    for device in (CPU, MPS):
        made = chosen("balanced", device)
        assert made.recipe.is_none and made.reasons


def test_fast_takes_a_low_precision_kernel_where_one_runs_and_helps(installed) -> None:
    installed("fa3-fp8", "sage")
    assert chosen("fast", H100).attention == Attention(backend="fa3-fp8")
    installed("sage")
    assert chosen("fast", RTX4090).attention == Attention(backend="sage")
    on_hopper = chosen("fast", H100)
    assert (
        on_hopper.attention == Attention() and "of use on compute capability 8.0 to 8.9 only" in on_hopper.reasons[-1]
    )
    assert chosen("fast", RTX5090).attention == chosen("fast", B200).attention == Attention()
    installed()
    assert chosen("fast", RTX4090).attention == Attention()
    assert "sage is not installed" in chosen("fast", RTX4090).reasons[-1]
    assert chosen("balanced", H100).attention == Attention(), "exact, whatever is installed"


def test_only_fast_skips_steps(installed) -> None:
    skipping = [name for name in presets.NAMES if chosen(name, H100).cache is not None]
    assert skipping == ["fast"]


def test_it_says_what_it_sets(installed) -> None:
    installed("fa3-fp8")
    lines = "\n".join(chosen("fast", H100).lines())
    assert "Wan2.2 FP8 Recipe: recipe rowwise, backend auto" in lines and "backend fa3-fp8, exact auto" in lines
    assert "skip steps 2 and 2, skip blocks 1 and 1, bound 0.08" in lines and "preset E012K2R20" in lines
    assert any("guidance to 1" in line for line in chosen("few-step", H100).lines())


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"one of lossless, balanced, fast, few-step; got 'turbo'"):
        chosen("turbo", H100)


def test_weights_are_as_many_bytes_as_a_model_has() -> None:
    from wan_fp8.models.memory import weight_bytes
    from wan_fp8.models.wan import build_model

    for spec in SPECS.values():
        with torch.device("meta"):
            count = sum(p.numel() for p in build_model(spec).parameters())
        assert abs(weight_bytes(spec, 2) / (2 * count) - 1) < 0.01
