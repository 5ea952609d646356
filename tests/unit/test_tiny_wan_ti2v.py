"""The tiny TI2V: the narrow Wan2.2 VAE's start and statistics, timesteps per latent frame, every stage once."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_tiny_wan import COMMAND, NARROW
from tiny_wan import package
from tiny_wan.autoencoder import _fold_statistics
from tiny_wan.data import encode_pool, make_pool
from tiny_wan.evaluate import SampleOptions, sample
from tiny_wan.loop import Budget
from tiny_wan.stages import plan
from tiny_wan.straight22 import straight_weights_22
from tiny_wan.text import full_rows, make_encoder, open_encoder
from tiny_wan.transformer import Stage, initial_weights, train_transformer, trainable, with_first_frame
from tiny_wan.world import WorldSize, draw

from wan_fp8 import load_text_encoder, load_transformer
from wan_fp8.models.specs import Task
from wan_fp8.models.vae import LATENTS_MEAN_22, LATENTS_STD_22, normalize_latents
from wan_fp8.models.vae22 import VAE22Spec, Wan22VAE, load_vae22

SIZE = WorldSize(width=64, height=64, frames=5)


@pytest.fixture(scope="module")
def vae() -> Wan22VAE:
    """As training begins with it."""
    net = Wan22VAE(VAE22Spec(encoder_dim=8, decoder_dim=8))
    straight_weights_22(net, seed=0)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def encoder() -> Any:
    return open_encoder(make_encoder(0), "cpu")


@pytest.fixture(scope="module")
def pool(vae: Wan22VAE, encoder: Any) -> Any:
    clips = make_pool(6, SIZE, seed=0, held_out=False, device=torch.device("cpu"))
    return encode_pool(clips, SIZE, vae, encoder, images=False)


def test_colours_and_frames_pass_through_an_untrained_vae(vae: Wan22VAE) -> None:
    """Each frame's colours come back, and look more like their own frame than like the one that ends their four."""
    size = WorldSize(width=96, height=96, frames=9)
    video = draw(make_pool(16, size, seed=1, held_out=True, device=torch.device("cpu")).clips, size)
    straight = straight_weights_22(copy.deepcopy(vae), seed=0)
    assert all(torch.equal(value, straight[name]) for name, value in vae.state_dict().items())
    with torch.no_grad():
        back = vae.decode(vae.encode(video))
    wanted, seen = (v - v.mean(1, keepdim=True) for v in (video, back))

    def alike(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    assert min(alike(wanted[:, :, f], seen[:, :, f]) for f in range(9)) > 0.25
    # What moved between the first and the last frame of a latent moves in the reconstruction too.
    moved, shown = (v[:, :, 8] - v[:, :, 5] for v in (wanted, seen))
    assert alike(moved, shown) > 0.15, alike(moved, shown)


def test_latents_get_the_published_statistics(vae: Wan22VAE) -> None:
    clips = make_pool(16, SIZE, seed=0, held_out=False, device=torch.device("cpu")).clips
    folded = copy.deepcopy(vae)
    _fold_statistics(folded, clips, SIZE)
    video = draw(clips, SIZE)
    with torch.no_grad():
        latents = folded.encode(video)
        std, mean = torch.std_mean(latents.transpose(0, 1).flatten(1), dim=1)
        torch.testing.assert_close(mean, torch.tensor(LATENTS_MEAN_22), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(std, torch.tensor(LATENTS_STD_22), rtol=1e-3, atol=1e-3)
        before = vae.decode(vae.encode(video))
        torch.testing.assert_close(folded.decode(latents), before, rtol=1e-3, atol=1e-3)


def test_the_first_latent_is_the_first_frame_alone(pool: Any, vae: Wan22VAE) -> None:
    """What training gives as the clean first frame is what sampling makes of the image by itself."""
    clips = make_pool(6, SIZE, seed=0, held_out=False, device=torch.device("cpu")).clips
    with torch.no_grad():
        alone = normalize_latents(vae.encode(draw(clips, SIZE)[:, :, :1]))
    torch.testing.assert_close(pool.latents_NCFHW[:, :, :1], alone, rtol=0, atol=1e-4)


def test_a_given_frame_is_clean_and_has_timestep_0() -> None:
    clean, x = torch.randn(3, 48, 2, 4, 4), torch.randn(3, 48, 2, 4, 4)
    given = torch.tensor([True, False, True])
    mixed, sigma = with_first_frame(x, torch.tensor([0.9, 0.5, 0.1]), clean, given)
    assert torch.equal(sigma, torch.tensor([[0.0, 0.9], [0.5, 0.5], [0.0, 0.1]]))
    assert torch.equal(mixed[given][:, :, 0], clean[given][:, :, 0]) and torch.equal(mixed[1], x[1])
    assert torch.equal(mixed[:, :, 1:], x[:, :, 1:])


def test_given_frames_are_not_learned_and_the_loss_falls(pool: Any) -> None:
    def trained(image: float, steps: int, clips: Any) -> Any:
        stage = Stage(
            name="ti2v", task=Task.TI2V, budget=Budget(steps=steps), low=0.0, high=1.0, image=image, rate=3e-3,
            warmup=5, batch=6, log_every=5,
        )  # fmt: skip
        return train_transformer(stage, NARROW, clips, seed=0)

    _, log = trained(0.5, 60, pool)
    assert log.losses[-1][2] < 0.8 * log.losses[0][2], log.losses
    # First frames of 100 would show in a loss that counts them: (noise - 100) squared.
    loud = pool.latents_NCFHW.clone()
    loud[:, :, 0] = 100.0
    spoiled = dataclasses.replace(pool, latents_NCFHW=loud)
    assert trained(1.0, 5, spoiled)[1].losses[0][2] < 20 < 1000 < trained(0.0, 5, spoiled)[1].losses[0][2]


def test_sampling_keeps_the_given_frame(encoder: Any) -> None:
    weights = initial_weights(NARROW.spec(Task.TI2V), 0)
    weights["head.head.weight"] = 0.1 * torch.randn(weights["head.head.weight"].shape)
    model = trainable(NARROW.spec(Task.TI2V), weights, torch.device("cpu")).requires_grad_(False)
    timesteps: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args: timesteps.append(args[1]))
    experts, first = dict.fromkeys(package.EXPERTS, model), torch.randn(2, 48, 1, 4, 4)
    rows, negative = full_rows(encoder, ["a red ball rises", "a blue star falls"]), full_rows(encoder, [""])
    given = sample(experts, rows, negative, SIZE, SampleOptions(steps=2), first=first)
    assert given.shape == (2, 48, 2, 4, 4) and torch.equal(given[:, :, :1], first)
    assert all(t.shape == (2, 2) and not t[:, 0].any() and t[:, 1].all() for t in timesteps)
    timesteps.clear()
    free = sample(experts, rows, negative, SIZE, SampleOptions(steps=2))
    assert torch.isfinite(free).all() and not torch.equal(free[:, :, 1], given[:, :, 1])
    assert all((t == t[0, 0]).all() for t in timesteps)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage, two steps each."""
    out = tmp_path_factory.mktemp("tiny_ti2v") / "out"
    command = [*COMMAND, "--out", str(out), "--minutes", "1", "--steps", "2", "--tasks", "ti2v"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_what_training_leaves(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        package.expert_file("ti2v"), package.VAE_FILE_22, package.TEXT_FILE, package.CARD_FILE, package.SHEET_FILE
    }  # fmt: skip
    card = json.loads((trained / package.CARD_FILE).read_text())
    assert set(card["stages"]) == {"vae22", "ti2v"} and all(s["steps"] == 2 for s in card["stages"].values())
    assert card["evaluation"]["ti2v_held_out"]["captions"] == 2
    assert card["evaluation"]["ti2v_image_trained"]["first_frame_psnr_db"] > 0
    assert card["files"] == package.file_facts(trained)


def test_the_folder_loads(trained: Path, tmp_path: Path) -> None:
    folder = package.assemble(trained, tmp_path / "Wan2.2-TI2V-5B-tiny", "ti2v", NARROW)
    model = load_transformer(folder)
    assert model.spec.task is Task.TI2V and model.spec.in_dim == model.spec.out_dim == 48
    stored = package.read_weights(trained / package.expert_file("ti2v"))
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert load_vae22(folder).spec == VAE22Spec(encoder_dim=16, decoder_dim=16)
    assert load_text_encoder(folder).encode("a red ball rolls to the right").shape == (1, 512, 4096)
    card = (folder / "README.md").read_text()
    assert all(facts["sha256"] in card for facts in package.file_facts(folder).values())
    assert "| vae22 |" in card and "| ti2v |" in card and "ti2v_image_held_out" in card
    data = {facts["data"] for facts in json.loads((trained / package.CARD_FILE).read_text())["stages"].values()}
    assert len(data) == 1 and f"| {data.pop()} |" in card, "both see the world drawn twice as large"
    with pytest.raises(ValueError, match="tasks are t2v, i2v, ti2v; got s2v"):
        package.assemble(trained, tmp_path / "other", "s2v", NARROW)


def test_ti2v_is_trained_when_asked_for(trained: Path, tmp_path: Path) -> None:
    fresh, onward = (SimpleNamespace(out=tmp_path, start_from=start) for start in (None, trained))
    assert plan("all", fresh, ["ti2v"]) == ["vae22", "ti2v"]  # type: ignore[arg-type]
    assert plan("vae", fresh, ["t2v", "ti2v"]) == ["vae", "vae22"]  # type: ignore[arg-type]
    every = plan("all", fresh, ["t2v", "i2v", "ti2v"])  # type: ignore[arg-type]
    assert every[:3] == ["vae", "vae22", "joint"] and every[-1] == "ti2v" and len(every) == 6
    assert not {"vae22", "ti2v"} & {*plan("all", fresh, ["t2v", "i2v"])}  # type: ignore[arg-type]
    assert plan("all", onward, ["ti2v"]) == ["ti2v"]  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {package.VAE_FILE_22}
    without = SimpleNamespace(out=tmp_path, start_from=tmp_path / "nothing")
    assert plan("all", without, ["ti2v"]) == ["vae22", "ti2v"]  # type: ignore[arg-type]
