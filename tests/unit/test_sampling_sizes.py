"""Output sizes, latent shapes, masks and image preparation of the image-to-video tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wan_fp8 import sampling
from wan_fp8.errors import InputError
from wan_fp8.models.specs import Task

AREA_720P, AREA_480P, AREA_TI2V = 1280 * 720, 832 * 480, 1280 * 704


def picture(width: int, height: int, seed: int = 0) -> torch.Tensor:
    """A smooth random picture as a loader gives it: [3, h, w], 8-bit values over 255."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return (smooth * 255).round() / 255


@pytest.mark.parametrize(
    ("image", "area", "expected"),
    [
        ((1920, 1080), AREA_720P, (1280, 720)),
        ((1920, 1080), AREA_480P, (832, 464)),
        ((1080, 1920), AREA_480P, (464, 832)),
        ((832, 480), AREA_480P, (832, 464)),  # 832 * 480 * (480 / 832) rounds below 480 squared, there as here
        ((1000, 1000), AREA_720P, (960, 960)),
        ((4000, 30), AREA_480P, (7296, 48)),
    ],
)
def test_i2v_size(image: tuple[int, int], area: int, expected: tuple[int, int]) -> None:
    assert sampling.i2v_size(*image, area) == expected
    assert expected[0] * expected[1] <= area


@pytest.mark.parametrize("seed", range(20))
def test_i2v_size_is_the_published_expression(seed: int) -> None:
    width, height = (int(v) for v in np.random.default_rng(seed).integers(200, 1500, 2))
    area = AREA_720P
    aspect = height / width
    lat_h = round(np.sqrt(area * aspect) // 8 // 2 * 2)
    lat_w = round(np.sqrt(area / aspect) // 8 // 2 * 2)
    assert sampling.i2v_size(width, height, area) == (lat_w * 8, lat_h * 8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((1920, 1080), (1248, 704)),
        ((1000, 1000), (960, 928)),
        ((1280, 704), (1280, 704)),
        ((704, 1280), (704, 1280)),
    ],
)
def test_ti2v_size(image: tuple[int, int], expected: tuple[int, int]) -> None:
    assert sampling.ti2v_size(*image, AREA_TI2V) == expected


@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([AREA_480P, AREA_720P, AREA_TI2V]))
def test_every_image_gets_an_allowed_size_near_its_aspect(width: int, height: int, area: int) -> None:
    for task, size_of in ((Task.I2V, sampling.i2v_size), (Task.TI2V, sampling.ti2v_size)):
        try:
            out_width, out_height = size_of(width, height, area)
        except InputError:
            assert max(width / height, height / width) > 300  # less than one token across
            continue
        sampling.check_size(task, out_width, out_height)
        assert out_width * out_height <= area
        # Each side is rounded down by less than one step of at most 32 pixels.
        ideal_width, ideal_height = (area * width / height) ** 0.5, (area * height / width) ** 0.5
        step = sampling.LAYOUTS[task].multiple
        slack = (1 + step / out_width) * (1 + step / out_height)
        assert ideal_width / slack <= out_width < ideal_width * slack
        assert ideal_height / slack <= out_height < ideal_height * slack


@pytest.mark.parametrize("size_of", [sampling.i2v_size, sampling.ti2v_size])
def test_images_without_an_output_size_are_refused(size_of: object) -> None:
    assert callable(size_of)
    with pytest.raises(InputError, match="an image of 100000x1 pixels has no output size within 921600 pixels"):
        size_of(100_000, 1, AREA_720P)
    with pytest.raises(InputError, match="at least one pixel"):
        size_of(0, 10, AREA_720P)


@pytest.mark.parametrize(
    ("task", "width", "height", "frames", "shape", "tokens"),
    [
        (Task.T2V, 832, 480, 81, (16, 21, 60, 104), 32_760),
        (Task.I2V, 1280, 720, 81, (16, 21, 90, 160), 75_600),
        (Task.TI2V, 832, 480, 81, (48, 21, 30, 52), 8_190),
        (Task.TI2V, 1280, 704, 121, (48, 31, 44, 80), 27_280),
        (Task.T2V, 16, 16, 1, (16, 1, 2, 2), 1),
    ],
)
def test_latent_shapes_and_tokens(
    task: Task, width: int, height: int, frames: int, shape: tuple[int, ...], tokens: int
) -> None:
    assert sampling.latent_shape(task, width, height, frames) == shape
    assert sampling.token_count(task, width, height, frames) == tokens


