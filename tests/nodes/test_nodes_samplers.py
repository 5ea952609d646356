"""The samplers against straight loops over the engine, as the published pipelines write them."""

from __future__ import annotations

import bridge_kit as kit
import nodes_kit
import pytest
import torch
from nodes_kit import call, latents

pytestmark = pytest.mark.usefixtures("comfy_core", "inference")

SIZE = {"width": 32, "height": 32, "length": 5}
TEXT = {"positive": kit.prompt(1), "negative": kit.prompt(2)}


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def t2v(comfy_core):
    return kit.core_model("t2v", seed=0), kit.core_model("t2v", seed=1)


@pytest.fixture(scope="module")
def i2v(comfy_core):
    return kit.core_model("i2v", seed=0), kit.core_model("i2v", seed=1)


@pytest.fixture(scope="module")
def ti2v(comfy_core):
    return kit.core_model("ti2v", seed=0)


def engine_net(model):
    """The engine's plain transformer on the weights of a core MODEL, without core around it."""
    bridge, wan = nodes_kit.module("nodes.bridge"), nodes_kit.module("wan_fp8.models.wan")
    net = wan.build_model(bridge.spec_of(model))
    net.load_state_dict({k: v.clone() for k, v in model.model.diffusion_model.state_dict().items()})
    return net


def draw(*shape, seed=7):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def published_loop(nets, x, *, steps, shift, solver, guidance, boundary=None, condition=None, first_frame=None):
    """The loop of the published pipelines, in float32, over one or two plain networks.

    ``guidance`` is (low, high); ``condition`` [1, 20, F, H, W] goes behind the latents; ``first_frame`` is put back
    after every step.
    """
    sampling = nodes_kit.module("wan_fp8.sampling")
    run = sampling.make_solver(solver, sampling.sigmas(steps, shift, solver).float())
    experts_used = set()
    if first_frame is not None:
        x = torch.cat([first_frame, x[:, :, 1:]], dim=2)
    for index, t in enumerate(sampling.timesteps(steps, shift, solver).tolist()):
        high = boundary is None or t >= 1000 * boundary
        experts_used.add(high)
        timestep = torch.tensor([float(t)])
        if first_frame is not None:
            timestep = torch.full((1, x.shape[2]), float(t))
            timestep[:, 0] = 0
        net, scale = nets[0 if high else 1], guidance[1 if high else 0]
        given = x if condition is None else torch.cat([x, condition], dim=1)
        cond, uncond = (net(given, timestep, TEXT[name][0][0]) for name in ("positive", "negative"))
        x = run.step(uncond + scale * (cond - uncond), index, x)
        if first_frame is not None:
            x = torch.cat([first_frame, x[:, :, 1:]], dim=2)
    assert len(experts_used) == len(nets), "both experts must take part"
    return x


def raw(model, x):
    return model.model.latent_format.process_out(x)


def normalised(model, z):
    return model.model.latent_format.process_in(z)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_t2v_is_the_published_loop(t2v, solver):
    expected = published_loop(
        [engine_net(m) for m in t2v],
        draw(1, 16, 2, 4, 4),
        steps=5,
        shift=12.0,
        solver=solver,
        guidance=(3.0, 4.0),
        boundary=0.875,
    )
    got = latents(
        call("WanFP8SampleT2V", model=t2v[0], model_low=t2v[1], **TEXT, **SIZE, seed=7, steps=5, solver=solver)
    )
    assert kit.distance(got, raw(t2v[0], expected)) < 1e-5


def test_i2v_is_the_published_loop(i2v):
    vae, image = nodes_kit.vae("2.1"), nodes_kit.picture(50, 40)
    # The published code (wan/image2video.py): bicubic stretch, grey frames, mask of four channels before the image's
    # latents.
    stretched = torch.nn.functional.interpolate(image.movedim(-1, 1) * 2 - 1, size=(32, 32), mode="bicubic")
    video = torch.cat([stretched[:, :, None], torch.zeros(1, 3, 4, 32, 32)], dim=2)
    encoded = normalised(i2v[0], vae.first_stage_model.encode(video))
    mask = torch.zeros(1, 4, 2, 4, 4)
    mask[:, :, 0] = 1
    expected = published_loop(
        [engine_net(m) for m in i2v],
        draw(1, 16, 2, 4, 4),
        steps=6,
        shift=5.0,
        solver="unipc",
        guidance=(3.5, 3.5),
        boundary=0.9,
        condition=torch.cat([mask, encoded], dim=1),
    )
    got = call(
        "WanFP8SampleI2V",
        model=i2v[0],
        model_low=i2v[1],
        **TEXT,
        **SIZE,
        vae=vae,
        start_image=image,
        size="width x height",
        seed=7,
        steps=6,
    )
    assert kit.distance(latents(got), raw(i2v[0], expected)) < 1e-5


