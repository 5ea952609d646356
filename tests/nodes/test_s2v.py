"""Sample Wan2.2 Speech to Video on a tiny checkpoint: its loop against the published one written out, sounds of every
kind, what a cancelled run leaves, and what is refused."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import nodes_kit
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nodes_kit import call, picture
from torch import Tensor

pytestmark = pytest.mark.usefixtures("comfy_core")

NODE = "WanFP8SampleS2V"
CLIP, STEPS, SIZE = 8, 2, 64
RATE = 24_000


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def parts(comfy_core, checkpoints, tmp_path_factory) -> dict[str, Any]:
    """What the loader returns for the tiny checkpoint, with text."""
    import folder_paths

    folder = tmp_path_factory.mktemp("models") / "wan"
    folder.mkdir()
    (folder / "s2v").symlink_to(checkpoints["s2v"], target_is_directory=True)
    nodes_kit.load_pack()
    folder_paths.add_model_folder_path("wan", str(folder))
    with torch.inference_mode():
        output = call("WanFP8LoadCheckpoint", checkpoint="s2v", weight_dtype="fp32", vae_dtype="fp32")
        model, low, encoder, vae, _, audio_encoder = output.args
        positive, negative = call("WanFP8TextEncode", text_encoder=encoder, prompt="a fox sings").args
    assert low is model and "a Wan2.2 S2V transformer" in output.ui.value
    return {"model": model, "positive": positive, "negative": negative, "vae": vae, "audio_encoder": audio_encoder}


@functools.cache
def sound(seconds: float, rate: int = RATE, channels: int = 1) -> dict[str, Any]:
    """An AUDIO of noise."""
    generator = torch.Generator().manual_seed(3)
    return {"waveform": torch.randn(1, channels, round(seconds * rate), generator=generator), "sample_rate": rate}


@functools.cache
def video(frames: int, seed: int = 0, width: int = SIZE, height: int = SIZE) -> Tensor:
    coarse = torch.rand(frames, 3, 3, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(height, width), mode="bilinear").movedim(1, -1).contiguous()


@functools.cache
def features(frames: int, seed: int = 0) -> dict[str, Any]:
    """An AUDIO_ENCODER_OUTPUT, without an encoder."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(1, frames, 1024, generator=generator) for _ in range(25)]
    return {"encoded_audio_all_layers": layers, "audio_samples": 320 * frames + 80}


def run(parts: dict[str, Any], **more: Any) -> Any:
    given = {"size": "width x height", "width": SIZE, "height": SIZE, "clip_frames": CLIP, "steps": STEPS}
    return call(NODE, **{**parts, "reference_image": picture(SIZE, SIZE), **given, **more})


# ---- the loop --------------------------------------------------------------------------------------------------------


def published_features(given: dict[str, Any], frames: int) -> Tensor:
    """``linear_interpolation`` and ``get_audio_embed_bucket_fps`` of ``wan/modules/s2v/audio_encoder.py``, m = 0."""
    stacked = torch.cat(given["encoded_audio_all_layers"])
    length = int(stacked.shape[1] / 50.0 * 30)
    at_rate = F.interpolate(stacked.transpose(1, 2), size=length, align_corners=True, mode="linear").transpose(1, 2)
    clips = int(length / (frames * (30 / 16))) + 1
    times = np.linspace(0, clips * frames / 16, clips * frames, endpoint=False)
    indices = np.round(times * 30).astype(int)
    zeros = torch.zeros(25, 1024)
    rows = [at_rate[:, i] if i < length else zeros for i in indices]
    return torch.stack(rows).to(torch.bfloat16).float().permute(1, 2, 0)[None]


