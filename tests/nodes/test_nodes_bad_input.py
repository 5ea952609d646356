"""What the samplers and the text node refuse, and that they say it in one sentence before any memory is spent."""

from __future__ import annotations

import bridge_kit as kit
import nodes_kit
import pytest
import torch
from nodes_kit import call, picture

pytestmark = pytest.mark.usefixtures("comfy_core", "inference")

SIZE = {"width": 32, "height": 32, "length": 5}
TEXT = {"positive": kit.prompt(1), "negative": kit.prompt(2)}
NARROW = [[torch.zeros(1, 77, 768), {}]]
AS_GIVEN = {"size": "width x height"}


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def t2v(comfy_core):
    return kit.core_model("t2v")


@pytest.fixture(scope="module")
def i2v(comfy_core):
    return kit.core_model("i2v")


@pytest.fixture(scope="module")
def ti2v(comfy_core):
    return kit.core_model("ti2v")


@pytest.fixture(autouse=True)
def no_forward(monkeypatch):
    """Nothing that is refused here may reach the model."""

    def fail(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(nodes_kit.module("wan_fp8.models.wan").WanModel, "forward", fail)


def refused(error_name, node, **inputs):
    """The message of the expected error, checked to be one sentence for a user."""
    errors = nodes_kit.module("wan_fp8.errors")
    with pytest.raises(getattr(errors, error_name)) as caught:
        call(node, **{**TEXT, **SIZE, "steps": 4, **inputs})
    message = str(caught.value)
    assert "\n" not in message and 30 < len(message) < 1000, message
    return message


def t2v_refused(t2v, **changes):
    return refused("InputError", "WanFP8SampleT2V", **{"model": t2v, "model_low": t2v, **changes})


@pytest.mark.parametrize("length", [2, 4, 80, 82, 0, -3])
def test_frames_that_are_not_4n_plus_1(t2v, length):
    message = t2v_refused(t2v, length=length)
    assert "4n + 1" in message and f"got {length}" in message


@pytest.mark.parametrize("width, height", [(40, 32), (32, 24), (0, 32), (32, -16)])
def test_sizes_that_do_not_divide(t2v, width, height):
    message = t2v_refused(t2v, width=width, height=height)
    assert "multiple of 16" in message


def test_the_5b_model_needs_multiples_of_32(ti2v):
    assert "multiple of 32" in refused("InputError", "WanFP8SampleTI2V", model=ti2v, width=48)
    image = {"start_image": picture(32, 32), "vae": nodes_kit.vae("2.2")}
    assert "multiple of 32" in refused("InputError", "WanFP8SampleTI2V", model=ti2v, width=48, **AS_GIVEN, **image)


def test_the_high_noise_expert_alone(t2v):
    message = t2v_refused(t2v, model_low=None)
    assert "model_low" in message and "not connected" in message and "boundary to 0" in message


def test_a_part_that_the_loader_could_not_provide(t2v):
    missing = nodes_kit.module("nodes.missing")
    for name in ("model", "model_low"):
        message = t2v_refused(
            t2v, **{name: missing.Missing("the low-noise expert was not loaded: choose it under 'low_noise'")}
        )
        assert message.startswith("the low-noise expert was not loaded")
    assert not hasattr(missing.Missing("reason"), "get_ram_usage"), "core looks for attributes on what it caches"


@pytest.mark.parametrize("name", ["positive", "negative"])
def test_conditioning_from_another_text_encoder(t2v, name):
    message = t2v_refused(t2v, **{name: NARROW})
    assert name in message and "768" in message and "4096" in message


def test_a_model_of_another_task_is_named(t2v, i2v, ti2v):
    message = t2v_refused(t2v, model_low=i2v)
    assert "'model_low' is a Wan2.2 I2V model" in message and "Sample Wan2.2 Image to Video" in message
    assert "TI2V" in t2v_refused(ti2v)
    message = refused("InputError", "WanFP8SampleTI2V", model=t2v)
    assert "T2V model" in message and "Sample Wan2.2 Text to Video" in message


def test_a_model_that_is_no_wan_model():
    import comfy.model_patcher

    model = torch.nn.Module()
    model.diffusion_model = torch.nn.Linear(2, 2)
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    message = refused("UnsupportedPatchError", "WanFP8SampleT2V", model=patcher)
    assert "Linear, not a Wan model" in message


def test_the_vae_of_another_model(i2v, ti2v):
    common = {"start_image": picture(32, 32), **AS_GIVEN}
    message = refused("InputError", "WanFP8SampleI2V", model=i2v, model_low=i2v, vae=nodes_kit.vae("2.2"), **common)
    assert "Wan 2.1 VAE" in message and "got the Wan 2.2 VAE" in message
    message = refused("InputError", "WanFP8SampleTI2V", model=ti2v, vae=nodes_kit.vae("2.1"), **common)
    assert "Wan 2.2 VAE" in message and "got the Wan 2.1 VAE" in message


def test_an_image_without_its_vae(ti2v):
    message = refused("InputError", "WanFP8SampleTI2V", model=ti2v, start_image=picture(32, 32), **AS_GIVEN)
    assert "needs the Wan 2.2 VAE" in message


def test_more_than_one_picture(i2v):
    two = torch.cat([picture(32, 32), picture(32, 32)])
    common = {"model": i2v, "model_low": i2v, "vae": nodes_kit.vae("2.1"), **AS_GIVEN}
    assert "start_image takes one" in refused("InputError", "WanFP8SampleI2V", start_image=two, **common)
    grey = picture(32, 32)[..., :1]
    message = refused("InputError", "WanFP8SampleI2V", start_image=picture(32, 32), end_image=grey, **common)
    assert "end_image takes one" in message


def test_an_end_image_needs_more_than_one_frame(i2v):
    common = {"model": i2v, "model_low": i2v, "vae": nodes_kit.vae("2.1"), "start_image": picture(32, 32), **AS_GIVEN}
    message = refused("InputError", "WanFP8SampleI2V", end_image=picture(32, 32), **{**common, "length": 1})
    assert "5 frames or more" in message


def test_an_image_too_narrow_for_the_area(i2v):
    common = {"model": i2v, "model_low": i2v, "vae": nodes_kit.vae("2.1")}
    message = refused("InputError", "WanFP8SampleI2V", start_image=picture(5000, 1), size="480p area", **common)
    assert "5000x1" in message


def test_an_image_of_another_aspect_is_stretched_and_says_so(i2v, monkeypatch, caplog):
    conditions, samplers = nodes_kit.module("nodes.conditions"), nodes_kit.module("nodes.samplers")
    monkeypatch.setattr(samplers, "run", lambda experts, positive, negative, latent, settings: latent)
    common = {**TEXT, "model": i2v, "model_low": i2v, "vae": nodes_kit.vae("2.1"), "length": 5, **AS_GIVEN}
    wide = call("WanFP8SampleI2V", start_image=picture(64, 32), width=32, height=32, **common)
    assert "64x32 pixels is stretched to 32x32" in wide.ui.value and "0.50 times as wide" in caplog.text
    assert (
        "stretched" not in call("WanFP8SampleI2V", start_image=picture(64, 63), width=32, height=32, **common).ui.value
    )
    assert conditions.stretch_warning(torch.zeros(3, 90, 160), 832, 464) is None, "the published rule needs no warning"


def test_settings_out_of_range(t2v):
    assert "steps" in t2v_refused(t2v, steps=0)
    assert "shift" in t2v_refused(t2v, shift=0.0)
    assert "boundary" in t2v_refused(t2v, boundary=1.5)
    assert "size must be one of" in refused(
        "InputError",
        "WanFP8SampleI2V",
        model=t2v,
        model_low=t2v,
        vae=None,
        start_image=picture(32, 32),
        size="1080p area",
    )


@pytest.mark.parametrize(
    "box, value, words",
    [
        ("noise", "bogus", "one of cpu, cuda (published code); got 'bogus'"),
        ("noise", "CPU", "one of cpu, cuda (published code); got 'CPU'"),
        ("solver", "eulr", "one of unipc, dpm++, euler"),
        ("solver", "res_multistp", "one of unipc, dpm++, euler, res_multistep"),
        ("solver", "no such thing", "one of unipc, dpm++, euler or the other names listed in its box"),
        ("scheduler", "karas", "one of official, karras or the other names listed in its box; got 'karas'"),
        ("scheduler", None, "got None"),
    ],
)
def test_names_that_a_list_does_not_have(t2v, ti2v, box, value, words):
    for message in (
        t2v_refused(t2v, **{box: value}),
        refused("InputError", "WanFP8SampleTI2V", model=ti2v, **{box: value}),
    ):
        assert message.startswith(f"{box} must be ") and words in message, message
        assert len(message) < 220, "not a list of every name"


def test_the_size_rule_of_another_sampler(i2v, ti2v):
    common = {"start_image": picture(32, 32)}
    message = refused("InputError", "WanFP8SampleI2V", model=i2v, vae=None, size="704p area", **common)
    assert "one of 720p area, 480p area, width x height" in message
    for extra in (common, {}):
        message = refused("InputError", "WanFP8SampleTI2V", model=ti2v, size="720p area", **extra)
        assert "one of 704p area, width x height" in message


def test_swapped_experts():
    """The mark of the loader goes through clones and forks; what is not known is not refused."""
    build = nodes_kit.module("nodes.bridge.build").build_model_patcher
    bridge, load = nodes_kit.module("nodes.bridge"), nodes_kit.module("wan_fp8.checkpoint.load").load_transformer
    high, low, unknown = (build(load(kit.core_weights("t2v")), e) for e in ("high_noise", "low_noise", None))
    prepare, task = nodes_kit.module("nodes.samplers").prepare_models, nodes_kit.module("wan_fp8.models.specs").Task.T2V
    for make in (lambda m: m, lambda m: m.clone(), bridge.fork, lambda m: bridge.set_shift(m, 3.0)):
        assert "the experts are swapped: 'model' holds the low-noise" in t2v_refused(make(low), model_low=make(high))
        assert len(prepare(task, make(high), make(low))) == 2
    for pair in ((low, unknown), (unknown, high), (unknown, unknown), (low, None)):
        assert prepare(task, *pair)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_noise_of_the_published_code_needs_a_gpu(t2v):
    message = refused(
        "BackendUnavailableError", "WanFP8SampleT2V", model=t2v, model_low=t2v, noise="cuda (published code)"
    )
    assert "set noise to 'cpu'" in message