def test_i2v_with_an_end_image_conditions_as_core_does(i2v):
    import comfy_extras.nodes_wan as core

    vae, start, end = nodes_kit.vae("2.1"), nodes_kit.picture(32, 32, 1), nodes_kit.picture(32, 32, 2)
    theirs = core.WanFirstLastFrameToVideo.execute(
        TEXT["positive"], TEXT["negative"], vae, 32, 32, 5, 1, start_image=start, end_image=end
    ).args[0][0][1]
    conditions = nodes_kit.module("nodes.conditions")
    ours = conditions.image_conditioning(
        vae, conditions.one_image(start, "start_image"), conditions.one_image(end, "end_image"), 32, 32, 5
    )
    assert torch.equal(ours["concat_mask"], theirs["concat_mask"])
    assert kit.distance(ours["concat_latent_image"], theirs["concat_latent_image"]) < 1e-5
    common = dict(
        model=i2v[0], model_low=i2v[1], **TEXT, **SIZE, vae=vae, start_image=start, size="width x height", steps=2
    )
    with_end = latents(call("WanFP8SampleI2V", **common, end_image=end))
    assert kit.distance(with_end, latents(call("WanFP8SampleI2V", **common))) > 1e-3


def test_ti2v_from_text_is_the_published_loop(ti2v):
    expected = published_loop(
        [engine_net(ti2v)], draw(1, 48, 2, 4, 2), steps=4, shift=5.0, solver="unipc", guidance=(5.0, 5.0)
    )
    got = call("WanFP8SampleTI2V", model=ti2v, **TEXT, width=32, height=64, length=5, seed=7, steps=4)
    assert kit.distance(latents(got), raw(ti2v, expected)) < 1e-5


def test_ti2v_from_an_image_is_the_published_loop(ti2v):
    sampling = nodes_kit.module("wan_fp8.sampling")
    vae, image = nodes_kit.vae("2.2"), nodes_kit.picture(90, 60)
    pixels = sampling.cover_crop_image(image[0].movedim(-1, 0), 64, 32)
    first = normalised(ti2v, vae.first_stage_model.encode(pixels[None, :, None]))
    expected = published_loop(
        [engine_net(ti2v)],
        draw(1, 48, 2, 2, 4),
        steps=4,
        shift=5.0,
        solver="unipc",
        guidance=(5.0, 5.0),
        first_frame=first,
    )
    got = call(
        "WanFP8SampleTI2V",
        model=ti2v,
        **TEXT,
        width=64,
        height=32,
        length=5,
        size="width x height",
        start_image=image,
        vae=vae,
        seed=7,
        steps=4,
    )
    assert kit.distance(latents(got), raw(ti2v, expected)) < 1e-5
    assert "noise_mask" not in got.args[0], "a mask left behind would freeze the first frame in the next sampler"


@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_the_area_rules_keep_the_aspect_of_the_image(request, task, monkeypatch):
    """1248 x 704 and its like need minutes on a CPU: the published areas are scaled down, the rule stays."""
    conditions = nodes_kit.module("nodes.conditions")
    monkeypatch.setitem(conditions.AREAS, conditions.AREA_720P, 64 * 36)
    monkeypatch.setitem(conditions.AREAS, conditions.AREA_704P, 128 * 96)
    models, image = request.getfixturevalue(task), nodes_kit.picture(160, 90)
    common = dict(**TEXT, start_image=image, length=1, steps=1)
    if task == "i2v":
        got = call("WanFP8SampleI2V", model=models[0], model_low=models[1], vae=nodes_kit.vae("2.1"), **common)
        assert latents(got).shape == (1, 16, 1, 4, 8) and "64x32 pixels" in got.ui.value
    else:
        got = call("WanFP8SampleTI2V", model=models, vae=nodes_kit.vae("2.2"), **common)
        assert latents(got).shape == (1, 48, 1, 6, 8) and "128x96 pixels" in got.ui.value
