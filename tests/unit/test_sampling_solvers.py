"""Solvers against diffusers' schedulers, an independent closed form, and an ODE whose solution is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from wan_fp8 import sampling
from wan_fp8.errors import InputError

Velocity = Callable[[Tensor, int], Tensor]
SCHEDULES = [(1, 5.0), (2, 5.0), (3, 12.0), (4, 5.0), (14, 3.0), (15, 3.0), (20, 5.0), (40, 12.0), (92, 12.0)]


@pytest.fixture
def float64_default() -> Iterator[None]:
    """diffusers builds the corrector's 2x2 system in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def noise(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def field(sigmas: Tensor) -> Velocity:
    """A nonlinear velocity that depends on the latents and the noise level."""
    levels = sigmas.tolist()
    return lambda x, index: torch.sin(2 * x) + levels[index] * x


def replay(steps: int) -> Velocity:
    """Velocities that do not depend on the latents, so that rounding is not amplified."""
    values = torch.randn(steps, 1, 4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return lambda x, index: values[index].to(x.dtype)


def run(solver: sampling.Solver, velocity: Velocity, x: Tensor) -> list[Tensor]:
    path = []
    for index in range(solver.steps):
        x = solver.step(velocity(x, index), index, x)
        path.append(x)
    return path


def run_diffusers(scheduler: Any, sigmas: Tensor, velocity: Velocity, x: Tensor) -> list[Tensor]:
    steps = len(sigmas) - 1
    scheduler.set_timesteps(steps)
    scheduler.sigmas = sigmas.clone()
    scheduler.set_begin_index(0)
    path = []
    for index in range(steps):
        x = scheduler.step(velocity(x, index), scheduler.timesteps[index], x, return_dict=False)[0]
        path.append(x)
    return path


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference over the path, relative to the largest value of each step."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def unipc_scheduler() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        solver_order=2, solver_type="bh2", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )


def dpmpp_scheduler() -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        final_sigmas_type="zero",
    )


def unipc_closed_form(sigmas: list[float], velocity: Velocity, x: Tensor) -> list[Tensor]:
    """UniPC-2 (bh2) with corrector, written from the paper with an explicit linear solve; no state but plain lists."""

    def lam(s: float) -> float:
        return math.log(1 - s) - math.log(s) if s else math.inf

    steps = len(sigmas) - 1
    clean: list[Tensor] = []
    start = x
    path: list[Tensor] = []
    order = 0
    for i in range(steps):
        m = x - sigmas[i] * velocity(x, i)
        corrected = x
        if i:
            h = lam(sigmas[i]) - lam(sigmas[i - 1])
            b = math.exp(-h) - 1
            alpha = 1 - sigmas[i]
            base = sigmas[i] / sigmas[i - 1] * start - alpha * b * clean[i - 1]
            if order == 1:
                corrected = base - alpha * b * 0.5 * (m - clean[i - 1])
            else:
                r = (lam(sigmas[i - 2]) - lam(sigmas[i - 1])) / h
                phi = b / -h - 1
                rhs = torch.tensor([phi / b, 2 * (phi / -h - 0.5) / b], dtype=torch.float64)
                matrix = torch.tensor([[1, 1], [r, 1]], dtype=torch.float64)
                rho = torch.linalg.solve(matrix, rhs).tolist()
                slope = (clean[i - 2] - clean[i - 1]) / r
                corrected = base - alpha * b * (rho[0] * slope + rho[1] * (m - clean[i - 1]))
        clean.append(m)
        order = min(2, steps - i, i + 1)
        start = corrected
        h = lam(sigmas[i + 1]) - lam(sigmas[i])
        b = math.exp(-h) - 1
        alpha = 1 - sigmas[i + 1]
        x = sigmas[i + 1] / sigmas[i] * corrected - alpha * b * m
        if order == 2:
            r = (lam(sigmas[i - 1]) - lam(sigmas[i])) / h
            x = x - alpha * b * 0.5 * (clean[i - 1] - m) / r
        path.append(x)
    return path


@pytest.mark.parametrize(("steps", "shift"), SCHEDULES)
def test_unipc_is_diffusers_unipc(steps: int, shift: float, float64_default: None) -> None:
    sigmas = sampling.sigmas(steps, shift)
    ours = run(sampling.UniPC(sigmas), field(sigmas), noise())
    theirs = run_diffusers(unipc_scheduler(), sigmas, field(sigmas), noise())
    assert worst(ours, theirs) < 1e-12


@pytest.mark.parametrize(("steps", "shift"), SCHEDULES)
def test_unipc_is_its_closed_form(steps: int, shift: float) -> None:
    sigmas = sampling.sigmas(steps, shift)
    ours = run(sampling.UniPC(sigmas), field(sigmas), noise())
    assert worst(ours, unipc_closed_form(sigmas.tolist(), field(sigmas), noise())) < 1e-12


