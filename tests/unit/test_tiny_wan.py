"""The tiny Wan2.2's training: the drawn world and its classifier, captions, gradients, every stage once."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_wan import package
from tiny_wan.autoencoder import _fold_statistics, measure_vae, psnr
from tiny_wan.captions import COLOURS, MOTIONS, SHAPES, Scene, caption, scenes, vocabulary
from tiny_wan.classify import classify
from tiny_wan.data import encode_pool, keep_latents, make_pool, read_latents
from tiny_wan.evaluate import SampleOptions, sample
from tiny_wan.loop import Budget
from tiny_wan.straight import straight_weights
from tiny_wan.text import SPIECE, full_rows, make_encoder, make_table, open_encoder
from tiny_wan.transformer import (
    PATCH,
    Stage,
    TransformerSize,
    draw_sigmas,
    initial_weights,
    train_transformer,
    trainable,
    velocity,
    without_image,
)
from tiny_wan.world import WorldSize, around_shapes, draw, make_clips

from wan_fp8 import load_text_encoder, load_transformer
from wan_fp8.models.specs import Task
from wan_fp8.models.vae import LATENTS_MEAN, LATENTS_STD, VAESpec, WanVAE, load_vae

PACK = Path(__file__).resolve().parent.parent.parent
SMALL = WorldSize(width=32, height=32, frames=5)
NARROW = TransformerSize(dim=128, ffn_dim=128, num_layers=1)


@pytest.fixture(scope="module")
def encoder() -> Any:
    return open_encoder(make_encoder(0), "cpu")


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    """Random weights, kept small."""
    torch.manual_seed(0)
    net = WanVAE(VAESpec(dim=8))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


# ---- the world, in pixels and in words -------------------------------------------------------------------------------


def test_a_fifth_is_held_out_and_every_pair_is_seen() -> None:
    assert len(COLOURS) >= 6 and len(SHAPES) >= 4 and len(MOTIONS) >= 8
    assert len(scenes(held_out=True)) * 5 == len(scenes())
    seen = scenes(held_out=False)
    for a, b in itertools.combinations(("colour", "shape", "motion"), 2):
        every = {(getattr(s, a), getattr(s, b)) for s in scenes()}
        assert {(getattr(s, a), getattr(s, b)) for s in seen} == every


def some_scenes() -> list[Scene]:
    """Every motion with every shape, colours in turn."""
    return [
        Scene((3 * shape + motion) % len(COLOURS), shape, motion)
        for shape in range(len(SHAPES))
        for motion in range(len(MOTIONS))
    ]


def test_the_classifier_sees_what_is_drawn() -> None:
    size, chosen = WorldSize(), some_scenes()
    video = draw(make_clips(chosen, [i % 3 for i in range(len(chosen))], size, seed=3), size)
    assert video.shape == (len(chosen), 3, 17, 64, 96) and video.min() >= -1 and video.max() <= 1
    right = [verdict.matches(scene, shape=True) for scene, verdict in zip(chosen, classify(video), strict=True)]
    assert sum(right) == len(chosen), [s.words for s, ok in zip(chosen, right, strict=True) if not ok]


def test_the_classifier_is_not_fooled() -> None:
    size = WorldSize()
    motions = ["right", "rise", "grow", "spin", "orbit", "bounce"]
    chosen = [Scene(0, 1, tuple(MOTIONS).index(name)) for name in motions]
    video = draw(make_clips(chosen, [0] * len(chosen), size, seed=0), size)
    assert [v.motion for v in classify(video)] == motions
    assert [v.motion for v in classify(video.flip(2))] == ["left", "fall", "shrink", "spin", "orbit", "bounce"]
    assert classify(video.flip(4)[:1])[0].motion == "left"
    frozen = video[:, :, :1].expand_as(video)
    assert {v.motion for v in classify(frozen)} == {None} and {v.colour for v in classify(frozen)} == {"red"}
    assert {v.colour for v in classify(video.flip(1))} == {"blue"}
    assert classify(torch.zeros_like(video[:1]))[0] == type(classify(video[:1])[0])(None, None, None)


def test_a_window_shows_a_piece_of_the_clip() -> None:
    """Every pixel of it, and the shape in every clip."""
    size, window = WorldSize(), WorldSize(width=24, height=40, frames=9)
    clips = make_clips(some_scenes(), [0] * len(some_scenes()), size, seed=0)
    clips.slope_N.zero_()  # the one thing that is laid out over the whole height
    seen = around_shapes(clips, size, window, torch.Generator().manual_seed(0))
    left = clips.wall_N - seen.wall_N
    first = next(f for f in range(9) if torch.allclose(clips.x_NT[:, f : f + 9] - left[:, None], seen.x_NT, atol=1e-4))
    top = (clips.y_NT[:, first] - seen.y_NT[:, 0]).round()
    pieces, whole = draw(seen, window), draw(clips, size)
    for i, (x, y) in enumerate(zip(left.int().tolist(), top.int().tolist(), strict=True)):
        expected = whole[i, :, first : first + 9, y : y + 40, x : x + 24]
        torch.testing.assert_close(pieces[i], expected, rtol=0, atol=1e-3)
    assert (pieces.amax(1) - pieces.amin(1)).amax((1, 2, 3)).min() > 0.3, "a piece without its shape"


def test_captions_hold_their_words_and_no_others() -> None:
    import random

    rng = random.Random(0)
    for scene in scenes():
        words = caption(scene, rng.choice([None, 0, 1, 2]), rng).lower().rstrip(".").split()
        colour, shape, _ = scene.words
        assert [w for w in words if w in COLOURS] == [colour]
        assert sum(w in names for w in words for names in SHAPES.values()) == 1
        assert any(w in SHAPES[shape] for w in words)


def test_every_word_is_one_token_in_both_tokenizers(encoder: Any, tmp_path: Path) -> None:
    from tiny_checkpoint.text import write_tokenizer

    from wan_fp8.models.tokenizer import load_tokenizer

    tensors = make_encoder(0)
    write_tokenizer(tmp_path / "t", bytes(tensors[package.SPIECE].tolist()))
    json_tokenizer = load_tokenizer(tmp_path / "t")
    captions = vocabulary()[::7]
    rows = encoder._table.shape[0]
    seen: dict[str, set[int]] = {}
    for text in captions:
        ids = encoder.tokenizer.ids(text)
        assert ids == json_tokenizer.ids(text) and max(ids) < rows and 2 not in ids
        words = text.rstrip(".").split()
        assert len(ids) == len(words) + text.endswith(".") + 1
        for word, token in zip(words, ids, strict=False):
            seen.setdefault(word, set()).add(token)
    assert all(len(tokens) == 1 for tokens in seen.values())
    assert len({token for tokens in seen.values() for token in tokens}) == len(seen)


# ---- the transformer learns ------------------------------------------------------------------------------------------


def random_model(spec: Any, seed: int = 0) -> Any:
    """A trainable model whose head does not answer zero."""
    weights = initial_weights(spec, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, value in weights.items():
        if name.startswith("head.head") or name.endswith("bias"):
            weights[name] = 0.05 * torch.randn(value.shape, generator=generator)
    return trainable(spec, weights, torch.device("cpu"))


@pytest.fixture(scope="module")
def pool(vae: WanVAE, encoder: Any) -> Any:
    clips = make_pool(6, SMALL, seed=0, held_out=False, device=torch.device("cpu"))
    return encode_pool(clips, SMALL, vae, encoder)


def test_short_text_rows_are_the_full_ones(pool: Any, encoder: Any) -> None:
    model = random_model(NARROW.spec(Task.T2V))
    captions = ["a red ball rises", "the pink box slides left on a white background", ""]
    table = make_table(encoder, captions)
    short = type(pool)(*(getattr(pool, f) if f != "table" else table for f in pool.__slots__))
    x = torch.randn(3, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        trained = velocity(model, short, x, sigma, torch.arange(3))
        sampled = model(x, 1000 * sigma, context=full_rows(encoder, captions))
        unpadded = model(x, 1000 * sigma, context=table.rows_NLD)
    torch.testing.assert_close(trained, sampled, rtol=1e-5, atol=1e-5)
    assert (unpadded - sampled).abs().max() > 1e-3, "the padding matters, so this test can fail"


def test_rows_are_the_text_encoders(encoder: Any) -> None:
    text = "a green star bounces"
    torch.testing.assert_close(full_rows(encoder, [text, "a red ball grows on a black background"])[:1].float(),
                               encoder.encode(text).float(), rtol=0.02, atol=0.02)  # fmt: skip


def test_gradients_are_those_of_the_forward() -> None:
    """Against a central difference in float64 along a random direction; every weight takes part."""
    model = random_model(NARROW.spec(Task.I2V)).double()
    model.compute_dtype_override = torch.float64
    generator = torch.Generator().manual_seed(2)

    def draw_like(shape: Any) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parameters = [p.requires_grad_(True) for p in model.parameters()]
    x, rows, wanted = draw_like((2, 36, 2, 4, 4)), draw_like((2, 5, 4096)), draw_like((2, 16, 2, 4, 4))
    timestep = torch.tensor([[0.0, 700.0], [0.0, 300.0]], dtype=torch.float64)

    def loss() -> torch.Tensor:
        from wan_fp8.models.blocks import ForwardOptions

        return (model(x, timestep, context=rows, options=ForwardOptions(cache_text=False)) - wanted).square().mean()

    loss().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    direction = [draw_like(p.shape) for p in parameters]
    expected = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True))
    values, step = [], 1e-6
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(parameters, direction, strict=True):
                p += sign * step * d
            values.append(float(loss()))
            for p, d in zip(parameters, direction, strict=True):
                p -= sign * step * d
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-5)


def test_noise_levels_stay_in_their_interval() -> None:
    stage = Stage(name="x", task=Task.T2V, budget=Budget(steps=1), low=0.855, high=1.0, image=0.0)
    sigma = draw_sigmas(2000, stage, torch.Generator().manual_seed(0))
    assert sigma.min() >= 0.855 and sigma.max() <= 1 and sigma.min() < 0.86 and sigma.max() > 0.99


def test_t2v_is_the_joint_model_without_an_image() -> None:
    weights = initial_weights(NARROW.spec(Task.I2V), 0)
    weights["head.head.weight"] = 0.1 * torch.randn(weights["head.head.weight"].shape)
    joint = trainable(NARROW.spec(Task.I2V), weights, torch.device("cpu"))
    alone = trainable(NARROW.spec(Task.T2V), without_image(weights), torch.device("cpu"))
    assert weights[PATCH].shape[1] == 36
    x, rows, t = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 8, 4096), torch.tensor([500])
    padded = torch.cat([x, torch.zeros(1, 20, 2, 4, 4)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(alone(x, t, context=rows), joint(padded, t, context=rows))


def test_the_loss_falls(pool: Any) -> None:
    stage = Stage(
        name="joint", task=Task.I2V, budget=Budget(steps=60), low=0.0, high=1.0, image=0.5, rate=3e-3, warmup=5,
        batch=6, log_every=10,
    )  # fmt: skip
    _, log = train_transformer(stage, NARROW, pool, seed=0)
    assert log.steps == 60 and log.losses[-1][2] < 0.7 * log.losses[0][2], log.losses


def test_colours_pass_through_an_untrained_vae() -> None:
    """How much of each pixel's colour comes back, with the weights training begins with and with random ones."""
    from tiny_checkpoint.weights import random_weights

    size = WorldSize(width=64, height=48, frames=5)
    video = draw(make_pool(12, size, seed=1, held_out=True, device=torch.device("cpu")).clips, size)
    net = WanVAE(VAESpec(dim=8))
    straight = straight_weights(net, seed=0)
    assert all(torch.equal(value, straight[name]) for name, value in net.state_dict().items())
    shapes = {name: tuple(value.shape) for name, value in straight.items()}
    random = random_weights(shapes, seed=0, part="vae", dtype=torch.float32)
    hue, seen = video - video.mean(1, keepdim=True), []
    for weights in (straight, random):
        net.load_state_dict(weights)
        with torch.no_grad():
            back = net.decode(net.encode(video))
        back = back - back.mean(1, keepdim=True)
        seen.append(float(torch.corrcoef(torch.stack([hue.flatten(), back.flatten()]))[0, 1]))
    assert seen[0] > 0.3 and abs(seen[1]) < 0.1, seen


