"""Sample Wan2.2 Animate on a tiny checkpoint: its loop against the published one written out, what each segment is
told, what a cancelled run leaves, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nodes_kit
import pytest
import torch
import torch.nn.functional as F
from nodes_kit import call, picture
from torch import Tensor

pytestmark = pytest.mark.usefixtures("comfy_core")

NODE = "WanFP8SampleAnimate"
LENGTH, SEGMENT, OVERLAP, STEPS = 13, 9, 5, 2


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


class MeanColour(torch.nn.Module):
    """In place of the motion encoder, which takes seconds a frame on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, faces: Tensor) -> Tensor:
        self.seen.append(faces)
        return faces.transpose(1, 2).flatten(3).std(3).repeat(1, 1, 171)[..., :512] - 0.5


@pytest.fixture(scope="module")
def parts(comfy_core, checkpoints, tmp_path_factory) -> dict[str, Any]:
    """What the loader returns for the tiny checkpoint, with text."""
    import folder_paths

    folder = tmp_path_factory.mktemp("models") / "wan"
    folder.mkdir()
    (folder / "animate").symlink_to(checkpoints["animate"], target_is_directory=True)
    nodes_kit.load_pack()
    folder_paths.add_model_folder_path("wan", str(folder))
    with torch.inference_mode():
        output = call("WanFP8LoadCheckpoint", checkpoint="animate", weight_dtype="fp32", vae_dtype="fp32")
        model, low, encoder, vae, clip_vision, audio = output.args
        positive, negative = call("WanFP8TextEncode", text_encoder=encoder, prompt="视频中的人在做动作").args
    assert low is model and "a Wan2.2 ANIMATE transformer" in output.ui.value
    with pytest.raises(nodes_kit.module("wan_fp8.errors").InputError, match="has no audio encoder"):
        audio.encode_audio(torch.zeros(1, 1, 9), 9)
    return {"model": model, "positive": positive, "negative": negative, "vae": vae, "clip_vision": clip_vision}


@pytest.fixture
def faces(parts: dict[str, Any]) -> Iterator[MeanColour]:
    net = parts["model"].model.diffusion_model
    original, net.motion_encoder = net.motion_encoder, MeanColour()
    yield net.motion_encoder
    net.motion_encoder = original


