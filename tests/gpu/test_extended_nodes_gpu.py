"""Sample Wan2.2 Animate and Speech to Video on a GPU, under core's memory management: the frames of a CPU, the same to
the bit when repeated, the GPU's noise, and memory that does not grow with the length.

Run in a process of its own: core decides at import whether there is a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nodes"))

from nodes_kit import call, picture
from test_nodes_gpu import core, inference, unload  # noqa: F401

BOXES = {"weight_dtype": "fp32", "text_encoder_dtype": "fp32", "vae_dtype": "fp32"}


def parts(checkpoints, task, **boxes):
    model, _, encoder, vae, clip_vision, audio_encoder = call(
        "WanFP8LoadCheckpoint", checkpoint=checkpoints[task].name, **{**BOXES, **boxes}
    ).args
    positive, negative = call("WanFP8TextEncode", text_encoder=encoder, prompt="a fox").args
    more = {"clip_vision": clip_vision} if task == "animate" else {"audio_encoder": audio_encoder}
    return {"model": model, "positive": positive, "negative": negative, "vae": vae, **more}


def animate(given, frames, **more):
    generator = torch.Generator().manual_seed(1)
    videos = {
        "pose_video": torch.rand(frames, 48, 64, 3, generator=generator),
        "face_video": torch.rand(frames, 128, 128, 3, generator=generator),
    }
    return call(
        "WanFP8SampleAnimate", **given, reference_image=picture(64, 48), **videos,
        **{"segment": 9, "overlap": 1, "steps": 2, **more},
    ).args[0]  # fmt: skip


def speak(given, seconds, **more):
    wave = torch.randn(1, 2, round(seconds * 22_050), generator=torch.Generator().manual_seed(1))
    sound = {"waveform": wave, "sample_rate": 22_050}
    small = {"size": "width x height", "width": 64, "height": 64, "clip_frames": 8, "steps": 2}
    return call("WanFP8SampleS2V", **given, reference_image=picture(64, 64), audio=sound, **{**small, **more}).args[0]


@pytest.mark.parametrize(("task", "make", "short", "long"), [("animate", animate, 9, 41), ("s2v", speak, 0.5, 2.5)])
def test_a_run_repeats_and_its_memory_is_flat(checkpoints, task, make, short, long):
    given = parts(checkpoints, task)
    first = make(given, short)
    assert first.isfinite().all() and torch.equal(make(given, short), first)
    peaks = []
    for length in (short, long):
        make(given, length)  # what is allocated once
        torch.cuda.reset_peak_memory_stats()
        make(given, length)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.2 * peaks[0], peaks
    noise = make(given, short, noise="cuda (published code)")
    assert noise.isfinite().all() and not torch.equal(noise, first)
    half = make(parts(checkpoints, task, weight_dtype="bf16"), short)
    error = float((half - first).norm() / first.norm())
    assert 1e-4 < error < 0.2, error
    before = unload()
    del given
    assert unload() <= before


def test_ten_minutes_of_sound(checkpoints):
    """30,000 frames through every layer at once, as published: no more than a few GB, since no attention is stored."""
    encoder = parts(checkpoints, "s2v")["audio_encoder"]
    wave = torch.randn(1, 1, 600 * 16_000, generator=torch.Generator().manual_seed(1))
    encoder.encode_audio(wave[..., :16_000], 16_000)
    torch.cuda.reset_peak_memory_stats()
    layers = encoder.encode_audio(wave, 16_000)["encoded_audio_all_layers"]
    assert len(layers) == 25 and layers[0].shape == (1, 29_999, 1024)
    assert all(bool(layer.isfinite().all()) for layer in layers)
    assert torch.cuda.max_memory_allocated() < 8 * 2**30
