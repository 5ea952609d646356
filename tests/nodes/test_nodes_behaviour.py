"""The samplers as citizens of ComfyUI: equal to core's own nodes, cancellable, repeatable, harmless to what they are
given."""

from __future__ import annotations

import gc

import bridge_kit as kit
import nodes_kit
import pytest
import torch
from nodes_kit import call, latents

pytestmark = pytest.mark.usefixtures("comfy_core", "inference")

SIZE = {"width": 32, "height": 32, "length": 5}
TEXT = {"positive": kit.prompt(1), "negative": kit.prompt(2)}
STEPS = 6


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def t2v(comfy_core):
    return kit.core_model("t2v", seed=0), kit.core_model("t2v", seed=1)


@pytest.fixture(scope="module")
def ti2v(comfy_core):
    return kit.core_model("ti2v", seed=0)


@pytest.fixture
def progress():
    """Every progress report of a run, as (value, total, preview)."""
    import comfy.utils

    reports = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: reports.append((value, total, preview))
    )
    yield reports
    comfy.utils.set_progress_bar_global_hook(None)


def sample(models, **changes):
    inputs = dict(model=models[0], model_low=models[1], **TEXT, **SIZE, seed=7, steps=STEPS)
    return latents(call("WanFP8SampleT2V", **{**inputs, **changes}))


def with_shift(model, shift):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(model, shift)[0]


def test_equals_cores_pair_of_samplers(t2v):
    """Core's usual Wan2.2 graph: shift on each expert, the first KSamplerAdvanced hands its noisy latents to the
    second."""
    import nodes as core

    shift, boundary = 5.0, 0.9
    high, low = (with_shift(m, shift) for m in t2v)
    bridge = nodes_kit.module("nodes.bridge")
    switch = int((bridge.core_sigmas(high, "simple", STEPS)[:-1] >= boundary).sum())
    assert 0 < switch < STEPS
    common = dict(noise_seed=7, steps=STEPS, cfg=3.5, sampler_name="euler", scheduler="simple", **TEXT)
    first = core.KSamplerAdvanced().sample(
        high,
        "enable",
        latent_image=kit.empty_latent(),
        start_at_step=0,
        end_at_step=switch,
        return_with_leftover_noise="enable",
        **common,
    )[0]
    second = core.KSamplerAdvanced().sample(
        low,
        "disable",
        latent_image=first,
        start_at_step=switch,
        end_at_step=1000,
        return_with_leftover_noise="disable",
        **common,
    )[0]
    got = sample(
        t2v, solver="euler", scheduler="simple", shift=shift, boundary=boundary, guidance=3.5, guidance_low=3.5
    )
    assert kit.distance(got, second["samples"]) < 1e-5


def test_reports_and_previews_every_step(t2v, progress, monkeypatch):
    import latent_preview

    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    sample(t2v)
    assert [value for value, _, _ in progress] == list(range(1, STEPS + 1))
    assert {total for _, total, _ in progress} == {STEPS}
    assert all(preview is not None and preview[1].size == (4, 4) for _, _, preview in progress)


@pytest.mark.parametrize("when", [2, 5])
def test_cancel_stops_within_a_step_and_the_next_run_is_untouched(t2v, when):
    """Step 2 is the high-noise expert's, step 5 the low-noise expert's."""
    import comfy.model_management as management
    import comfy.utils

    expected, seen = sample(t2v), []

    def hook(value, total, preview, node_id=None):
        management.throw_exception_if_processing_interrupted()  # as the server's hook does
        seen.append(value)
        if value == when:
            management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        with pytest.raises(management.InterruptProcessingException):
            sample(t2v)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        management.interrupt_current_processing(False)
    assert seen == list(range(1, when + 1))
    assert torch.equal(sample(t2v), expected)


def test_runs_repeat_and_seeds_matter(t2v):
    assert torch.equal(sample(t2v), sample(t2v))
    assert kit.distance(sample(t2v), sample(t2v, seed=8)) > 0.1


def test_leaves_its_inputs_as_they_were(t2v):
    before = [kit.ksample(m) for m in t2v]
    state = [
        (
            m.patches_uuid,
            dict(m.object_patches),
            m.model_options["transformer_options"].copy(),
            m.model.model_sampling.shift,
        )
        for m in t2v
    ]
    text = [t.clone() for t in (TEXT["positive"][0][0], TEXT["negative"][0][0])]
    sample(t2v)
    assert state == [
        (
            m.patches_uuid,
            dict(m.object_patches),
            m.model_options["transformer_options"].copy(),
            m.model.model_sampling.shift,
        )
        for m in t2v
    ]
    assert torch.equal(text[0], TEXT["positive"][0][0]) and torch.equal(text[1], TEXT["negative"][0][0])
    assert all(torch.equal(kit.ksample(m), b) for m, b in zip(t2v, before, strict=True))