@functools.cache
def video(frames: int, width: int, height: int, seed: int = 0) -> Tensor:
    """An IMAGE of smooth colours that change from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, 3, 4, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bilinear").movedim(1, -1).contiguous()


def inputs(**more: Any) -> dict[str, Any]:
    driving = {"pose_video": video(LENGTH, 48, 32, 1), "face_video": video(LENGTH, 512, 512, 2)}
    return {
        "reference_image": picture(90, 40),
        **driving,
        "segment": SEGMENT,
        "overlap": OVERLAP,
        "steps": STEPS,
        **more,
    }


def replacing() -> dict[str, Tensor]:
    mask = torch.zeros(LENGTH, 32, 48)
    mask[:, 8:24, 16:40] = 1
    return {"mode": "replace", "background_video": video(LENGTH, 48, 32, 3), "character_mask": mask}


def run(parts: dict[str, Any], **more: Any) -> Any:
    return call(NODE, **parts, **inputs(**more))


# ---- the loop --------------------------------------------------------------------------------------------------------


def published(parts: dict[str, Any], given: dict[str, Any], seed: int, guidance: float) -> Tensor:
    """The loop of ``wan/animate.py`` for LENGTH frames, on the engine and core's VAE; frames [N, H, W, 3] in 0..1."""
    sampling, net = nodes_kit.module("wan_fp8.sampling"), parts["model"].model.diffusion_model
    vae, format_ = parts["vae"], parts["model"].get_model_object("latent_format")

    def encode(pixels_CTHW: Tensor) -> Tensor:
        return format_.process_in(vae.encode((pixels_CTHW / 2 + 0.5).movedim(0, -1)))[0]

    def channels_last(image: Tensor) -> Tensor:
        return image.movedim(-1, 0) * 2 - 1

    width, height, lat_t = 48, 32, SEGMENT // 4 + 1
    boxed = torch.zeros(3, height, width)  # 90 x 40 fits as 48 x 21, 5 rows of black above it
    scaled = F.interpolate(given["reference_image"].movedim(-1, 1), size=(21, 48), mode="bilinear")[0]
    boxed[:, 5:26] = scaled
    reference = boxed * 2 - 1
    rows = nodes_kit.module("nodes.bridge").image_rows(parts["clip_vision"], reference)["penultimate_hidden_states"]
    pose, face = channels_last(given["pose_video"]), channels_last(given["face_video"])
    generator, out, made = torch.Generator().manual_seed(seed), [], torch.empty(0)
    for start in range(0, LENGTH - OVERLAP, SEGMENT - OVERLAP):
        end, known = start + SEGMENT, OVERLAP if start else 0
        noise = torch.randn(16, lat_t + 1, height // 8, width // 8, generator=generator)
        y_ref = torch.cat([torch.ones(4, 1, 4, 6), encode(reference[:, None])])
        background = torch.zeros(3, SEGMENT, height, width)
        mask = torch.zeros(1, SEGMENT, 4, 6)
        if given.get("mode") == "replace":
            background = channels_last(given["background_video"])[:, start:end].clone()
            mask = (1 - given["character_mask"][start:end])[None, :, ::8, ::8].clone()
        if known:
            background[:, :known] = made[:, -known:]
        mask[:, :known] = 1
        mask = torch.cat([mask[:, :1].repeat(1, 4, 1, 1), mask[:, 1:]], dim=1)
        mask = mask.view(1, lat_t, 4, 4, 6).transpose(1, 2)[0]
        y = torch.cat([y_ref, torch.cat([mask, encode(background)])], dim=1)
        sigmas, steps = sampling.sigmas(STEPS, 5.0), sampling.timesteps(STEPS, 5.0)
        solver, x = sampling.UniPC(sigmas), noise
        for index, t in enumerate(steps):
            told = {"clip_fea": rows, "pose_latents": encode(pose[:, start:end])[None]}
            given_now = (torch.cat([x, y])[None], t[None].float())

            def velocity(context: Tensor, faces: Tensor, now: Any = given_now, told: Any = told) -> Tensor:
                return net(*now, context, **told, face_pixel_values=faces)[0]

            seen = face[None, :, start:end]
            v = velocity(parts["positive"][0][0], seen)
            if guidance != 1:
                u = velocity(parts["negative"][0][0], seen * 0 - 1)
                v = u + guidance * (v - u)
            x = solver.step(v, index, x)
        frames = vae.decode(format_.process_out(x[None, :, 1:]))[0]
        frames = channels_last(frames)[:, known:]
        out.append(frames)
        made = frames
    return (torch.cat(out, dim=1)[:, :LENGTH] / 2 + 0.5).movedim(0, -1)


@pytest.mark.usefixtures("faces")
@pytest.mark.parametrize(("mode", "guidance"), [("animate", 1.0), ("animate", 2.0), ("replace", 1.0)])
def test_the_loop_is_the_published_one(parts: dict[str, Any], mode: str, guidance: float) -> None:
    given = inputs(**(replacing() if mode == "replace" else {}))
    output = call(NODE, **parts, **given, seed=7, guidance=guidance)
    expected = published(parts, given, 7, guidance)
    images, latent = output.args
    assert images.shape == expected.shape == (LENGTH, 32, 48, 3) and images.dtype == torch.float32
    assert float((images - expected).abs().max()) < 2e-4
    assert latent["samples"].shape == (1, 16, 3, 4, 6)
    assert "video of 48x32 pixels, 13 frames, 2 segment(s)" in output.ui.value


def test_every_input_matters(parts: dict[str, Any], faces: MeanColour) -> None:
    plain = run(parts, length=SEGMENT).args[0]
    assert plain.shape[0] == SEGMENT and len(faces.seen) == 1, "encoded once for all steps"
    assert torch.equal(run(parts, length=SEGMENT).args[0], plain)
    changes: list[dict[str, Any]] = [
        {"face_video": None},
        {"pose_video": video(LENGTH, 48, 32, 9)},
        {"reference_image": picture(90, 40, seed=5)},
        {"seed": 1},
        replacing(),
    ]
    for change in changes:
        assert float((run(parts, length=SEGMENT, **change).args[0] - plain).abs().max()) > 1e-3, change.keys()


def test_faces_are_encoded_once_a_segment(parts: dict[str, Any], faces: MeanColour) -> None:
    run(parts, steps=3)
    assert [tuple(seen.shape) for seen in faces.seen] == [(1, 3, SEGMENT, 512, 512)] * 2
    faces.seen.clear()
    run(parts, steps=3, guidance=3.0)
    assert sum(seen.shape[0] for seen in faces.seen) == 2 * 2, "cond and uncond of two segments, together or apart"


def test_a_longer_video_runs_the_driving_ones_back(parts: dict[str, Any], faces: MeanColour) -> None:
    output = run(parts, length=LENGTH + 4, face_video=None)
    assert output.args[0].shape[0] == LENGTH + 4
    assert not faces.seen


def test_progress_counts_all_segments_and_previews_leave_the_reference_out(parts, faces, monkeypatch) -> None:
    import comfy.utils
    import latent_preview

    told, shown = [], []

    class Previewer:
        def decode_latent_to_preview_image(self, form: str, x0: Tensor) -> None:
            shown.append(tuple(x0.shape))

    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: Previewer())
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda now, total, *_, **__: told.append((now, total)))
    run(parts, face_video=None)
    assert [entry for entry in told if entry[1] == 2 * STEPS] == [(step + 1, 4) for step in range(4)]
    assert set(shown) == {(1, 16, 3, 4, 6)}


