"""Runs over one and two experts: exactly one undisturbed sampler, with core's own samplers as the oracle."""

from __future__ import annotations

import threading

import bridge_kit as kit
import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfy_core")


@pytest.fixture(scope="module")
def experts(comfy_core):
    return kit.core_model(seed=0), kit.core_model(seed=1)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def stages(high, low, switch, cfg=(3.5, 3.5)):
    bridge = kit.bridge()
    return [bridge.Stage(model=high, cfg=cfg[0]), bridge.Stage(model=low, cfg=cfg[1], first_step=switch)]


def run(stage_list, sampler, sigmas, **kw):
    bridge = kit.bridge()
    output, denoised = bridge.run_stages(
        stage_list,
        positive=kit.prompt(1),
        negative=kit.prompt(2),
        latent=kw.pop("latent", kit.empty_latent()),
        sigmas=sigmas,
        sampler=bridge.make_sampler(sampler) if isinstance(sampler, str) else sampler,
        seed=7,
        **kw,
    )
    return output["samples"], denoised["samples"]


@pytest.mark.parametrize(
    "sampler", ["euler", "dpmpp_2m", "uni_pc", "heun", "res_multistep_cfg_pp", "dpmpp_2m_sde", "euler_ancestral", "ddim"]
)
def test_switching_between_equal_experts_changes_nothing(experts, sampler):
    bridge = kit.bridge()
    sigmas = bridge.core_sigmas(experts[0], "simple", 4)
    one, _ = run([bridge.Stage(model=experts[0], cfg=3.5)], sampler, sigmas)
    two, _ = run(stages(experts[0], experts[0].clone(), 2), sampler, sigmas)
    assert torch.equal(one, two)
    other, _ = run(stages(experts[0], experts[1], 2), sampler, sigmas)
    assert kit.distance(other, one) > 1e-2
    assert threading.active_count() == 1 or not any(t.name == "wan-fp8-sampler" for t in threading.enumerate())
