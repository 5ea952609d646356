"""Animate and S2V with everything else on their MODEL: FP8 recipes, attention settings, LoRAs, step caches with a curve
of their own, and core's context windows refused or honoured."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nodes_kit
import pytest
import torch
from nodes_kit import call, picture
from torch import Tensor

pytestmark = pytest.mark.usefixtures("comfy_core")

TASKS = ("animate", "s2v")
STEPS = 12


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


class MeanColour(torch.nn.Module):
    """In place of the motion encoder, which takes seconds a frame on a CPU."""

    def forward(self, faces: Tensor) -> Tensor:
        return faces.transpose(1, 2).flatten(3).std(3).repeat(1, 1, 171)[..., :512] - 0.5


@pytest.fixture(scope="module")
def loaded(comfy_core, checkpoints, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """By task: the inputs of its sampler node for one short segment, in fp32."""
    import folder_paths

    folder = tmp_path_factory.mktemp("models") / "wan"
    folder.mkdir()
    nodes_kit.load_pack()
    folder_paths.add_model_folder_path("wan", str(folder))
    found = {}
    for task in TASKS:
        (folder / f"long-{task}").symlink_to(checkpoints[task], target_is_directory=True)
        with torch.inference_mode():
            boxes = {"checkpoint": f"long-{task}", "weight_dtype": "fp32", "vae_dtype": "fp32"}
            model, _, encoder, vae, clip_vision, _ = call("WanFP8LoadCheckpoint", **boxes).args
            positive, negative = call("WanFP8TextEncode", text_encoder=encoder, prompt="a fox").args
        common = {"model": model, "positive": positive, "negative": negative, "vae": vae}
        if task == "animate":
            video = {"pose_video": torch.rand(5, 32, 48, 3), "segment": 5}
            found[task] = {**common, "clip_vision": clip_vision, "reference_image": picture(48, 32), **video}
        else:
            features = {"encoded_audio_all_layers": [torch.randn(1, 20, 1024) for _ in range(25)]}
            size = {"size": "width x height", "width": 64, "height": 64, "clip_frames": 8}
            found[task] = {**common, "reference_image": picture(64, 64), "audio_features": features, **size}
    return found


def sample(loaded: dict[str, dict[str, Any]], task: str, model: Any = None, **more: Any) -> Tensor:
    """The latents of the last segment."""
    node = {"animate": "WanFP8SampleAnimate", "s2v": "WanFP8SampleS2V"}[task]
    given = {**loaded[task], "steps": 2, "guidance": 1.0, **more}
    if model is not None:
        given["model"] = model
    return call(node, **given).args[1]["samples"]


@contextlib.contextmanager
def faces(task: str, *models: Any) -> Iterator[dict[str, Any]]:
    """A face video for Animate, and the stand-in that encodes it; nothing for S2V."""
    nets = [model.model.diffusion_model for model in models] if task == "animate" else []
    kept = [net.motion_encoder for net in nets]
    for net in nets:
        net.motion_encoder = MeanColour()
    yield {"face_video": torch.rand(5, 64, 64, 3, generator=torch.Generator().manual_seed(2))} if nets else {}
    for net, encoder in zip(nets, kept, strict=True):
        net.motion_encoder = encoder


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("recipe", ["rowwise", "DelayedScaling"])
def test_fp8_recipes(loaded, task: str, recipe: str) -> None:
    made = call("WanFP8Recipe", model=loaded[task]["model"], recipe=recipe, backend="reference").args[0]
    net = made.model.diffusion_model
    fp8 = [name for name, value in net.state_dict().items() if value.dtype == torch.float8_e4m3fn]
    assert len(fp8) == 10 * len(net.blocks)
    with faces(task, made, loaded[task]["model"]) as more:
        plain = sample(loaded, task, **more)
        assert 1e-4 < distance(sample(loaded, task, made, **more), plain) < 0.3
        assert torch.equal(sample(loaded, task, **more), plain), "the MODEL that came in is as it was"


@pytest.mark.parametrize("task", TASKS)
def test_single_files_in_fp8(loaded, task: str, tmp_path: Path, monkeypatch) -> None:
    """As ComfyUI's repackaged files: scaled FP8 in the blocks, kept as it is; near the same weights in bf16."""
    import folder_paths
    from make_tiny_checkpoint import make_tiny_checkpoint

    made = make_tiny_checkpoint(tmp_path / task, task, layout="comfy", fp8="scaled_fp8")
    folder = made / "diffusion_models"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(folder)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("diffusion_models", None)
    output = call("WanFP8LoadCheckpoint", checkpoint=next(folder.iterdir()).name)
    assert "stored as" in output.ui.value
    net = output.args[0].model.diffusion_model
    assert any(value.dtype == torch.float8_e4m3fn for value in net.state_dict().values())
    assert 1e-4 < distance(sample(loaded, task, output.args[0]), sample(loaded, task)) < 0.3