# ---- the run around it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_cancelled_run_leaves_what_it_made(parts, faces, monkeypatch, tmp_path: Path, stop_at: int) -> None:
    """Cancelled in the second segment: the first one is in a file. In the first: there is none."""
    import av
    import comfy.model_management as management
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    net, calls = parts["model"].model.diffusion_model, []

    def count(*_: Any) -> None:
        calls.append(1)
        if len(calls) == stop_at:
            management.interrupt_current_processing()
            management.throw_exception_if_processing_interrupted()

    hook = net.register_forward_pre_hook(count)
    try:
        with pytest.raises(management.InterruptProcessingException):
            run(parts, face_video=None, fps=25.0)
    finally:
        hook.remove()
    files = list(tmp_path.rglob("*.mp4"))
    if stop_at == 1:
        assert not files
    else:
        with av.open(str(files[0])) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert (len(frames), frames[0].shape, float(stream.average_rate)) == (SEGMENT, (32, 48, 3), 25.0)
        assert files[0].parent.name == "wan_fp8_unfinished" and len(files) == 1
    assert run(parts, face_video=None, length=SEGMENT).args[0].isfinite().all(), "the next run works"


def test_a_caller_of_core_gets_the_same(parts: dict[str, Any], faces: MeanColour) -> None:
    """Core's own conditioning node and KSampler on our MODEL, and core's transformer on the same weights."""
    import comfy.sd
    from comfy_extras.nodes_wan import WanAnimateToVideo

    state = {k: v.clone() for k, v in parts["model"].model.diffusion_model.state_dict().items()}
    import bridge_kit

    made = []
    core = comfy.sd.load_diffusion_model_state_dict(state)
    for buffer in (b for n, b in core.model.diffusion_model.named_buffers() if n.endswith(".kernel")):
        buffer.zero_()
    core.model.diffusion_model.motion_encoder = CoreMeanColour()
    for model in (parts["model"], core):
        conditioned = WanAnimateToVideo.execute(
            parts["positive"], parts["negative"], parts["vae"], 48, 32, 5, 1, 5, 0, reference_image=picture(48, 32),
            clip_vision_output=parts["clip_vision"].encode_image(picture(48, 32), crop=False),
            pose_video=video(5, 48, 32), face_video=video(5, 512, 512, 2),
        ).args  # fmt: skip
        made.append(
            bridge_kit.ksample(model, conditioned[2], positive=conditioned[0], negative=conditioned[1], cfg=2.0)
        )
    assert bridge_kit.distance(made[0], made[1]) < 1e-4
    forked = nodes_kit.module("nodes.bridge").spec_of(core)
    assert forked == parts["model"].model.diffusion_model.spec


class CoreMeanColour(torch.nn.Module):
    """The stand-in as core calls it: frames of all samples together."""

    def forward(self, frames: Tensor) -> Tensor:
        return self.get_motion(frames)

    def get_motion(self, frames: Tensor) -> Tensor:
        return frames.flatten(2).std(2).repeat(1, 171)[:, :512] - 0.5