SHIPPED = PACK / "checkpoints" / "Wan2.2-T2V-A14B-tiny"


def test_the_trained_vae_shows_what_it_was_given() -> None:
    """Clips of scenes that it never saw, of the size of the demo: all is still there to be measured."""
    card = package.read_card(SHIPPED)
    assert card["files"] == package.file_facts(SHIPPED)
    size, net = WorldSize(width=144, height=96), load_vae(SHIPPED / package.VAE_FILE)
    drawn = make_pool(12, size, seed=7, held_out=True, device=torch.device("cpu"))
    video = draw(drawn.clips, size)
    with torch.no_grad():
        seen = torch.cat([net.decode(net.encode(part)) for part in video.split(4)]).clamp(-1, 1)
    assert psnr(seen, video).mean() > card["stages"]["vae"]["held_out"]["psnr_db"] - 1
    shown = [(v, drawn.scenes[i]) for v, i in zip(classify(seen), drawn.scene_N.tolist(), strict=True)]
    right = [v.matches(scene) and v.shape == scene.words[1] for v, scene in shown]
    assert sum(right) >= 11, right


def test_latents_are_encoded_once(pool: Any, tmp_path: Path) -> None:
    path = tmp_path / "work" / "latents.pt"
    assert read_latents(path, "a", torch.device("cpu")) is None
    keep_latents(path, "a", pool)
    again = read_latents(path, "a", torch.device("cpu"))
    assert again is not None and torch.equal(again.latents_NCFHW, pool.latents_NCFHW)
    assert torch.equal(again.table.rows_NLD, pool.table.rows_NLD) and again.unconditional == pool.unconditional
    assert read_latents(path, "another VAE", torch.device("cpu")) is None


