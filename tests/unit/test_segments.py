"""Segments of Animate and clips of S2V: which frames each makes, masks, sizes and framing, against the published loops
written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_fp8 import sampling
from wan_fp8.errors import InputError
from wan_fp8.sampling.framing import centre_crop, inner_size

# ---- Animate ---------------------------------------------------------------------------------------------------------


def published_segments(real: int, clip: int, overlap: int) -> list[tuple[list[int], int]]:
    """``get_valid_len``, ``inputs_padding`` and the loop of ``wan/animate.py``: frames that each run is driven by, and
    how many it takes over."""
    rest = (real - overlap) % (clip - overlap)
    target = real + (clip - overlap - rest if rest else 0)
    frames, at, flip = [], 0, False
    while len(frames) < target:
        frames.append(at)
        at += -1 if flip else 1
        if at in (0, real - 1):
            flip = not flip
    runs, start = [], 0
    while start + overlap < len(frames):
        runs.append((frames[start : start + clip], overlap if start else 0))
        start += clip - overlap
    return runs


@given(real=st.integers(6, 400), clip=st.sampled_from([9, 49, 77, 81]), overlap=st.sampled_from([1, 5]))
@settings(deadline=None)
def test_segments_are_the_published_ones(real: int, clip: int, overlap: int) -> None:
    ours = sampling.animate_segments(real, clip, overlap)
    driven = [[sampling.reflected(s.start + k, real) for k in range(clip)] for s in ours]
    assert [(frames, s.known) for frames, s in zip(driven, ours, strict=True)] == published_segments(
        real, clip, overlap
    )
    shown = [s.start + k for s in ours for k in range(s.kept.start, s.kept.stop)]
    assert shown == list(range(real)), "every frame of the video is made once"


def test_segments_at_the_edges() -> None:
    (only,) = sampling.animate_segments(1)
    assert (only.start, only.known, only.kept) == (0, 0, slice(0, 1))
    assert len(sampling.animate_segments(77)) == 1 and len(sampling.animate_segments(78)) == 2
    assert [s.start for s in sampling.animate_segments(200, 77, 5)] == [0, 72, 144]
    assert [sampling.reflected(k, 1) for k in range(3)] == [0, 0, 0]
    assert [sampling.reflected(k, 3) for k in range(7)] == [0, 1, 2, 1, 0, 1, 2]
    for arguments, words in (
        ((100, 78, 1), "frames must be 4n"),
        ((100, 77, 3), "overlap must be 1 or 5"),
        ((100, 5, 5), "less than a segment of 5"),
        ((0, 77, 1), "1 frame or more"),
    ):
        with pytest.raises(InputError, match=words):
            sampling.animate_segments(*arguments)


@pytest.mark.parametrize("known", [0, 1, 5])
@pytest.mark.parametrize("replace", [False, True])
def test_mask_channels(known: int, replace: bool) -> None:
    """``get_i2v_mask`` and what is concatenated before it, with loops in place of views."""
    character = torch.rand(9, 32, 48, generator=torch.Generator().manual_seed(0)).round()
    mask = sampling.animate_mask(9, known, 4, 6, 1 - character if replace else None)
    assert mask.shape == (4, 4, 4, 6) and bool((mask[:, 0] == 1).all()), "the reference is given"
    for latent in range(3):
        for channel in range(4):
            frame = 0 if latent == 0 else 4 * latent - 3 + channel
            for y, x in ((0, 0), (3, 5), (2, 1)):
                given = 1.0 if frame < known else 1 - float(character[frame, 8 * y, 8 * x]) if replace else 0.0
                assert mask[channel, latent + 1, y, x] == given


def test_letterbox() -> None:
    """By opencv's convention of pixel centres, which torch's bilinear filter shares."""
    image = torch.rand(1, 3, 40, 80, generator=torch.Generator().manual_seed(0))
    boxed = sampling.letterbox(image, 64, 64, mode="bilinear")
    assert inner_size(80, 40, 64, 64) == (64, 32)
    assert bool((boxed[:, :, :16] == 0).all()) and bool((boxed[:, :, 48:] == 0).all())
    y, x = 5, 7  # by hand
    at = [max(0.0, (place + 0.5) * 80 / 64 - 0.5) for place in (y, x)]
    (y0, fy), (x0, fx) = ((int(place), place % 1) for place in at)
    corners = image[0, :, y0 : y0 + 2, x0 : x0 + 2]
    expected = torch.einsum("cyx,y,x->c", corners, torch.tensor([1 - fy, fy]), torch.tensor([1 - fx, fx]))
    assert torch.allclose(boxed[0, :, 16 + y, x], expected, atol=1e-6)
    tall = sampling.letterbox(torch.ones(1, 1, 50, 20), 64, 48, mode="nearest")
    assert inner_size(20, 50, 64, 48) == (19, 48) and float(tall.sum()) == 19 * 48
    assert bool((tall[0, 0, :, 22 : 22 + 19] == 1).all()), "int((64 - 19) / 2) = 22"
    assert sampling.letterbox(image, 80, 40) is image
    means = sampling.letterbox(image, 40, 20)
    assert torch.allclose(means, F.avg_pool2d(image, 2), atol=1e-6), "the mean of what falls into a pixel"


def test_face_crops() -> None:
    video = torch.rand(2, 3, 600, 800)
    faces = sampling.face_crops(video)
    assert faces.shape == (2, 3, 512, 512) and faces.min() >= -1 and faces.max() <= 1
    square = torch.rand(1, 3, 512, 512)
    assert torch.equal(sampling.face_crops(square), square * 2 - 1)
    assert bool((sampling.face_crops(torch.zeros(1, 3, 64, 64)) == -1).all()), "no face in view"


# ---- S2V -------------------------------------------------------------------------------------------------------------


def test_clips() -> None:
    """77 frames, then 80 each; the last one ends with the sound."""
    clips = sampling.s2v_segments(3)
    assert [(s.start, s.frames) for s in clips] == [(0, 77), (80, 80), (160, 80)]
    assert [s.kept for s in clips] == [slice(3, 80), slice(0, 80), slice(0, 80)]
    assert [s.frames for s in sampling.s2v_segments(3, drop=False)] == [80, 80, 80]
    assert [s.frames for s in sampling.s2v_segments(3, length=160)] == [77, 80, 3]
    assert [s.frames for s in sampling.s2v_segments(9, length=77)] == [77]
    assert [s.frames for s in sampling.s2v_segments(2, 48, length=10)] == [10]
    for arguments, words in (((1, 81), "multiple of 4"), ((0, 80), "one clip"), ((1, 0), "multiple of 4")):
        with pytest.raises(InputError, match=words):
            sampling.s2v_segments(*arguments)


@pytest.mark.parametrize("made", [20, 72, 73, 77, 80])
def test_frames_that_are_looked_back_at(made: int) -> None:
    before, frames = torch.arange(-73, 0), torch.arange(made)
    overlap = min(73, made)  # as published
    expected = torch.cat([before[overlap:], frames[-overlap:]])
    assert torch.equal(sampling.last_frames(before, frames), expected) and len(expected) == 73


@given(
    fps=st.sampled_from([8.0, 15.0, 16.0, 23.976, 24.0, 30.0, 60.0]),
    count=st.integers(1, 200),
    total=st.integers(1, 160),
)
@settings(deadline=None)
def test_pose_frames(fps: float, count: int, total: int) -> None:
    times = np.linspace(0, total / 16, total, endpoint=False)
    times = times[times < count / fps]
    expected = np.clip(np.rint(times * fps).astype(int), 0, count - 1)
    assert list(sampling.pose_frames(total, fps, count)) == expected.tolist()


def test_pose_frames_need_a_rate() -> None:
    with pytest.raises(InputError, match="frames per second"):
        list(sampling.pose_frames(3, math.nan, 3))


@pytest.mark.parametrize("size", [(1280, 704), (448, 832), (64, 64)])
@pytest.mark.parametrize("image", [(160, 90), (90, 160), (200, 133)])
def test_reference_framing_is_torchvisions(size: tuple[int, int], image: tuple[int, int]) -> None:
    from PIL import Image
    from torchvision import transforms

    pixels = torch.randint(0, 256, (3, image[1], image[0]), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy())
    resize, crop = transforms.Resize(min(size)), transforms.CenterCrop((size[1], size[0]))
    expected = transforms.ToTensor()(crop(resize(picture))) * 2 - 1
    assert torch.equal(sampling.s2v_reference(pixels / 255, *size), expected)
    video = (pixels / 255)[None]
    assert torch.allclose(sampling.s2v_pose(video, *size), crop(resize(video * 2 - 1)), atol=1e-5)
    odd = torch.rand(2, 7, 12)
    assert torch.equal(centre_crop(odd, 9, 10), transforms.CenterCrop((10, 9))(odd))


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "area", "size"),
    [
        ((1920, 1080), 1280 * 720, (1280, 704)),
        ((1920, 1080), 1024 * 704, (1088, 640)),
        ((1920, 1080), 832 * 480, (832, 448)),
        ((500, 500), 1280 * 720, (512, 512)),
        ((720, 1280), 1280 * 720, (704, 1280)),
    ],
)
def test_s2v_sizes(image: tuple[int, int], area: int, size: tuple[int, int]) -> None:
    """Executed: the published search gives these."""
    assert sampling.s2v_size(*image, area) == size


@pytest.mark.parametrize(
    ("video", "area", "size"),
    [
        ((1920, 1080), 1280 * 720, (1280, 720)),
        ((720, 1280), 832 * 480, (464, 832)),
        ((1000, 1000), 1280 * 720, (960, 960)),
        ((640, 480), 832 * 480, (720, 544)),
    ],
)
def test_animate_sizes(video: tuple[int, int], area: int, size: tuple[int, int]) -> None:
    assert sampling.animate_size(*video, area) == size
    with pytest.raises(InputError, match="no output size"):
        sampling.animate_size(10_000, 10, 10_000)