def published(
    parts: dict[str, Any],
    given: dict[str, Any],
    clips: int,
    *,
    seed: int = 0,
    guidance: float = 4.5,
    pose: Tensor | None = None,
    from_reference: bool = False,
) -> Tensor:
    """The loop of ``wan/speech2video.py`` on the engine and core's VAE; frames [N, H, W, 3] in 0..1."""
    sampling, net = nodes_kit.module("wan_fp8.sampling"), parts["model"].model.diffusion_model
    vae, form = parts["vae"], parts["model"].get_model_object("latent_format")

    def encode(pixels_CTHW: Tensor) -> Tensor:
        return form.process_in(vae.encode((pixels_CTHW / 2 + 0.5).movedim(0, -1)))

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(form.process_out(latents))[0].movedim(-1, 0) * 2 - 1

    heard, out = published_features(given, CLIP), []
    reference = picture(SIZE, SIZE)[0].movedim(-1, 0).mul(255).round().div(255) * 2 - 1
    reference_latents = encode(reference[:, None])
    last = torch.zeros(3, 73, SIZE, SIZE)
    if from_reference:
        last[:, -6:] = reference[:, None]
    drop, motion = not from_reference, encode(last)
    if pose is not None:
        signed = pose.movedim(-1, 0) * 2 - 1
        signed = torch.cat([signed, -torch.ones(3, CLIP * clips - signed.shape[1], SIZE, SIZE)], dim=1)
    for r in range(clips):
        x = torch.randn(1, 16, CLIP // 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed + r))
        audio = heard[..., r * CLIP : (r + 1) * CLIP]
        told: dict[str, Any] = {"reference_latent": reference_latents}
        if not (drop and r == 0):
            told["reference_motion"] = motion
        if pose is not None:
            chunk = signed[:, r * CLIP : (r + 1) * CLIP]
            told["control_video"] = encode(torch.cat([chunk[:, :1], chunk], dim=1))[:, :, 1:]
        solver = sampling.UniPC(sampling.sigmas(STEPS, 3.0))
        for index, t in enumerate(sampling.timesteps(STEPS, 3.0)):
            v = net(x, t[None].float(), parts["positive"][0][0], audio_embed=audio, **told)
            if guidance != 1:
                u = net(x, t[None].float(), parts["negative"][0][0], audio_embed=0 * audio, **told)
                v = u + guidance * (v - u)
            x = solver.step(v, index, x)
        image = decode(torch.cat([reference_latents if drop and r == 0 else motion, x], dim=2))[:, -CLIP:]
        if drop and r == 0:
            image = image[:, 3:]
        overlap = min(73, image.shape[1])
        last = torch.cat([last[:, overlap:], image[:, -overlap:]], dim=1)
        motion = encode(last)
        out.append(image)
    return (torch.cat(out, dim=1) / 2 + 0.5).movedim(0, -1)


@pytest.mark.parametrize(
    "how",
    [{}, {"guidance": 1.0, "pose_video": True, "start_from_reference": True, "seed": 5}],
    ids=["plain", "pose, from the reference"],
)
def test_the_loop_is_the_published_one(parts: dict[str, Any], how: dict[str, Any]) -> None:
    given = features(44)  # 26 frames at 30 a second: 2 clips of 15 and one more would be 30
    how = {**how, "pose_video": video(11, 7)} if how.get("pose_video") else how
    output = run(parts, **how, audio_encoder=None, audio_features=given)
    images = output.args[0]
    expected = published(
        parts, given, 2, seed=how.get("seed", 0), guidance=how.get("guidance", 4.5), pose=how.get("pose_video"),
        from_reference=how.get("start_from_reference", False),
    )  # fmt: skip
    total = min(len(expected), 15)  # 14160 samples are 0.885 s: 15 frames of 16 a second
    assert images.shape == (total, SIZE, SIZE, 3)
    assert float((images - expected[:total]).abs().max()) < 5e-4
    assert output.args[1]["samples"].shape == (1, 16, 2, 8, 8)


def test_features_are_the_published_ones() -> None:
    encoder = nodes_kit.module("wan_fp8.models.audio_encoder")
    for frames, clip in ((2, 8), (9, 4), (44, 8), (134, 80), (251, 80), (500, 80)):
        given = features(frames)
        ours = encoder.on_video_frames(tuple(given["encoded_audio_all_layers"]), clip).float()
        expected = published_features(given, clip)
        assert ours.shape == expected.shape and torch.equal(ours, expected), (frames, clip)
        assert ours.shape[-1] == clip * encoder.clip_count(frames, clip)
    assert encoder.clip_count(251, 80) == 2, "a sound of exactly one clip (150 frames of 30) begins another one"


def test_core_makes_the_same_of_these_features() -> None:
    from comfy_extras.nodes_wan import get_audio_embed_bucket_fps, linear_interpolation

    given = features(60)
    theirs = linear_interpolation(torch.cat(given["encoded_audio_all_layers"]), 50, 30)
    bucket, clips = get_audio_embed_bucket_fps(theirs, fps=16, batch_frames=8, m=0, video_rate=30)
    ours = nodes_kit.module("wan_fp8.models.audio_encoder").on_video_frames(
        tuple(given["encoded_audio_all_layers"]), 8, torch.float32
    )
    assert clips == ours.shape[-1] // 8 and torch.equal(ours[0], bucket.permute(1, 2, 0))


def test_every_input_matters(parts: dict[str, Any]) -> None:
    small = {"audio_encoder": None, "audio_features": features(20), "guidance": 1.0}
    plain = run(parts, **small).args[0]
    assert torch.equal(run(parts, **small).args[0], plain)
    for change in (
        {"audio_features": features(20, 1)},
        {"reference_image": picture(SIZE, SIZE, 4)},
        {"pose_video": video(9, 3)},
        {"seed": 2},
        {"start_from_reference": True},
    ):
        assert float((run(parts, **{**small, **change}).args[0][:5] - plain[:5]).abs().max()) > 1e-4, change.keys()


def test_audio_is_encoded_once_a_clip(parts: dict[str, Any]) -> None:
    net, seen = parts["model"].model.diffusion_model, []
    hook = net.casual_audio_encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    try:
        run(parts, audio_encoder=None, audio_features=features(44), steps=3)
    finally:
        hook.remove()
    assert sum(seen) == 2 * 2, "cond and uncond of two clips, together or apart; not once a step"


# ---- sounds ----------------------------------------------------------------------------------------------------------


def test_layers_are_transformers(parts: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    """Normalised as by ``Wav2Vec2Processor``, all hidden states of ``Wav2Vec2Model``, convolutions in pieces."""
    from transformers import Wav2Vec2FeatureExtractor

    encoder = nodes_kit.module("wan_fp8.models.audio_encoder")
    loaded = encoder.load_audio_encoder(checkpoints["s2v"] / "wav2vec2-large-xlsr-53-english")
    wave = sound(0.5, 16_000)["waveform"][0, 0]
    prepare = Wav2Vec2FeatureExtractor(do_normalize=True)
    given = prepare(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    theirs = loaded.model(given, output_hidden_states=True)
    # Newer versions give the last one before the final norm; those that the published code asks for, after it.
    expected = [*theirs.hidden_states[:-1], theirs.last_hidden_state]
    for at_once in (1500, 7):
        encoder.FRAMES_AT_ONCE, before = at_once, encoder.FRAMES_AT_ONCE
        try:
            layers = loaded.encode(wave)
        finally:
            encoder.FRAMES_AT_ONCE = before
        assert len(layers) == len(expected) == 25
        for ours, wanted in zip(layers, expected, strict=True):
            assert ours.shape == wanted.shape and float((ours - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_resampling_is_torchaudios(rate: int) -> None:
    import torchaudio

    wave = sound(0.3, rate)["waveform"][0, 0]
    ours = nodes_kit.module("wan_fp8.models.audio_encoder").resampled(wave, rate)
    theirs = torchaudio.functional.resample(wave, rate, 16_000)
    assert ours.shape == theirs.shape and float((ours - theirs).norm() / theirs.norm()) < 5e-5


def test_a_sine_keeps_its_pitch_at_any_rate() -> None:
    resampled = nodes_kit.module("wan_fp8.models.audio_encoder").resampled
    for rate in (12_345, 44_099, 96_000):
        wave = torch.sin(2 * torch.pi * 440 * torch.arange(rate // 4, dtype=torch.float64) / rate).float()
        ours = resampled(wave, rate)
        expected = torch.sin(2 * torch.pi * 440 * torch.arange(len(ours), dtype=torch.float64) / 16_000).float()
        assert float((ours - expected)[200:-200].abs().max()) < 5e-3
    high = torch.sin(2 * torch.pi * 15_000 * torch.arange(12_000) / 48_000)
    assert float(resampled(high, 48_000)[100:-100].abs().max()) < 0.02, "above half of 16 kHz nothing is left"


def test_a_run_from_sound(parts: dict[str, Any]) -> None:
    """Mono and stereo, another rate, shorter than a clip; features by core's own node give the same."""
    from comfy_extras.nodes_audio_encoder import AudioEncoderEncode

    short = sound(0.2)
    output = run(parts, audio=short, guidance=1.0)
    assert output.args[0].shape[0] == 4 and "4 frames for 0.20 s of sound, 1 clip(s)" in output.ui.value
    stereo = {**short, "waveform": short["waveform"].expand(-1, 2, -1)}
    assert torch.equal(run(parts, audio=stereo, guidance=1.0).args[0], output.args[0])
    encoded = AudioEncoderEncode.execute(parts["audio_encoder"], short).args[0]
    again = run(parts, audio_encoder=None, audio_features=encoded, guidance=1.0).args[0]
    assert torch.equal(again, output.args[0])


def test_sounds_at_the_edges(parts: dict[str, Any]) -> None:
    encoder = parts["audio_encoder"]
    silence = encoder.encode_audio(torch.zeros(1, 1, 8000), 16_000)
    assert all(layer.isfinite().all() for layer in silence["encoded_audio_all_layers"])
    click = encoder.encode_audio(torch.ones(1, 1, 3), 8000)
    assert click["encoded_audio_all_layers"][0].shape == (1, 2, 1024), "filled up to two frames"
    count = nodes_kit.module("wan_fp8.models.audio_encoder").clip_count
    ten_minutes = (600 * 16_000 - 400) // 320 + 1
    assert count(ten_minutes) == 120
    clips = nodes_kit.module("wan_fp8.sampling").s2v_segments(120, length=9600)
    assert sum(s.frames for s in clips) == 9597, "three frames fewer than the sound: the first clip loses them"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"waveform": torch.zeros(1, 1, 0), "sample_rate": 16_000}, "the audio is empty"),
        ({"waveform": torch.full((1, 1, 900), torch.nan), "sample_rate": 16_000}, "no finite numbers"),
        ({"waveform": torch.zeros(1, 5, 900), "sample_rate": 16_000}, "one or two channels; got 5"),
        ({"waveform": torch.zeros(2, 1, 900), "sample_rate": 16_000}, "audio is one sound"),
        ({"waveform": torch.zeros(1, 1, 900), "sample_rate": 0}, "sample rate above 0; got 0"),
    ],
)
def test_sounds_that_cannot_be_heard(parts: dict[str, Any], given: dict[str, Any], words: str) -> None:
    assert words in refused(parts, audio=given)


# ---- bad inputs, and the run around it -------------------------------------------------------------------------------


def refused(parts: dict[str, Any], **more: Any) -> str:
    errors = nodes_kit.module("wan_fp8.errors")
    with pytest.raises(errors.WanFP8Error) as caught:
        run(parts, **more)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "'audio' is not connected"),
        ({"audio": sound(0.2), "audio_encoder": None}, "'audio_encoder' is not connected"),
        ({"audio_encoder": None}, "'audio' and 'audio_encoder' are not connected"),
        ({"audio": sound(0.2), "audio_features": features(9)}, "two sounds are connected"),
        ({"audio": sound(0.2), "audio_encoder": object()}, "audio_encoder takes an AUDIO_ENCODER"),
        ({"audio_features": {"x": 1}}, "what core's AudioEncoderEncode returns"),
        ({"audio_features": {"encoded_audio_all_layers": [torch.zeros(1, 9, 768)] * 13}}, "25 layers .*got 13 of"),
        ({"audio_features": features(9), "clip_frames": 10}, "a multiple of 4 frames; got 10: use 8"),
        ({"audio_features": features(9), "width": 48}, "64 pixels a side or more; got 48x64"),
        ({"audio_features": features(9), "width": 72}, "width must be a multiple of 16"),
        ({"audio_features": features(9), "size": "area"}, "size must be one of"),
        ({"audio_features": features(9), "reference_image": torch.zeros(2, 8, 8, 3)}, "one RGB picture"),
        ({"audio_features": features(9), "pose_video": torch.zeros(4, 8, 8, 2)}, "pose_video takes the frames"),
    ],
)
def test_bad_inputs_get_a_sentence(parts: dict[str, Any], change: dict[str, Any], words: str) -> None:
    assert re.search(words, refused(parts, **change))