@pytest.mark.parametrize(("steps", "shift"), SCHEDULES)
def test_dpmpp_is_diffusers_dpmpp_widened(steps: int, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published step casts the sample to float32; with that cast widened to float64 the two agree to 1e-12."""
    import diffusers.schedulers.scheduling_dpmsolver_multistep as module

    class WideTorch:
        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    sigmas = sampling.sigmas(steps, shift, "dpm++")
    scheduler = dpmpp_scheduler()
    monkeypatch.setattr(module, "torch", WideTorch())
    theirs = run_diffusers(scheduler, sigmas, field(sigmas), noise())
    ours = run(sampling.DPMpp(sigmas), field(sigmas), noise())
    assert worst(ours, theirs) < 1e-12


@pytest.mark.parametrize(("steps", "shift"), SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dpmpp_is_diffusers_dpmpp_as_shipped(steps: int, shift: float, dtype: torch.dtype) -> None:
    sigmas = sampling.sigmas(steps, shift, "dpm++")
    theirs = run_diffusers(dpmpp_scheduler(), sigmas.float(), replay(steps), noise(dtype))
    ours = run(sampling.DPMpp(sigmas.float()), replay(steps), noise(dtype))
    assert worst(ours, theirs) < 1e-6


@pytest.mark.parametrize(("steps", "shift"), SCHEDULES)
def test_unipc_is_diffusers_unipc_in_float32(steps: int, shift: float) -> None:
    sigmas = sampling.sigmas(steps, shift)
    theirs = run_diffusers(unipc_scheduler(), sigmas.float(), replay(steps), noise(torch.float32))
    ours = run(sampling.UniPC(sigmas), replay(steps), noise(torch.float32))
    assert worst(ours, theirs) < 2e-6


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_is_diffusers_euler(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    sigmas = sampling.sigmas(8, shift, "euler")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    theirs = run_diffusers(scheduler, sigmas, replay(8), noise(torch.float32))
    assert worst(run(sampling.Euler(sigmas), replay(8), noise(torch.float32)), theirs) < 1e-6


class GaussianFlow:
    """Data N(mean, width^2) per element: velocity and solution of the flow in closed form."""

    mean, width = 0.7, 0.4

    def spread(self, sigma: float) -> float:
        return math.sqrt((1 - sigma) ** 2 * self.width**2 + sigma**2)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        centred = (x - (1 - sigma) * self.mean) / self.spread(sigma) ** 2
        clean = self.mean + (1 - sigma) * self.width**2 * centred
        return sigma * centred - clean

    def solution(self, z: Tensor, sigma: float) -> Tensor:
        return (1 - sigma) * self.mean + self.spread(sigma) * z


def flow_error(solver_class: type[sampling.Solver], steps: int) -> float:
    """Error at sigma 0.05 of a pass from 0.95, even in log-SNR."""
    log_snr = torch.linspace(math.log(0.05 / 0.95), math.log(0.95 / 0.05), steps + 1, dtype=torch.float64)
    sigmas = torch.sigmoid(-log_snr)
    flow, z = GaussianFlow(), torch.linspace(-2, 2, 9, dtype=torch.float64)
    levels = sigmas.tolist()
    path = run(solver_class(sigmas), lambda x, i: flow.velocity(x, levels[i]), flow.solution(z, levels[0]))
    return (path[-1] - flow.solution(z, levels[-1])).abs().max().item()


@pytest.mark.parametrize(
    ("solver_class", "low", "high"),
    [(sampling.Euler, 0.95, 1.05), (sampling.DPMpp, 1.9, 2.1), (sampling.UniPC, 1.8, 2.1)],
    ids=["euler", "dpm++", "unipc"],
)
def test_order_of_convergence(solver_class: type[sampling.Solver], low: float, high: float) -> None:
    """UniPC is of order 2 too: its last step is first order and is not corrected."""
    errors = [flow_error(solver_class, steps) for steps in (320, 640, 1280)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(low < order < high for order in orders), (errors, orders)


def test_second_order_beats_first_order() -> None:
    assert flow_error(sampling.UniPC, 20) < flow_error(sampling.DPMpp, 20) < flow_error(sampling.Euler, 20) / 5


@pytest.mark.parametrize("name", sampling.SOLVER_NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_keeps_its_type_and_stays_close(name: str, dtype: torch.dtype) -> None:
    sigmas = sampling.sigmas(12, 5.0, name)
    exact = run(sampling.make_solver(name, sigmas), replay(12), noise())
    result = run(sampling.make_solver(name, sigmas), replay(12), noise(dtype))
    assert {x.dtype for x in result} == {dtype}
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 0.06, torch.float16: 8e-3}[dtype]
    assert worst(result, exact) < tolerance


@pytest.mark.parametrize("name", sampling.SOLVER_NAMES)
def test_pure_noise_start_has_its_limit(name: str) -> None:
    """Sigma 1 has log-SNR -inf; schedules of a host may start there. Compare with a start just below."""
    sigmas = sampling.sigmas(10, 5.0, "dpm++")
    near = sigmas.clone()
    near[0] = 1 - 1e-13
    at = run(sampling.make_solver(name, sigmas), field(sigmas), noise())
    below = run(sampling.make_solver(name, near), field(near), noise())
    assert all(x.isfinite().all() for x in at)
    # The influence of the first step fades like 1 / log-SNR, hence the width of the tolerance for multistep solvers.
    assert worst(at, below) < (1e-10 if name == "euler" else 0.05)


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_pure_noise_start_is_first_order_in_its_second_step(name: str) -> None:
    sigmas = sampling.sigmas(4, 5.0, "dpm++")
    solver = sampling.make_solver(name, sigmas)
    s, velocity = sigmas.tolist(), replay(4)
    x0 = noise()
    x1 = solver.step(velocity(x0, 0), 0, x0)
    m0 = x0 - velocity(x0, 0)
    torch.testing.assert_close(x1, s[1] * x0 + (1 - s[1]) * m0, rtol=1e-14, atol=1e-14)
    x2 = solver.step(velocity(x1, 1), 1, x1)
    m1 = x1 - s[1] * velocity(x1, 1)
    corrected = x1 if name == "dpm++" else s[1] * x0 + (1 - s[1]) * 0.5 * (m0 + m1)
    expected = s[2] / s[1] * corrected + (1 - s[2] - s[2] / s[1] * (1 - s[1])) * m1
    torch.testing.assert_close(x2, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", sampling.SOLVER_NAMES)
def test_last_step_to_zero_returns_the_clean_estimate(name: str) -> None:
    sigmas = sampling.sigmas(6, 5.0, name)
    solver, velocity, x = sampling.make_solver(name, sigmas), replay(6), noise()
    for index in range(5):
        x = solver.step(velocity(x, index), index, x)
    expected = x - sigmas[5] * velocity(x, 5)
    torch.testing.assert_close(solver.step(velocity(x, 5), 5, x), expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("name", sampling.SOLVER_NAMES)
def test_steps_out_of_order_are_refused(name: str) -> None:
    solver, x = sampling.make_solver(name, sampling.sigmas(3, 5.0, name)), noise()
    with pytest.raises(InputError, match=r"in order; got step 1, the next is 0 of 0\.\.2"):
        solver.step(x, 1, x)
    first = solver.step(x, 0, x)
    with pytest.raises(InputError, match="got step 0, the next is 1"):
        solver.step(x, 0, x)
    for index in (1, 2):
        solver.step(x, index, x)
    with pytest.raises(InputError, match="pass of 3 steps is complete; got step 3"):
        solver.step(x, 3, x)
    solver.reset()
    assert solver.next_index == 0
    assert torch.equal(solver.step(x, 0, x), first)


@pytest.mark.parametrize("name", sampling.SOLVER_NAMES)
def test_two_passes_with_one_solver_are_bit_equal(name: str) -> None:
    sigmas = sampling.sigmas(5, 5.0, name)
    solver = sampling.make_solver(name, sigmas)
    first = run(solver, field(sigmas), noise())
    solver.reset()
    assert all(torch.equal(a, b) for a, b in zip(first, run(solver, field(sigmas), noise()), strict=True))


@pytest.mark.parametrize("name", sampling.SOLVER_NAMES)
def test_arguments_are_not_changed(name: str) -> None:
    solver, x, velocity = sampling.make_solver(name, sampling.sigmas(3, 5.0, name)), noise(), noise() * 2
    x_before, velocity_before = x.clone(), velocity.clone()
    for index in range(3):
        solver.step(velocity, index, x)
    assert torch.equal(x, x_before) and torch.equal(velocity, velocity_before)


def test_shapes_must_agree() -> None:
    solver = sampling.UniPC(sampling.sigmas(3, 5.0))
    with pytest.raises(InputError, match=r"one shape; got \(1, 1, 3, 5\) for \(1, 4, 3, 5\)"):
        solver.step(noise()[:, :1], 0, noise())


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([0.5], "at least two sigmas"),
        ([1.2, 0.5], r"lie in 0\.\.1; got 0.5 to 1.2"),
        ([0.9, 0.5, 0.5, 0.0], "step 1 goes from 0.5 to 0.5"),
        ([0.1, 0.5], "must decrease"),
        ([float("nan"), 0.0], r"lie in 0\.\.1"),
    ],
)
def test_bad_schedules_are_refused(sigmas: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampling.UniPC(torch.tensor(sigmas))


def test_unknown_solver_is_refused() -> None:
    with pytest.raises(InputError, match=r"one of unipc, dpm\+\+, euler; got 'ddim'"):
        sampling.make_solver("ddim", [1.0, 0.0])
