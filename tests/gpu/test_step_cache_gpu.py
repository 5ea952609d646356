"""Step caching on a GPU: fused kernels that write over their input, times by events, no waiting for the GPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_model_parity import TINY
from test_step_cache import COND, SCHEDULE, STEPS, UNCOND, ByHand, Listed, at, both, prompts, tiny_model

import wan_fp8
from wan_fp8.caching import EasyCache, apply_cache, cache_of
from wan_fp8.models.wan import WanModel
from wan_fp8.sampling import Euler

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


def loop(model: WanModel) -> torch.Tensor:
    latents = torch.randn(1, 16, 3, 12, 16, generator=torch.Generator().manual_seed(1)).cuda()
    text, solver = [prompt.cuda().bfloat16() for prompt in prompts()], Euler(SCHEDULE)
    for step in range(STEPS):
        now = torch.full((1,), 1000 * SCHEDULE[step], device="cuda")
        given = latents.bfloat16()
        uncond, cond = (model(given, now, text[c.kind], options=at(step, c)) for c in (UNCOND, COND))
        latents = solver.step(uncond + 3 * (cond - uncond), step, latents)
    return latents


@pytest.mark.parametrize("stream", [None, torch.bfloat16])
@pytest.mark.parametrize("reuse", ["keep", "linear"])
@pytest.mark.parametrize("recipe", [None, "rowwise", "DelayedScaling"])
def test_a_skipped_pass_is_input_plus_residual(stream, reuse, recipe):
    """Against residuals taken outside of the blocks and kept in the type of the stream; ours are bf16, and what that
    moves lands on other FP8 values (0.03 with the reference backend on a CPU)."""
    passes, results = both(3, 5, 6), []
    for cached in (True, False):
        model = tiny_model("t2v", torch.bfloat16).cuda()
        model.stream_dtype_override = stream
        if recipe is not None:
            wan_fp8.apply_recipe(model, wan_fp8.Recipe(recipe))
        if cached:
            apply_cache(model, Listed(passes=passes, reuse=reuse))
        else:
            ByHand(model, passes, reuse)
        results.append(loop(model))
        if cached:
            report = cache_of(model).finish()
            assert report.skipped == len(passes)
            assert len(report.times) == 2 * STEPS - len(passes) and min(report.times) > 0
    error = float((results[0] - results[1]).norm() / results[1].norm())
    assert error < (0.02 if recipe is None else 0.1), error


def test_nothing_skipped_is_the_uncached_run_to_the_bit():
    model = tiny_model("t2v", torch.bfloat16).cuda()
    plain = loop(model)
    model.begin_run()
    assert torch.equal(loop(apply_cache(model, Listed())), plain)


def test_the_host_does_not_wait():
    model = apply_cache(tiny_model("t2v", torch.bfloat16).cuda(), Listed(passes=both(2)))
    x = torch.randn(1, TINY["t2v"].in_dim, 3, 12, 16, device="cuda", dtype=torch.bfloat16)
    text = prompts()[0].cuda().bfloat16()
    times = [torch.full((1,), 1000 * SCHEDULE[step], device="cuda") for step in range(3)]
    model(x, times[0], text, options=at(0, COND))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2):
            model(x, times[step], text, options=at(step, COND))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache_of(model).finish().skipped == 1


def test_easycache_waits_once_for_a_step_that_may_be_skipped():
    """Cond and uncond together; first steps and the last one are computed in any case, and nothing is read there."""
    model = apply_cache(tiny_model("t2v", torch.bfloat16).cuda(), EasyCache(threshold=0.25, max_skips=2, retention=0.3))
    x = torch.randn(1, TINY["t2v"].in_dim, 3, 12, 16, device="cuda", dtype=torch.bfloat16)
    text = [prompt.cuda().bfloat16() for prompt in prompts()]
    times = [torch.full((1,), 1000 * SCHEDULE[step], device="cuda") for step in range(STEPS)]
    given, waits = [x * (1 - 0.02 * step) for step in range(STEPS)], []
    for conditioning in (COND, UNCOND):  # kernels are compiled, keys and values of the text known
        model(given[0], times[0], text[conditioning.kind], options=at(0, conditioning))
    for step in range(STEPS):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for conditioning in (COND, UNCOND):
                    model(given[step], times[step], text[conditioning.kind], options=at(step, conditioning))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert waits == [0] * 3 + [1] * (STEPS - 4) + [0]
    assert cache_of(model).finish().skipped > 0
