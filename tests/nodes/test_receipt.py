"""The quality receipt against the samplers, and against arithmetic written out here."""

from __future__ import annotations

import json
import math

import bridge_kit as kit
import nodes_kit
import numpy as np
import pytest
import torch
from nodes_kit import call, latents

pytestmark = pytest.mark.usefixtures("comfy_core", "inference")

TEXT = {"positive": kit.prompt(1), "negative": kit.prompt(2)}
RUN = {"seed": 7, "steps": 4}
SIZE = {"width": 32, "height": 32, "length": 5}
LATENT = {"samples": torch.zeros(1, 16, 2, 4, 4)}


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def t2v(comfy_core):
    return kit.core_model("t2v", seed=0), kit.core_model("t2v", seed=1)


@pytest.fixture(scope="module")
def fp8(t2v):
    made = call("WanFP8Recipe", model=t2v[0], model_low=t2v[1], recipe="DelayedScaling", backend="reference")
    return made.args[0], made.args[1]


def receipt(model, low=None, **inputs):
    out = call("WanFP8QualityReceipt", **{"model": model, "model_low": low, "latent": LATENT, **TEXT, **RUN, **inputs})
    return out, json.loads(out.args[4])


def sampled(models, **inputs):
    return latents(call("WanFP8SampleT2V", model=models[0], model_low=models[1], **TEXT, **SIZE, **RUN, **inputs))


def test_without_settings_both_runs_are_equal_to_the_sampler(t2v):
    out, facts = receipt(*t2v)
    assert torch.equal(out.args[0]["samples"], sampled(t2v)) and torch.equal(latents(out), out.args[1]["samples"])
    assert facts["latent"] == {"identical": True, "psnr_db": None, "cosine": pytest.approx(1), "relative_error": 0}
    assert [entry["relative_error"] for entry in facts["steps"]] == [0] * 4 and facts["video"] is None
    assert facts["settings"]["boundary"] == 0.875 and facts["settings"]["shift"] == 12
    assert (facts["settings"]["guidance"], facts["settings"]["guidance_low"]) == (4, 3)
    assert facts["reference"]["peak_gib"] is None and facts["setting"]["peak_gib"] is None, "no GPU, no number"
    assert facts["reference"]["seconds"] >= 3 * facts["reference"]["seconds_of_a_step"] > 0
    assert out.args[2].shape[0] == 1 and out.args[2].shape[3] == 3
    with pytest.raises(Exception, match=r"no VAE is connected to decode them: connect 'vae'"):
        _ = out.args[3].shape


def test_a_recipe_is_held_against_the_model_from_before_it(t2v, fp8):
    vae = nodes_kit.vae("2.1")
    out, facts = receipt(*fp8, vae=vae)
    ours, exact = sampled(fp8), sampled(t2v)
    assert torch.equal(latents(out), ours) and torch.equal(out.args[1]["samples"], exact)
    a, b = (x.double().numpy().ravel() for x in (ours, exact))
    error = np.mean((a - b) ** 2)
    expected = {
        "identical": False,
        "psnr_db": 10 * math.log10((b.max() - b.min()) ** 2 / error),
        "cosine": a @ b / (np.linalg.norm(a) * np.linalg.norm(b)),
        "relative_error": np.linalg.norm(a - b) / np.linalg.norm(b),
    }
    assert facts["latent"] == pytest.approx(expected, rel=1e-9)
    frames = [vae.decode(x)[0].clamp(0, 1).double().numpy() for x in (ours, exact)]
    assert facts["video"]["psnr_db"] == pytest.approx(-10 * math.log10(np.mean((frames[0] - frames[1]) ** 2)), abs=1e-3)
    assert 0 < facts["video"]["ssim"] < 1 and facts["video"]["lpips"].startswith("not measured")
    assert out.args[3].shape[-1] == 3 and 0 <= float(out.args[3].min()) <= float(out.args[3].max()) <= 1
    assert all(entry["relative_error"] > 0 for entry in facts["steps"]) and len(facts["steps"]) == 4
    assert facts["steps"][-1]["relative_error"] > 10 * 1e-3
    for side, gemm, recipe in (("reference", [], "none"), ("setting", ["reference"], "DelayedScaling")):
        assert [entry["gemm"] for entry in facts[side]["kernels"]] == [gemm] * 2, "both experts"
        assert {entry["recipe"] for entry in facts[side]["models"]} == {recipe}
        assert [entry["attention"] for entry in facts[side]["kernels"]] == [["sdpa"]] * 2
    assert any("PSNR" in line for line in out.ui.value.splitlines())
    assert "no extra_pnginfo" in out.ui.value