def test_a_core_model_is_forked_once_and_freed_with_it():
    import weakref

    models = kit.core_model("t2v", seed=5), kit.core_model("t2v", seed=6)
    bridge = nodes_kit.module("nodes.bridge")
    forks = [bridge.hosted(m) for m in models]
    sample(models)
    assert [bridge.hosted(m) for m in models] == forks
    assert bridge.hosted(forks[0]) is forks[0], "a MODEL of ours is used as it is"
    gone = [weakref.ref(f.model) for f in forks]
    del models, forks
    gc.collect()
    import comfy.model_management

    comfy.model_management.cleanup_models_gc()
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_lora_before_the_node_takes_part(t2v):
    import comfy.sd

    rank, dim = 4, 128
    generator = torch.Generator().manual_seed(9)
    lora = {}
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.2"):
        width = 256 if name.endswith("ffn.2") else dim
        lora[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        lora[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(dim, rank, generator=generator)
    patched = comfy.sd.load_lora_for_models(t2v[0], None, lora, 0.5, 0)[0]
    plain, changed = sample(t2v), sample((patched, t2v[1]))
    assert kit.distance(changed, plain) > 1e-3
    assert torch.equal(sample(t2v), plain)
    expected = kit.ksample(with_shift(patched, 12.0), kit.empty_latent(), steps=STEPS, cfg=4.0, seed=7)
    got = sample((patched, None), boundary=0.0, solver="euler", scheduler="simple")
    assert kit.distance(got, expected) < 1e-5


def test_guidance_1_skips_the_negative_pass(t2v, monkeypatch):
    wan, rows = nodes_kit.module("wan_fp8.models.wan"), []
    forward = wan.WanModel.forward

    def counted(self, x, *args, **kwargs):
        rows.append(x.shape[0])
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(wan.WanModel, "forward", counted)
    sample(t2v, guidance=1.0, guidance_low=1.0)
    assert sum(rows) == STEPS
    rows.clear()
    sample(t2v, guidance=1.0, guidance_low=3.0)
    high = nodes_kit.module("wan_fp8.sampling").high_noise_steps(
        nodes_kit.module("wan_fp8.sampling").timesteps(STEPS, 12.0, "unipc"), 0.875
    )
    assert sum(rows) == high + 2 * (STEPS - high)


def test_one_model_can_do_every_step(t2v):
    alone = sample((t2v[0], None), boundary=0.0, guidance=3.0)
    assert torch.equal(alone, sample((t2v[0], t2v[1]), boundary=0.0, guidance=3.0))
    same_twice = sample((t2v[0], t2v[0]), guidance=3.0, guidance_low=3.0)
    assert torch.equal(alone, same_twice)


def test_sigmas_and_solver_reproduce_the_sampler_in_samplercustom(ti2v):
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    sigmas, _, _, model, _ = call("WanFP8Sigmas", steps=4, shift=5.0, solver="unipc", model=ti2v).args
    sampler = call("WanFP8Solver", solver="unipc").args[0]
    latent = kit.empty_latent(48, 2, 2)
    theirs = SamplerCustom.execute(
        model, True, 7, 5.0, TEXT["positive"], TEXT["negative"], sampler, sigmas, latent
    ).args[0]["samples"]
    ours = latents(call("WanFP8SampleTI2V", model=ti2v, **TEXT, **SIZE, seed=7, steps=4))
    assert kit.distance(theirs, ours) < 1e-5


def test_sigmas_are_split_where_the_experts_change():
    sigmas, high, low, *_ = call("WanFP8Sigmas").args
    assert (len(sigmas), len(high), len(low)) == (41, 27, 15) and high[-1] == low[0]
    assert torch.equal(torch.cat([high, low[1:]]), sigmas)
    high_steps = nodes_kit.module("nodes.sampler_inputs").HIGH_NOISE_STEPS
    sampling, task = nodes_kit.module("wan_fp8.sampling"), nodes_kit.module("wan_fp8.models.specs").Task
    for name in (task.T2V, task.I2V):
        d = sampling.DEFAULTS[name]
        assert high_steps[name] == sampling.high_noise_steps(sampling.timesteps(d.steps, d.shift, d.solver), d.boundary)