@pytest.mark.parametrize("task", TASKS)
def test_the_attention_setting_reaches_fusers_and_injectors(loaded, task: str) -> None:
    core_class = nodes_kit.module("wan_fp8.attention").AttentionCore
    made = call("WanFP8Attention", model=loaded[task]["model"], backend="reference").args[0]
    cores = [module for module in made.model.diffusion_model.modules() if isinstance(module, core_class)]
    used = set()
    with faces(task, made) as more:
        plain = sample(loaded, task, **more)
        hooks = [core.register_forward_hook(lambda core, args, _: used.add((core, args[3].backend))) for core in cores]
        try:
            assert distance(sample(loaded, task, made, **more), plain) < 1e-4
        finally:
            for hook in hooks:
                hook.remove()
    assert len(cores) == 2 * len(made.model.diffusion_model.blocks) + 1, "one fuser, or one injector"
    assert used == {(core, "reference") for core in cores}


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_the_relighting_lora(loaded, mode: str, tmp_path: Path, monkeypatch) -> None:
    """The official file's names and wrapping; the change is exactly strength B A on the layers that it names."""
    import folder_paths
    from comfy_fixtures import save_relighting_lora

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".ckpt"}))
    folder_paths.filename_list_cache.pop("loras", None)
    save_relighting_lora(tmp_path / "relighting_lora.ckpt")
    net = loaded["animate"]["model"].model.diffusion_model
    state = torch.load(tmp_path / "relighting_lora.ckpt", weights_only=True)["state_dict"]
    plain, kept = sample(loaded, "animate"), {}
    for name in {key.partition(".lora_")[0] for key in state}:
        weight = net.get_parameter(f"{name}.weight")
        kept[name] = weight.data
        weight.data = weight.data + state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
    try:
        by_hand = sample(loaded, "animate")
    finally:
        for name, data in kept.items():
            net.get_parameter(f"{name}.weight").data = data
    made = call("WanFP8LoadLora", model=loaded["animate"]["model"], lora="relighting_lora.ckpt", mode=mode).args[0]
    ours = sample(loaded, "animate", made)
    assert torch.equal(sample(loaded, "animate"), plain)
    assert distance(ours, by_hand) < 1e-5 < 1e-3 < distance(ours, plain)


# ---- step caches -----------------------------------------------------------------------------------------------------


@pytest.fixture
def curves(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """An empty folder of curves, and the only one."""
    import folder_paths

    folder = tmp_path / "magcache"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "wan_magcache", ([str(folder)], set()))
    folder_paths.filename_list_cache.pop("wan_magcache", None)
    yield folder
    folder_paths.filename_list_cache.pop("wan_magcache", None)


@pytest.mark.parametrize("task", TASKS)
def test_a_cache_needs_a_curve_of_its_own(loaded, task: str) -> None:
    errors = nodes_kit.module("wan_fp8.errors")
    with pytest.raises(errors.InputError, match=rf"no curve has been published for {task} models.*Calibrate"):
        call("WanFP8MagCache", model=loaded[task]["model"])