def test_a_length_that_does_not_fit_is_said_before_the_run(parts: dict[str, Any]) -> None:
    long = {"waveform": torch.zeros(1, 1, 16_000).expand(1, 1, 16_000), "sample_rate": 0.5}
    message = refused(parts, audio=long, width=2048, height=2048)
    assert "frames of 2048x2048 pixels need" in message and "frames or fewer at once" in message


def test_clips_may_be_fewer_than_the_sound_has(parts: dict[str, Any]) -> None:
    output = run(parts, audio_features=features(44), audio_encoder=None, clips=1, guidance=1.0)
    assert output.args[0].shape[0] == CLIP - 3 and "the sound goes on after 1 clip(s)" in output.ui.value


def test_a_cancelled_run_leaves_what_it_made(parts: dict[str, Any], monkeypatch, tmp_path: Path) -> None:
    import av
    import comfy.model_management as management
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    net, calls = parts["model"].model.diffusion_model, []

    def count(*_: Any) -> None:
        calls.append(1)
        if len(calls) == STEPS + 1:
            management.interrupt_current_processing()
            management.throw_exception_if_processing_interrupted()

    hook = net.register_forward_pre_hook(count)
    try:
        with pytest.raises(management.InterruptProcessingException):
            run(parts, audio=sound(0.8), guidance=1.0)
    finally:
        hook.remove()
    (file,) = tmp_path.rglob("*.mp4")
    with av.open(str(file)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        assert sum(1 for _ in container.decode(video=0)) == CLIP - 3


def test_core_calls_it_too(parts: dict[str, Any]) -> None:
    """Core's own conditioning and KSampler on our MODEL: finite, and moved by the sound. Its values differ from core's
    transformer, whose audio and motion positions are not the published ones."""
    import bridge_kit
    from comfy_extras.nodes_wan import WanSoundImageToVideo

    made = []
    for seed in (0, 1):
        positive, negative, latent = WanSoundImageToVideo.execute(
            parts["positive"], parts["negative"], parts["vae"], SIZE, SIZE, 9, 1, ref_image=picture(SIZE, SIZE),
            audio_encoder_output=features(60, seed), ref_motion=video(5),
        ).args  # fmt: skip
        made.append(bridge_kit.ksample(parts["model"], latent, positive=positive, negative=negative, cfg=2.0))
    assert made[0].isfinite().all() and bridge_kit.distance(*made) > 1e-4


def test_core_s_model_is_run_by_our_transformer(parts: dict[str, Any]) -> None:
    """The same weights from core's loader, twelve injectors whatever the number of blocks."""
    import comfy.sd

    state = {k: v.clone() for k, v in parts["model"].model.diffusion_model.state_dict().items()}
    for j in range(1, 12):
        for name in [k for k in state if re.search(r"audio_injector\.\w+\.0\.", k)]:
            state.setdefault(name.replace(".0.", f".{j}.", 1), torch.zeros_like(state[name]))
    core = comfy.sd.load_diffusion_model_state_dict(state)
    assert type(core.model).__name__ == "WAN22_S2V"
    small = {"audio_encoder": None, "audio_features": features(20), "guidance": 1.0}
    ours, theirs = (run({**parts, "model": model}, **small).args[0] for model in (parts["model"], core))
    assert float((ours - theirs).abs().max()) < 1e-4
