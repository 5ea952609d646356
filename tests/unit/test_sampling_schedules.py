"""Schedules, experts and defaults against the numbers of the published code."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from wan_fp8 import sampling
from wan_fp8.errors import InputError
from wan_fp8.models.specs import Task

# Printed by the published schedulers at their default settings.
T2V = [
    *(999, 997, 995, 993, 990, 988, 985, 982, 979, 976, 972, 969, 965, 961, 956, 952, 947, 941, 936, 929, 922, 915),
    *(907, 898, 888, 877, 865, 852, 837, 819, 799, 776, 749, 717, 678, 631, 571, 492, 386, 235),
]
I2V = [
    *(999, 994, 989, 983, 978, 972, 965, 959, 952, 944, 937, 929, 920, 911, 902, 892, 882, 870, 859, 846, 833, 818),
    *(803, 786, 768, 749, 728, 706, 681, 654, 624, 591, 555, 514, 468, 416, 356, 288, 208, 113),
]
ANIMATE = [999, 989, 978, 965, 952, 937, 920, 902, 882, 859, 833, 803, 768, 728, 681, 624, 555, 468, 356, 208]


@pytest.mark.parametrize(
    ("steps", "shift", "expected"),
    [(40, 12.0, T2V), (40, 5.0, I2V), (20, 5.0, ANIMATE)],
    ids=["t2v", "i2v", "animate"],
)
def test_timesteps_are_the_published_ones(steps: int, shift: float, expected: list[int]) -> None:
    assert sampling.timesteps(steps, shift).tolist() == expected


@pytest.mark.parametrize(
    ("steps", "shift", "head", "tail"),
    [
        (50, 5.0, [999, 995, 991, 987, 982], [356, 302, 241, 172, 92]),
        (40, 3.0, [999, 991, 982, 973, 963], [299, 249, 195, 136, 71]),
    ],
    ids=["ti2v", "s2v"],
)
def test_long_timesteps_begin_and_end_as_published(steps: int, shift: float, head: list[int], tail: list[int]) -> None:
    values = sampling.timesteps(steps, shift).tolist()
    assert values[:5] == head
    assert values[-5:] == tail
    assert len(values) == steps


@pytest.mark.parametrize("solver", sampling.SOLVER_NAMES)
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 40, 99])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_sigmas_are_the_closed_form_bit_for_bit(solver: str, steps: int, shift: float) -> None:
    start = float(np.float32(0.999)) if solver == "unipc" else 1.0
    u = np.linspace(start, 0, steps + 1)[:-1]
    expected = shift * u / (1 + (shift - 1) * u)
    result = sampling.sigmas(steps, shift, solver)
    assert result.dtype == torch.float64 and result.device.type == "cpu"
    assert np.array_equal(result[:-1].numpy(), expected)
    assert result[-1] == 0
    assert (result.diff() < 0).all()
    assert np.array_equal(sampling.timesteps(steps, shift, solver).numpy(), (expected * 1000).astype(np.int64))


def test_first_sigma_differs_by_solver() -> None:
    assert sampling.sigmas(40, 12.0, "unipc")[0].item() == pytest.approx(0.99992, abs=5e-6)
    assert sampling.sigmas(40, 5.0, "unipc")[0].item() == pytest.approx(0.99980, abs=5e-6)
    assert sampling.sigmas(40, 12.0, "dpm++")[0].item() == 1.0
    assert sampling.timesteps(40, 12.0, "dpm++")[0].item() == 1000


def test_four_step_distilled_schedule() -> None:
    expected = torch.tensor([1, 0.9375, 5 / 6, 0.625, 0], dtype=torch.float64)
    torch.testing.assert_close(sampling.sigmas(4, 5.0, "euler"), expected, rtol=0, atol=1e-15)


def test_timesteps_come_from_float64_sigmas() -> None:
    """Truncating float32 sigmas moves three DPM++ steps at 40 steps, shift 3."""
    exact = sampling.timesteps(40, 3.0, "dpm++")
    rounded = (sampling.sigmas(40, 3.0, "dpm++")[:-1].float().double() * 1000).to(torch.int64)
    assert (exact != rounded).sum() == 3


@pytest.mark.parametrize(("steps", "shift"), [(92, 12.0), (144, 8.0), (251, 5.0), (501, 3.0)])
def test_coinciding_timesteps_start_where_the_published_ones_do(steps: int, shift: float) -> None:
    """From here on a look-up of the first timestep finds the second step; solvers are indexed by step instead."""
    assert sampling.timesteps(steps, shift)[:2].unique().numel() == 1
    assert sampling.timesteps(steps - 1, shift)[:2].unique().numel() == 2


@pytest.mark.parametrize(
    ("steps", "shift", "solver", "message"),
    [
        (0, 5.0, "unipc", "steps must be a whole number of at least 1; got 0"),
        (2.5, 5.0, "unipc", "steps must be a whole number"),
        (4, 0.0, "unipc", "shift must be a number above 0; got 0.0"),
        (4, float("nan"), "unipc", "shift must be a number above 0"),
        (4, 5.0, "heun", "solver must be one of unipc, dpm.., euler; got 'heun'"),
    ],
)
def test_bad_schedules_are_refused(steps: int, shift: float, solver: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampling.sigmas(steps, shift, solver)


@pytest.mark.parametrize(
    ("steps", "shift", "solver", "boundary", "expected"),
    [
        (40, 12.0, "unipc", 0.875, 26),
        (40, 5.0, "unipc", 0.9, 15),
        (20, 12.0, "unipc", 0.875, 13),
        (30, 12.0, "unipc", 0.875, 19),
        (50, 5.0, "unipc", 0.9, 18),
        (40, 3.0, "unipc", 0.9, 10),  # a knife edge: the two grids disagree
        (40, 3.0, "dpm++", 0.9, 11),
        (4, 5.0, "euler", 0.875, 2),
        (40, 5.0, "unipc", None, 0),
    ],
)
def test_high_noise_steps(steps: int, shift: float, solver: str, boundary: float | None, expected: int) -> None:
    assert sampling.high_noise_steps(sampling.timesteps(steps, shift, solver), boundary) == expected


def test_boundary_itself_belongs_to_the_high_noise_expert() -> None:
    assert sampling.high_noise_steps([900, 899], 0.9) == 1


def test_plan_gives_each_expert_its_guidance() -> None:
    defaults = sampling.DEFAULTS[Task.T2V]
    plan = sampling.plan_steps(
        sampling.timesteps(defaults.steps, defaults.shift), boundary=defaults.boundary, guidance=defaults.guidance
    )
    assert [s.index for s in plan] == list(range(40))
    assert [s.timestep for s in plan] == T2V
    assert [s.expert for s in plan] == ["high_noise"] * 26 + ["low_noise"] * 14
    assert [s.guidance for s in plan] == [4.0] * 26 + [3.0] * 14


def test_plan_of_a_model_with_one_transformer() -> None:
    plan = sampling.plan_steps(sampling.timesteps(5, 5.0), boundary=None, guidance=5.0)
    assert {(s.expert, s.guidance) for s in plan} == {(None, 5.0)}
    with pytest.raises(InputError, match=r"one transformer takes one guidance; got 3.0 and 4.0"):
        sampling.plan_steps([999, 1], boundary=None, guidance=(3.0, 4.0))


def test_plan_refuses_bad_input() -> None:
    with pytest.raises(InputError, match="boundary is a fraction"):
        sampling.plan_steps([999, 1], boundary=875, guidance=1.0)
    with pytest.raises(InputError, match="timesteps must decrease"):
        sampling.plan_steps([100, 999], boundary=0.9, guidance=1.0)


def test_defaults_are_the_published_ones() -> None:
    rows = {
        task.value: (d.sizes[0], d.frames, d.fps, d.solver, d.steps, d.shift, d.guidance, d.boundary)
        for task, d in sampling.DEFAULTS.items()
    }
    assert rows == {
        "t2v": ((1280, 720), 81, 16, "unipc", 40, 12.0, (3.0, 4.0), 0.875),
        "i2v": ((1280, 720), 81, 16, "unipc", 40, 5.0, (3.5, 3.5), 0.9),
        "ti2v": ((1280, 704), 121, 24, "unipc", 50, 5.0, (5.0, 5.0), None),
        "animate": ((1280, 720), 77, 30, "unipc", 20, 5.0, (1.0, 1.0), None),
        "s2v": ((1280, 720), 80, 16, "unipc", 40, 3.0, (4.5, 4.5), None),
    }
    assert sampling.DEFAULTS[Task.I2V].max_area == 921_600


def test_negative_prompt_is_the_published_one() -> None:
    assert len(sampling.NEGATIVE_PROMPT) == 137
    digest = hashlib.sha256(sampling.NEGATIVE_PROMPT.encode()).hexdigest()
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    own = sampling.DEFAULTS[Task.S2V].negative_prompt
    digest = hashlib.sha256(own.encode()).hexdigest()
    assert digest == "98afffdba82fbb1f87767b2e0d022cb2e4960f400d98c617f9b82bc707d09218" and len(own) == 116
    others = {d.negative_prompt for task, d in sampling.DEFAULTS.items() if task is not Task.S2V}
    assert others == {sampling.NEGATIVE_PROMPT}