@pytest.mark.parametrize(
    ("task", "width", "height", "message"),
    [
        (Task.T2V, 833, 480, "width must be a multiple of 16 pixels for t2v; got 833, use 832 or 848"),
        (Task.I2V, 832, 470, "height must be a multiple of 16 pixels for i2v; got 470, use 464 or 480"),
        (Task.TI2V, 1280, 720, "height must be a multiple of 32 pixels for ti2v; got 720, use 704 or 736"),
        (Task.TI2V, 0, 704, "width must be a multiple of 32 pixels for ti2v; got 0, use 32"),
        (Task.T2V, -16, 480, "width must be a multiple of 16 pixels for t2v; got -16, use 16"),
    ],
)
def test_bad_sizes_are_refused_with_the_nearest(task: Task, width: int, height: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampling.check_size(task, width, height)


@pytest.mark.parametrize(("frames", "advice"), [(80, "77 or 81"), (2, "1 or 5"), (0, "1"), (-7, "1"), (82, "81 or 85")])
def test_bad_frame_counts_are_refused_with_the_nearest(frames: int, advice: str) -> None:
    with pytest.raises(InputError, match=rf"frames must be 4n \+ 1; got {frames}, use {advice}$"):
        sampling.check_frames(frames)


def published_i2v_mask(frames: int, lat_h: int, lat_w: int) -> torch.Tensor:
    """Written out element by element from the description of the layout."""
    mask = torch.zeros(4, (frames - 1) // 4 + 1, lat_h, lat_w)
    mask[:, 0] = 1
    return mask


@pytest.mark.parametrize("frames", [1, 5, 81])
def test_i2v_mask(frames: int) -> None:
    mask = sampling.i2v_mask(frames, 6, 4)
    assert mask.dtype == torch.float32
    assert torch.equal(mask, published_i2v_mask(frames, 6, 4))


def test_mask_channels_are_pixel_frames() -> None:
    """First and last frame given: all four channels of the first latent frame, the last channel of the last."""
    known = torch.zeros(13, dtype=torch.bool)
    known[[0, 12, 6]] = True
    mask = sampling.frame_mask(known, 2, 2)[:, :, 0, 0]
    expected = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 1]]).float()
    assert torch.equal(mask, expected)


def test_mask_of_a_wrong_frame_count_is_refused() -> None:
    with pytest.raises(InputError, match="frames must be 4n"):
        sampling.i2v_mask(80, 2, 2)


def test_i2v_condition_order() -> None:
    latents = torch.randn(16, 3, 4, 4)
    y = sampling.i2v_condition(sampling.i2v_mask(9, 4, 4), latents)
    assert y.shape == (20, 3, 4, 4)
    assert torch.equal(y[:4], published_i2v_mask(9, 4, 4))
    assert torch.equal(y[4:], latents)
    batched = sampling.i2v_condition(sampling.i2v_mask(9, 4, 4)[None], latents[None])
    assert torch.equal(batched[0], y)
    with pytest.raises(InputError, match="same frames, rows and columns"):
        sampling.i2v_condition(sampling.i2v_mask(5, 4, 4), latents)


def test_i2v_video_is_the_image_then_grey() -> None:
    image = torch.randn(3, 4, 6)
    clip = sampling.i2v_video(image, 9)
    assert clip.shape == (3, 9, 4, 6)
    assert torch.equal(clip[:, 0], image)
    assert not clip[:, 1:].any()


def test_stretch_image_is_bicubic_without_antialiasing() -> None:
    image = picture(90, 50)
    result = sampling.stretch_image(image, 48, 32)
    assert result.dtype == torch.float32
    expected = torch.nn.functional.interpolate(
        (image * 2 - 1)[None], size=(32, 48), mode="bicubic", align_corners=False, antialias=False
    )[0]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(
        result, torch.nn.functional.interpolate((image * 2 - 1)[None], size=(32, 48), mode="bicubic", antialias=True)[0]
    )


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (96, 96)])
def test_cover_crop_image_is_pillow_lanczos_and_centre_crop(size: tuple[int, int]) -> None:
    image, (width, height) = picture(90, 51), size
    pil = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    scale = max(width / 90, height / 51)
    pil = pil.resize((round(90 * scale), round(51 * scale)), Image.Resampling.LANCZOS)
    left, top = (pil.width - width) // 2, (pil.height - height) // 2
    array = np.asarray(pil)[top : top + height, left : left + width].astype(np.float32) / 255
    expected = torch.from_numpy(array).permute(2, 0, 1) * 2 - 1
    result = sampling.cover_crop_image(image, width, height)
    assert result.shape == (3, height, width)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_images_of_another_shape_are_refused() -> None:
    for prepare in (sampling.stretch_image, sampling.cover_crop_image):
        with pytest.raises(InputError, match=r"an image must be \[3, height, width\]; got \(4, 8, 8\)"):
            prepare(torch.zeros(4, 8, 8), 16, 16)


def test_ti2v_first_frame() -> None:
    mask = sampling.ti2v_mask(9, 4, 6)
    assert mask.shape == (3, 4, 6)
    assert not mask[0].any() and mask[1:].all()

    noise, image = torch.randn(2, 48, 3, 4, 6), torch.randn(48, 1, 4, 6)
    latents = sampling.impose_first_frame(noise, image)
    expected = (1 - mask) * image + mask * noise
    assert torch.equal(latents, expected)
    assert torch.equal(sampling.impose_first_frame(noise, image[None]), expected)
    with pytest.raises(InputError, match="Encode the image with the checkpoint's own VAE"):
        sampling.impose_first_frame(noise, torch.randn(16, 1, 8, 12))


def test_ti2v_timesteps_are_per_latent_frame() -> None:
    timestep = torch.tensor([999, 500])
    given = sampling.ti2v_timesteps(timestep, 9, first_frame_given=True)
    assert given.tolist() == [[0, 999, 999], [0, 500, 500]]
    free = sampling.ti2v_timesteps(timestep, 9, first_frame_given=False)
    assert free.tolist() == [[999] * 3, [500] * 3]
    assert timestep.tolist() == [999, 500]