def test_without_i2v_no_first_frames_are_encoded(vae: WanVAE, encoder: Any) -> None:
    clips = make_pool(2, SMALL, seed=0, held_out=False, device=torch.device("cpu"))
    alone = encode_pool(clips, SMALL, vae, encoder, images=False)
    nothing = torch.zeros(2, dtype=torch.bool)
    assert alone.image_NCFHW is None and not alone.condition(torch.arange(2), nothing).any()
    with pytest.raises(AssertionError):
        alone.condition(torch.arange(2), ~nothing)


def test_latents_get_the_published_statistics(vae: WanVAE) -> None:
    import copy

    clips = make_pool(32, SMALL, seed=0, held_out=False, device=torch.device("cpu")).clips
    folded = copy.deepcopy(vae)
    _fold_statistics(folded, clips, SMALL)
    video = draw(clips, SMALL)
    with torch.no_grad():
        latents = folded.encode(video)
        std, mean = torch.std_mean(latents.transpose(0, 1).flatten(1), dim=1)
        torch.testing.assert_close(mean, torch.tensor(LATENTS_MEAN), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(std, torch.tensor(LATENTS_STD), rtol=1e-3, atol=1e-3)
        before = vae.decode(vae.encode(video))
        torch.testing.assert_close(folded.decode(latents), before, rtol=1e-3, atol=1e-4)
    assert abs(measure_vae(folded, clips, SMALL)["latent_std_largest"] - 1) < 0.01


# ---- the command line ------------------------------------------------------------------------------------------------

COMMAND = (
    sys.executable, str(PACK / "tools" / "tiny_wan" / "train.py"), "all", "--device", "cpu", "--clips", "3",
    "--batch", "3", "--vae-batch", "2", "--dim", "128", "--ffn-dim", "128", "--layers", "1", "--width", "32",
    "--height", "32", "--frames", "5", "--captions", "2", "--sample-steps", "2", "--log-every", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage, two steps each."""
    out = tmp_path_factory.mktemp("tiny_wan") / "out"
    command = [*COMMAND, "--out", str(out), "--minutes", "1", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_what_training_leaves(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        *(package.expert_file(task, expert) for task in package.TASKS for expert in package.EXPERTS),
        package.VAE_FILE, package.TEXT_FILE, package.CARD_FILE, package.SHEET_FILE,
    }  # fmt: skip
    card = json.loads((trained / package.CARD_FILE).read_text())
    assert set(card["stages"]) == {"vae", "joint", *package.EXPERTS}
    assert all(stage["steps"] == 2 and len(stage["losses"]) == 2 for stage in card["stages"].values())
    assert card["evaluation"]["t2v_held_out"]["captions"] == 2
    assert card["evaluation"]["i2v_trained"]["first_frame_psnr_db"] > 0
    assert card["files"] == package.file_facts(trained) and card["seed"] == 0


def test_the_folder_loads_everywhere(trained: Path, tmp_path: Path, comfy_core: Path) -> None:
    import comfy.sd

    for task, channels in package.IN_CHANNELS.items():
        folder = package.assemble(trained, tmp_path / f"Wan2.2-{task.upper()}-A14B-tiny", task, NARROW)
        for expert in package.EXPERTS:
            model = load_transformer(folder, expert)
            assert model.spec.task == task and model.spec.in_dim == channels and model.spec.num_heads == 1
            stored = package.read_weights(trained / package.expert_file(task, expert))
            assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
        card = (folder / "README.md").read_text()
        assert all(facts["sha256"] in card for facts in package.file_facts(folder).values())
        assert "`train.py all --device cpu" in card and "Apache-2.0" in card and str(trained) not in card
        encoder = load_text_encoder(folder)
        rows = encoder.encode("a red ball rolls to the right")
        assert rows.shape == (1, 512, 4096) and (rows[0].abs().sum(1) > 0).sum() == 8
    text = tmp_path / "Wan2.2-T2V-A14B-tiny"
    again = package.make_i2v(text, tmp_path / "again")
    for expert in package.EXPERTS:
        made, wanted = (load_transformer(each, expert) for each in (again, folder))
        assert made.spec == wanted.spec
        assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in made.state_dict().items())
    assert {p.relative_to(again) for p in again.rglob("*")} == {p.relative_to(folder) for p in folder.rglob("*")}
    assert package.read_encoder(text)[SPIECE].equal(package.read_encoder(trained)[SPIECE])  # type: ignore[index]
    with pytest.raises(ValueError, match="has no image_columns"):
        package.make_i2v(folder, tmp_path / "never")
    ours = load_vae(folder)
    core = comfy.sd.VAE(sd=package.read_weights(folder / package.VAE_FILE), dtype=torch.float32)
    video = draw(make_clips([Scene(0, 0, 0)], [0], SMALL, seed=0), SMALL)
    with torch.inference_mode():
        latents = ours.encode(video)
        theirs = core.encode((video[0].permute(1, 2, 3, 0) + 1) / 2)
        torch.testing.assert_close(theirs.cpu(), latents, rtol=1e-3, atol=1e-3)
        decoded = core.decode(latents).cpu()[0].permute(3, 0, 1, 2) * 2 - 1
        torch.testing.assert_close(decoded, ours.decode(latents).clamp(-1, 1)[0], rtol=1e-3, atol=1e-3)


def test_going_on_keeps_what_is_not_trained(trained: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from tiny_wan.stages import INTERVALS, plan

    fresh, onward = (SimpleNamespace(out=tmp_path, start_from=start) for start in (None, trained))
    assert plan("all", fresh, ["t2v", "i2v"]) == ["vae", "joint", *INTERVALS]  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert plan("all", onward, ["t2v"]) == [*INTERVALS]  # type: ignore[arg-type]
    kept = {package.VAE_FILE, *(package.expert_file("i2v", expert) for expert in package.EXPERTS)}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert all((tmp_path / name).read_bytes() == (trained / name).read_bytes() for name in kept)
    vae_alone = tmp_path / "vae"
    vae_alone.mkdir()
    (vae_alone / package.VAE_FILE).write_bytes((trained / package.VAE_FILE).read_bytes())
    begun = SimpleNamespace(out=tmp_path, start_from=vae_alone)
    assert plan("all", begun, ["i2v"]) == ["joint", *INTERVALS]  # type: ignore[arg-type]
    (vae_alone / package.VAE_FILE).unlink()
    assert plan("all", begun, ["i2v"]) == ["vae", "joint", *INTERVALS]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tasks are t2v, i2v, ti2v; got s2v"):
        plan("experts", fresh, ["s2v"])  # type: ignore[arg-type]


def test_a_kept_vae_stays_on_the_card(tmp_path: Path) -> None:
    from tiny_wan.stages import Run

    run = Run(
        out=tmp_path / "out", work=tmp_path / "work", device=torch.device("cpu"), seed=0, size=SMALL, model=NARROW,
        clips=3, batch=3, vae_batch=2, log_every=1, resume=False, start_from=SHIPPED, graphs=False, compile=False,
        dtype=torch.float32, tasks=("t2v",),
    )  # fmt: skip
    earlier = package.read_card(SHIPPED)["stages"]
    assert run.card["stages"] == {"vae": earlier["vae"]} and run.card["earlier"][-1]["stages"] == earlier


def test_a_first_frame_is_drawn(tmp_path: Path) -> None:
    from PIL import Image
    from tiny_wan.train import app
    from typer.testing import CliRunner

    path = tmp_path / "frame.png"
    words = ["draw", str(path), "--colour", "green", "--shape", "star", "--motion", "rise", "--width", "96"]
    assert CliRunner().invoke(app, [*words, "--height", "64", "--seed", "3"]).exit_code == 0
    picture = torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).view(64, 96, 3)
    scene = Scene(list(COLOURS).index("green"), list(SHAPES).index("star"), list(MOTIONS).index("rise"))
    clip = draw(make_clips([scene], [2], WorldSize(), seed=3), WorldSize())[0, :, 0].permute(1, 2, 0)
    assert (picture / 127.5 - 1 - clip).abs().max() < 0.005
    refused = CliRunner().invoke(app, [*words, "--background", "red"])
    assert refused.exit_code != 0 and "--background is one of black, grey, white; got red" in refused.output


def test_sampling_switches_experts_and_is_repeatable(encoder: Any) -> None:
    experts = {name: random_model(NARROW.spec(Task.T2V), seed) for seed, name in enumerate(package.EXPERTS)}
    calls: list[str] = []
    for name, model in experts.items():
        model.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    rows = full_rows(encoder, ["a red ball rises", "a blue star falls"])
    options = SampleOptions(steps=4)
    first = sample(experts, rows, full_rows(encoder, [""]), SMALL, options)
    assert calls == ["high_noise"] * 6 + ["low_noise"] * 2  # 999, 972, 923 | 800: cond and uncond each
    assert first.shape == (2, 16, 2, 4, 4) and torch.isfinite(first).all()
    assert torch.equal(first, sample(experts, rows, full_rows(encoder, [""]), SMALL, options))


def test_a_stopped_training_keeps_everything_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, "--out", str(out), "--minutes", "60"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("vae step 3 "):
                running.send_signal(signal.SIGTERM)
                break
        rest = running.stdout.read()
    assert running.returncode == 0 and "told to stop" in rest
    stopped = json.loads((out / package.CARD_FILE).read_text())["stages"]
    assert stopped["vae"]["steps"] >= 3 and stopped["joint"]["steps"] == 0
    assert len(list(out.glob("*.safetensors"))) == 6
    steps = stopped["vae"]["steps"] + 2
    again = [*COMMAND[:2], "vae", *COMMAND[3:], "--out", str(out), "--minutes", "60", "--steps", str(steps), "--resume"]
    done = subprocess.run(again, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    stage = json.loads((out / package.CARD_FILE).read_text())["stages"]["vae"]
    assert stage["steps"] == steps and len(stage["losses"]) == steps


def test_a_card_tells_of_no_folder_of_the_machine() -> None:
    from tiny_wan.stages import _command

    words = ["all", "--out", "/a/b", "--work=/c/d", "--minutes", "2", "--start-from=/e/Start", "--compile"]
    assert _command(words) == "all --minutes 2 --start-from Start --compile"