def test_clip_rows_are_transformers(parts: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    """Published: bicubic without antialiasing straight to a square, all but the last layer, no final norm."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    senses = nodes_kit.module("wan_fp8.checkpoint.senses")
    state = senses.load_clip_vision_state_dict(next(checkpoints["animate"].glob("models_clip*")), torch.float32)
    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16, image_size=28,
        patch_size=14, hidden_act="gelu", projection_dim=1024,
    )  # fmt: skip
    theirs = CLIPVisionModel(config).eval()
    wanted = {name.removeprefix("vision_model.") for name in theirs.state_dict()}
    bare = {name.removeprefix("vision_model."): value for name, value in state.items()}
    prefix = "" if any(not n.startswith("vision_model.") for n in theirs.state_dict()) else "vision_model."
    theirs.load_state_dict({prefix + name: bare[name] for name in wanted if name in bare}, strict=False)
    image = picture(90, 40)[0].movedim(-1, 0) * 2 - 1
    pixels = F.interpolate(image[None], size=(28, 28), mode="bicubic") * 0.5 + 0.5
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    expected = theirs((pixels - mean) / std, output_hidden_states=True).hidden_states[-2]
    rows = nodes_kit.module("nodes.bridge").image_rows(parts["clip_vision"], image)["penultimate_hidden_states"]
    assert rows.shape == (1, 5, 1280)
    assert float((rows - expected).norm() / expected.norm()) < 1e-5


# ---- bad inputs ------------------------------------------------------------------------------------------------------


def refused(parts: dict[str, Any], **more: Any) -> str:
    errors = nodes_kit.module("wan_fp8.errors")
    with pytest.raises(errors.WanFP8Error) as caught:
        run(parts, **more)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"face_video": torch.zeros(LENGTH - 1, 64, 64, 3)}, "face_video has 12 frames and pose_video has 13"),
        ({"pose_video": torch.zeros(0, 32, 48, 3)}, "pose_video takes the frames of a video"),
        ({"pose_video": torch.zeros(LENGTH, 50, 48, 3)}, "pose_video is 48x50 pixels, and a video has multiples of 16"),
        ({"mode": "swap"}, "mode must be one of animate, replace"),
        ({"size": "huge"}, "size must be one of pose video"),
        ({"mode": "replace"}, "background_video is not connected"),
        ({**replacing(), "character_mask": None}, "character_mask is not connected"),
        ({**replacing(), "character_mask": torch.zeros(LENGTH, 48, 48)}, "which is another aspect"),
        ({**replacing(), "character_mask": torch.zeros(4, 32, 48)}, "one mask, or 13 as pose_video has frames"),
        ({**replacing(), "background_video": torch.zeros(9, 32, 48, 3)}, "background_video has 9 frames"),
        ({**replacing(), "background_video": torch.zeros(LENGTH, 32, 32, 3)}, "which is another aspect"),
        ({"reference_image": torch.zeros(2, 8, 8, 3)}, "reference_image takes one RGB picture"),
        ({"overlap": 2}, "overlap must be 1 or 5"),
        ({"segment": 10}, "frames must be 4n"),
        ({"size": "width x height", "width": 60, "height": 32}, "width must be a multiple of 16"),
        ({"noise": "cuda (published code)"}, "needs an NVIDIA GPU|has none that torch can use"),
    ],
)
def test_bad_inputs_get_a_sentence(parts: dict[str, Any], change: dict[str, Any], words: str) -> None:
    import re

    assert re.search(words, refused(parts, **change))


def test_a_length_that_does_not_fit_is_said_before_the_run(parts: dict[str, Any], faces: MeanColour) -> None:
    message = refused(parts, length=260_000, size="width x height", width=8192, height=8192)
    assert "260000 frames of 8192x8192 pixels need" in message and "GiB of host memory" in message
    assert "frames or fewer at once" in message and not faces.seen


def test_other_models_and_parts_are_refused_by_name(parts: dict[str, Any]) -> None:
    import bridge_kit

    t2v = nodes_kit.module("nodes.bridge").hosted(bridge_kit.core_model("t2v"))
    assert "'model' is a Wan2.2 T2V model" in refused({**parts, "model": t2v})
    assert "takes the Wan 2.1 VAE" in refused({**parts, "vae": nodes_kit.vae("2.2")})
    assert "clip_vision takes a CLIP_VISION" in refused({**parts, "clip_vision": object()})
    with pytest.raises(nodes_kit.module("wan_fp8.errors").InputError, match=r"'Sample Wan2\.2 Animate'"):
        call("WanFP8SampleTI2V", **{k: parts[k] for k in ("model", "positive", "negative")})


@pytest.mark.usefixtures("faces")
def test_odd_inputs_that_are_taken(parts: dict[str, Any]) -> None:
    """No face in view, a picture with transparency, one frame, a mask and a pose of another size."""
    black = run(parts, length=5, segment=5, overlap=1, face_video=torch.zeros(LENGTH, 64, 64, 3))
    none = run(parts, length=5, segment=5, overlap=1, face_video=None)
    assert float((black.args[0] - none.args[0]).abs().max()) > 1e-4, "a black face is not the same as no video"
    opaque = picture(48, 32)
    clear = torch.cat([opaque, torch.rand(1, 32, 48, 1)], dim=-1)
    small = {"length": 5, "segment": 5, "overlap": 1, "face_video": None}
    same = [run(parts, reference_image=image, **small).args[0] for image in (opaque, clear)]
    assert torch.equal(*same)
    one = run(parts, **{**small, "length": 0, "segment": 1}, pose_video=video(1, 48, 32))
    assert one.args[0].shape == (1, 32, 48, 3) and "the character stands still" in one.ui.value
    wide = run(parts, **small, size="width x height", width=96, height=32)
    assert wide.args[0].shape == (5, 32, 96, 3) and "letter-boxed" in wide.ui.value
    given = {**replacing(), "character_mask": F.interpolate(replacing()["character_mask"][None], size=(16, 24))[0]}
    assert torch.equal(run(parts, **small, **given).args[0], run(parts, **small, **replacing()).args[0])
    face = run(parts, **{**small, "face_video": torch.rand(LENGTH, 40, 64, 3)})
    assert "cropped to its middle square" in face.ui.value