def test_a_connected_reference_is_taken_as_it_comes(t2v, fp8):
    _, derived = receipt(*fp8)
    _, given = receipt(*fp8, reference=t2v[0], reference_low=t2v[1])
    assert (derived["reference"]["made_of"], given["reference"]["made_of"]) == ("model", "reference")
    assert given["latent"] == derived["latent"] and given["steps"] == derived["steps"]
    _, itself = receipt(*fp8, reference=fp8[0], reference_low=fp8[1])
    assert itself["latent"]["identical"], "settings of a connected reference stay"


def test_every_setting_is_taken_away_from_the_reference_and_loras_are_not(t2v):
    window = {"skip_first_steps": 0, "skip_last_steps": 0, "skip_first_blocks": 0, "skip_last_blocks": 0, "bound": 0.0}
    file = kit.core_lora(kit.lora_pairs(kit.core_weights("t2v")))
    models = [kit.with_core_lora(given, file) for given in t2v]
    exact = sampled(models)
    assert kit.distance(exact, sampled(t2v)) > 1e-2
    models = call("WanFP8Attention", model=models[0], model_low=models[1], backend="reference-fp8", **window).args
    models = call("WanFP8Compile", model=models[0], model_low=models[1], residual_stream="bfloat16").args
    out, facts = receipt(*models)
    assert kit.distance(out.args[1]["samples"], exact) < 1e-6
    blocks, passes = 2, [sum(flags) for flags in _expert_steps(4)]
    counts = [{"reference-fp8": blocks * steps * 2} for steps in passes]
    batched = [{"reference-fp8": blocks * steps} for steps in passes]
    assert [entry["attention"] for entry in facts["setting"]["kernels"]] in (counts, batched)
    assert not facts["latent"]["identical"]
    assert facts["setting"]["models"][0]["residual_stream"] == "bfloat16"
    assert facts["reference"]["models"][0]["residual_stream"] == "float32"
    assert facts["reference"]["models"][0]["patches"] == facts["setting"]["models"][0]["patches"] > 0


def _expert_steps(steps):
    sampling = nodes_kit.module("wan_fp8.sampling")
    high = [t >= 875 for t in sampling.timesteps(steps, 12.0, "unipc").tolist()]
    return high, [not flag for flag in high]


def near(plot, colour) -> torch.Tensor:
    """[H, W] where a plot has this colour."""
    return (plot[0] - torch.tensor(colour) / 255).abs().amax(-1) < 1e-3


def test_a_cache_says_what_it_skipped_and_the_schedule_is_drawn(t2v, monkeypatch):
    models = call("WanFP8MagCache", model=t2v[0], model_low=t2v[1], policy="taylor", preset="custom", max_skips=1)
    blocks, seen = nodes_kit.module("wan_fp8.models.blocks").WanBlock, []
    forward = blocks.forward

    def counted(self, stream, state):
        position = state.options.position
        if self.index == 0 and position is not None:
            seen.append(position.step + 1)
        return forward(self, stream, state)

    monkeypatch.setattr(blocks, "forward", counted)
    out, facts = receipt(*models.args, steps=14)
    assert not facts["latent"]["identical"] and "Taylor" in facts["setting"]["models"][0]["cache"]
    assert facts["reference"]["models"][0]["cache"] == "none" and facts["reference"]["caches"] == []
    high, low = facts["setting"]["caches"]
    ran = sorted(set(seen))
    for entry, mine in (
        (high, range(1, sum(_expert_steps(14)[0]) + 1)),
        (low, range(sum(_expert_steps(14)[0]) + 1, 15)),
    ):
        computed, skipped = entry["steps_computed"], entry["steps_skipped"]
        assert computed["cond"] == computed["uncond"] == [step for step in ran if step in mine]
        assert skipped["cond"] == skipped["uncond"] == [step for step in mine if step not in ran]
        counts = (2 * len(computed["cond"]), 2 * len(skipped["cond"]))
        assert (entry["passes_computed"], entry["passes_skipped"]) == counts and counts[1] > 0
    image = nodes_kit.module("nodes.receipt_image")
    width = (image.WIDTH - image.LEFT - image.RIGHT) / 14
    row = slice(image.BOTTOM + image.MARKS + 4, image.BOTTOM + image.MARKS + image.MARK - 4)
    skipped = near(out.args[2], image.SKIPPED)[row].all(0)
    for step in range(1, 15):
        middle = skipped[int(image.LEFT + (step - 0.9) * width) : int(image.LEFT + (step - 0.1) * width)]
        assert bool(middle.all() if step not in ran else not middle.any()), step
    at = round(image.LEFT + max(high["steps_computed"]["cond"][-1], high["steps_skipped"]["cond"][-1]) * width)
    assert near(out.args[2], image.SWITCH)[row, at - 2 : at + 3].any(1).all(), "the experts' boundary crosses the marks"
    without = image.receipt_plot({**facts, "setting": {**facts["setting"], "caches": []}})
    assert without.shape[1] == image.HEIGHT < out.args[2].shape[1] and not near(without, image.SKIPPED).any()