@pytest.mark.parametrize(("task", "segments"), [("animate", 1), ("animate", 2), ("s2v", 2)])
def test_calibrate_save_find_and_skip(loaded, curves: Path, task: str, segments: int, caplog) -> None:
    """Each segment skips what the engine's rule makes of the saved curve; a video of several ends with their sum."""
    caching, sampling = nodes_kit.module("wan_fp8.caching"), nodes_kit.module("wan_fp8.sampling")
    specs = nodes_kit.module("wan_fp8.models.specs")
    model = loaded[task]["model"]
    measuring = call("WanFP8MagCacheCalibrate", model=model).args[0]
    node = {"animate": "WanFP8SampleAnimate", "s2v": "WanFP8SampleS2V"}[task]
    more: dict[str, Any] = {"animate": {"length": 4 * segments + 1}, "s2v": {"audio_features": longer()}}[task]
    given = {**loaded[task], **more, "steps": STEPS, "guidance": 2.0}
    output = call(node, **{**given, "model": measuring})
    saved = call("WanFP8MagCacheSave", model=measuring, latent=output.args[1], name="mine")
    assert "curve of 12 steps written" in saved.ui.value
    numbers = {"threshold": 2.0, "max_skips": 2, "retention": 0.2}
    found = call("WanFP8MagCache", model=model, preset="custom", **numbers)
    assert "curve: mine, measured on this model" in found.ui.value
    caplog.set_level("INFO", logger="wan_fp8")
    cached = call(node, **{**given, "model": found.args[0]})
    pattern = r"MagCache(.*?): (\d+) of (\d+) passes computed, (\d+) skipped"
    matches = [re.match(pattern, record.getMessage()) for record in caplog.records]
    told = [(match[1], *map(int, match.groups()[1:])) for match in matches if match]
    curve = caching.load_curve(curves / "mine.json")
    plan = caching.RunPlan(
        spec=specs.SPECS[{"animate": "animate-14B", "s2v": "s2v-14B"}[task]],
        schedule=tuple(sampling.sigmas(STEPS, sampling.DEFAULTS[specs.Task(task)].shift, "unipc").float().tolist()),
        first=0, end=STEPS,
    )  # fmt: skip
    skipped = len(caching.MagCache(**numbers, curve=curve).start(plan).decisions)
    assert skipped >= 8
    expected = [("", 2 * STEPS - skipped, 2 * STEPS, skipped)] * segments
    if segments > 1:
        expected.append((f", all {segments} segments", *(segments * count for count in expected[0][1:])))
    assert told == expected
    assert 0 < distance(cached.args[1]["samples"], output.args[1]["samples"]) < 1
    assert cached.args[0].shape == output.args[0].shape


@pytest.mark.parametrize("task", TASKS)
def test_a_cache_starts_over_with_each_segment(loaded, task: str, caplog) -> None:
    """EasyCache measures in the run: no residual of one segment stands in for another's."""
    made = call("WanFP8MagCache", model=loaded[task]["model"], policy="easycache", preset="custom", threshold=2.0).args[
        0
    ]
    caplog.set_level("INFO", logger="wan_fp8")
    more: dict[str, Any] = {"length": 9} if task == "animate" else {"audio_features": longer()}
    assert sample(loaded, task, made, steps=STEPS, **more).isfinite().all()
    reports = [record.getMessage() for record in caplog.records if "passes computed" in record.getMessage()]
    assert len(reports) == 3, "one for each segment, and their sum"
    assert "EasyCache, all 2 segments: " in reports.pop() and all(
        "of 12 passes computed" in report and ", 0 skipped" not in report for report in reports
    )


def longer() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"encoded_audio_all_layers": [torch.randn(1, 44, 1024, generator=generator) for _ in range(25)]}


def test_core_s_context_windows(loaded) -> None:
    """Windows along time would cut the latents and not what belongs to them frame by frame: said, not ignored."""
    import comfy.context_windows as windows

    model = loaded["animate"]["model"].clone()
    handler = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule("standard_static"),
        fuse_method=windows.get_matching_fuse_method("pyramid"), context_length=1, context_overlap=0, dim=2,
    )  # fmt: skip
    model.model_options["context_handler"] = handler
    errors = nodes_kit.module("wan_fp8.errors")
    with pytest.raises(errors.WanFP8Error, match="context windows"):
        sample(loaded, "animate", model)