def test_conditionings_that_skip_apart_have_a_row_each_and_equal_latents_keep_them(t2v):
    image = nodes_kit.module("nodes.receipt_image")
    _, facts = receipt(*t2v)
    entry = {"expert": "high_noise", "policy": "MagCache", "passes_computed": 5, "passes_skipped": 3}
    steps = {"steps_computed": {"cond": [1, 2], "uncond": [1, 2, 4]}, "steps_skipped": {"cond": [3, 4], "uncond": [3]}}
    plot = image.receipt_plot({**facts, "setting": {**facts["setting"], "caches": [{**entry, **steps}]}})
    assert facts["latent"]["identical"] and plot.shape[1] == image.HEIGHT + 2 * image.ROW + 30
    width = (image.WIDTH - image.LEFT - image.RIGHT) / 4
    for number, expected in enumerate(([0, 0, 1, 1], [0, 0, 1, 0])):
        top = image.BOTTOM + image.MARKS + number * image.ROW
        row = near(plot, image.SKIPPED)[top + image.MARK // 2]
        assert [bool(row[int(image.LEFT + (step + 0.5) * width)]) for step in range(4)] == [bool(e) for e in expected]
    assert not near(plot, image.SWITCH).any(), "one expert, no boundary"


def test_sparse_attention_is_told_and_drawn(t2v, monkeypatch):
    sparse = nodes_kit.module("wan_fp8.attention.sparse")
    opened = {
        "policy": "density",
        "density": 0.5,
        "bound": 0.9,
        "skip_first": 0.0,
        "skip_first_blocks": 0,
        "skip_last_blocks": 0,
    }
    monkeypatch.setitem(sparse.presets(), "balanced", sparse.Sparsity(**opened))
    larger = {"samples": torch.zeros(1, 16, 5, 12, 12)}  # 180 tokens, two blocks
    models = call("WanFP8Attention", model=t2v[0], model_low=t2v[1], sparsity="balanced").args
    _, before = receipt(*models, latent=larger, steps=6)
    high, low = before["setting"]["sparsity"]
    assert before["reference"]["sparsity"] == [], "the reference attends to all keys"
    assert sorted(map(int, [*high["density_by_step"], *low["density_by_step"]])) == [1, 2, 3, 4, 5]  # the last is dense
    assert high["dropped_mass"]["mean"] > 0 and high["policy"] == "density" and not before["latent"]["identical"]
    image = nodes_kit.module("nodes.receipt_image")
    plots = [
        image.receipt_plot(facts) for facts in (before, {**before, "setting": {**before["setting"], "sparsity": []}})
    ]
    colour = torch.tensor(image.SPARSE) / 255
    drawn = [int(((plot[0] - colour).abs().amax(-1) < 1e-3).sum()) for plot in plots]
    assert drawn[0] > 5 * (2 * image.DOT) ** 2 > drawn[1] == 0, "a mark for each sparse step, and none without"


def test_the_reference_in_float32_computes_in_float32():
    load, bridge = nodes_kit.module("wan_fp8.checkpoint.load"), nodes_kit.module("nodes.bridge")
    weights = {name: value.bfloat16() for name, value in kit.core_weights("t2v").items()}
    stored, exact = (
        bridge.build_model_patcher(load.load_transformer(dict(weights), dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    )
    stored.model.manual_cast_dtype = None  # as on a GPU, where bf16 weights are multiplied in bf16
    inputs = {"boundary": 0.0, "steps": 2}
    _, plain = receipt(stored, **inputs)
    assert plain["latent"]["identical"]
    out, facts = receipt(stored, reference_precision="float32", **inputs)
    wanted, _ = receipt(exact, **inputs)
    assert kit.distance(out.args[1]["samples"], latents(wanted)) < 1e-5
    assert facts["latent"]["relative_error"] > 1e-4 and facts["reference"]["precision"] == "float32"


def test_image_to_video_and_the_5b_model():
    import comfy_extras.nodes_wan as core

    i2v = [kit.core_model("i2v", seed=seed) for seed in (0, 1)]
    positive, negative, latent = core.WanImageToVideo.execute(
        TEXT["positive"], TEXT["negative"], nodes_kit.vae("2.1"), 32, 32, 5, 1, start_image=nodes_kit.picture(32, 32)
    ).args
    out, facts = receipt(*i2v, latent=latent, positive=positive, negative=negative, steps=5)
    assert facts["task"] == "i2v" and facts["settings"]["boundary"] == 0.9 and facts["latent"]["identical"]
    assert torch.isfinite(latents(out)).all()
    ti2v = kit.core_model("ti2v", seed=0)
    ours = call("WanFP8Recipe", model=ti2v, recipe="rowwise", backend="reference").args[0]
    latent = core.Wan22ImageToVideoLatent.execute(nodes_kit.vae("2.2"), 64, 32, 5, 1, nodes_kit.picture(64, 32)).args[0]
    out, facts = receipt(ours, latent=latent, steps=2)
    assert facts["settings"]["boundary"] is None and 0 < facts["latent"]["relative_error"] < 1
    kept = out.args[0]["samples"][:, :, 0] - out.args[1]["samples"][:, :, 0]
    assert float(kept.abs().max()) == 0, "the given first frame stays in both"


def test_a_cancelled_receipt_leaves_nothing_behind(t2v, monkeypatch):
    import comfy.model_management as management

    quality = nodes_kit.module("wan_fp8.quality")
    real = quality.Trajectory.compare

    def cancelled(self, step, clean):
        if step == 2:
            raise management.InterruptProcessingException
        return real(self, step, clean)

    monkeypatch.setattr(quality.Trajectory, "compare", cancelled)
    with pytest.raises(management.InterruptProcessingException):
        receipt(*t2v)
    monkeypatch.undo()
    assert receipt(*t2v)[1]["latent"]["identical"]


def test_bad_inputs_are_refused_before_anything_runs(t2v):
    with pytest.raises(
        Exception, match=r"'latent' takes the latents of one T2V video, \[1, 16, .*got \[2, 16, 2, 4, 4\]"
    ):
        receipt(*t2v, latent={"samples": torch.zeros(2, 16, 2, 4, 4)})
    with pytest.raises(Exception, match=r"connect 'reference' and 'reference_low', or neither"):
        receipt(*t2v, reference=t2v[0])
    with pytest.raises(Exception, match=r"connect 'reference' and 'reference_low', or neither"):
        receipt(*t2v, reference_low=t2v[1])
    with pytest.raises(Exception, match=r"TI2V-5B has one transformer: disconnect 'model_low' and 'reference_low'"):
        receipt(kit.core_model("ti2v"), t2v[1], latent={"samples": torch.zeros(1, 48, 2, 4, 2)})
    with pytest.raises(Exception, match=r"belong to the low-noise expert and 'model_low' is not connected"):
        receipt(t2v[0])
    with pytest.raises(Exception, match=r"reference_precision must be one of as loaded, float32; got 'fp64'"):
        receipt(*t2v, reference_precision="fp64")
    with pytest.raises(Exception, match=r"t2v takes the Wan 2\.1 VAE"):
        receipt(*t2v, vae=nodes_kit.vae("2.2"))
