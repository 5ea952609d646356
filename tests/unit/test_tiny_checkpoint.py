"""Tiny checkpoints load wherever real ones do: in the engine, in transformers and Diffusers, and in core ComfyUI."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from wan_fp8 import sampling
from wan_fp8.models.specs import I2V_A14B, SPECS, T2V_A14B, TI2V_5B, ModelSpec, Task
from wan_fp8.models.text_encoder import load_text_encoder
from wan_fp8.models.tokenizer import clean_prompt, load_tokenizer
from wan_fp8.models.wan import build_model

PACK = Path(__file__).resolve().parents[2]
sys.path.append(str(PACK / "scripts"))

import make_tiny_checkpoint as script  # noqa: E402
from tiny_checkpoint import extended, text, transformer, vae  # noqa: E402

TASKS = ("t2v", "i2v", "ti2v")
PUBLISHED = {"t2v": T2V_A14B, "i2v": I2V_A14B, "ti2v": TI2V_5B}
PUBLISHED_VAES = {
    "2.1": vae.VaeSize(version="2.1", encoder_dim=96, decoder_dim=96, latent_channels=16, image_channels=3),
    "2.2": vae.VaeSize(version="2.2", encoder_dim=160, decoder_dim=256, latent_channels=48, image_channels=12),
}
TINY_VAES = {"2.1": vae.VAE_21, "2.2": vae.VAE_22}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``made(task, layout, **more)``: the folder of that checkpoint, written once."""
    base = tmp_path_factory.mktemp("tiny")

    def make(task: str, layout: str, **more: Any) -> Path:
        name = "-".join([task, layout, *(str(value) for value in more.values())])
        return script.make_tiny_checkpoint(base / name, task, layout, **more)

    return make


def tiny_spec(task: str) -> ModelSpec:
    size = transformer.SIZES[task]
    return replace(
        PUBLISHED[task], dim=size.dim, ffn_dim=size.ffn_dim, num_heads=size.num_heads, num_layers=size.num_layers
    )


def shards(folder: Path) -> dict[str, Tensor]:
    """All tensors of an indexed folder, each from the file that the index names."""
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert sum(map(len, files.values())) == len(index["weight_map"])
    return {key: files[file][key] for key, file in index["weight_map"].items()}


def shapes_of(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("task", TASKS)
def test_transformer_shapes_are_the_engines(task: str) -> None:
    published = PUBLISHED[task]
    big = transformer.TransformerSize(
        in_dim=published.in_dim,
        out_dim=published.out_dim,
        dim=published.dim,
        ffn_dim=published.ffn_dim,
        num_layers=published.num_layers,
    )
    for spec, size in ((tiny_spec(task), transformer.SIZES[task]), (published, big)):
        with torch.device("meta"):
            assert shapes_of(build_model(spec).state_dict()) == transformer.shapes(size)
    assert len(transformer.shapes(big)) == {"t2v": 1095, "i2v": 1095, "ti2v": 825}[task]


@pytest.mark.parametrize("task", extended.CLASSES)
def test_further_shapes_are_the_engines(task: str) -> None:
    published = SPECS[f"{task}-14B"]
    tiny = transformer.SIZES[task]
    sizes = {
        tiny: replace(
            published, dim=tiny.dim, ffn_dim=tiny.ffn_dim, num_heads=tiny.num_heads, num_layers=tiny.num_layers
        ),
        replace(tiny, dim=5120, ffn_dim=13824, num_layers=40): published,
    }
    for size, spec in sizes.items():
        with torch.device("meta"):
            assert shapes_of(build_model(spec).state_dict()) == transformer.shapes(size) | extended.extras(task, size)


@pytest.mark.parametrize("task", TASKS)
def test_official_folder(made: Any, task: str) -> None:
    folder = made(task, "official")
    experts = ["."] if task == "ti2v" else ["high_noise_model", "low_noise_model"]
    for expert in experts:
        tensors = shards(folder / expert)
        assert shapes_of(tensors) == transformer.shapes(transformer.SIZES[task])
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
        assert len(list((folder / expert).glob("diffusion_pytorch_model-*-of-00002.safetensors"))) == 2
        config = json.loads((folder / expert / "config.json").read_text())
        assert (config["model_type"], config["in_dim"]) == (task, transformer.SIZES[task].in_dim)
    if task != "ti2v":
        high, low = (shards(folder / expert) for expert in experts)
        assert not torch.equal(high["head.head.weight"], low["head.head.weight"])
    t5 = torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    assert t5["token_embedding.weight"].dtype == torch.bfloat16
    version = "2.2" if task == "ti2v" else "2.1"
    weights = torch.load(folder / f"Wan{version}_VAE.pth", weights_only=True)
    assert shapes_of(weights) == vae.shapes(TINY_VAES[version])
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 40 * 2**20


def test_official_samples_are_finite_and_alive(made: Any) -> None:
    """Four guided steps through both experts: finite, near unit size, different by prompt and by frame."""
    folder = made("t2v", "official")
    models = {}
    for expert in ("high_noise", "low_noise"):
        with torch.device("meta"):
            models[expert] = build_model(tiny_spec("t2v"))
        weights = {name: tensor.float() for name, tensor in shards(folder / f"{expert}_model").items()}
        models[expert].load_state_dict(weights, assign=True, strict=True)
    encoder = load_text_encoder(
        torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True),
        tokenizer=folder / "google" / "umt5-xxl",
    )
    rows = encoder.encode(["a cat on a beach", "一只狐狸", sampling.NEGATIVE_PROMPT]).float()
    sigmas, timesteps = sampling.sigmas(4, 12.0), sampling.timesteps(4, 12.0)
    noise = torch.randn(1, *sampling.latent_shape(Task.T2V, 64, 64, 5), generator=torch.Generator().manual_seed(0))
    solver, x = sampling.UniPC(sigmas), noise
    with torch.no_grad():
        for step in sampling.plan_steps(timesteps, boundary=0.875, guidance=(3.0, 4.0)):
            model, t = models[str(step.expert)], torch.tensor([step.timestep])
            cond, uncond = model(x, t, rows[0:1]), model(x, t, rows[2:])
            x = solver.step(uncond + step.guidance * (cond - uncond), step.index, x)
        other = model(x, t, rows[1:2])
    assert {s.expert for s in sampling.plan_steps(timesteps, boundary=0.875, guidance=1.0)} == set(models)
    assert x.isfinite().all() and 0.2 < x.std() < 20
    assert x[:, :, 0].std() > 0.1 and not torch.allclose(x[:, :, 0], x[:, :, 1], atol=0.1)
    assert (model(x, t, rows[0:1]) - other).abs().mean() > 1e-3


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_vae_shapes_are_cores_and_diffusers(comfy_core: Path, version: str) -> None:
    import comfy.ldm.wan.vae
    import comfy.ldm.wan.vae2_2
    from diffusers import AutoencoderKLWan

    for size in (TINY_VAES[version], PUBLISHED_VAES[version]):
        shared = {
            "dim": size.encoder_dim,
            "z_dim": size.latent_channels,
            "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "attn_scales": [],
            "temperal_downsample": [False, True, True],
        }
        with torch.device("meta"):
            if version == "2.1":
                core = comfy.ldm.wan.vae.WanVAE(**shared)
            else:
                core = comfy.ldm.wan.vae2_2.WanVAE(**shared, dec_dim=size.decoder_dim)
            theirs = AutoencoderKLWan.from_config(vae.diffusers_config(size))
        shapes = vae.shapes(size)
        assert shapes_of(core.state_dict()) == shapes
        renamed = {vae.diffusers_name(name, size): shape for name, shape in shapes.items()}
        assert shapes_of(theirs.state_dict()) == renamed


@pytest.mark.parametrize("task", ["t2v", "ti2v"])
def test_vae_names_mean_the_same_in_core_and_diffusers(comfy_core: Path, made: Any, task: str) -> None:
    import comfy.ldm.wan.vae
    import comfy.ldm.wan.vae2_2
    from diffusers import AutoencoderKLWan

    size = vae.VAE_22 if task == "ti2v" else vae.VAE_21
    shared = {"z_dim": size.latent_channels, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    shared |= {"dim": size.encoder_dim, "temperal_downsample": [False, True, True]}
    if task == "ti2v":
        core = comfy.ldm.wan.vae2_2.WanVAE(**shared, dec_dim=size.decoder_dim).eval()
    else:
        core = comfy.ldm.wan.vae.WanVAE(**shared).eval()
    core.load_state_dict(torch.load(made(task, "official") / f"Wan{size.version}_VAE.pth", weights_only=True))
    theirs = AutoencoderKLWan.from_pretrained(made(task, "diffusers") / "vae").eval()
    latents = torch.randn(1, size.latent_channels, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = theirs.decode(latents).sample
        torch.testing.assert_close(decoded, core.decode(latents).clamp(-1, 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            theirs.encode(decoded).latent_dist.mode(), core.encode(decoded), rtol=1e-3, atol=1e-3
        )
    assert decoded.shape[2] == 5
    assert decoded.isfinite().all() and decoded.std() > 0.05
    assert (decoded[:, :, 1:] - decoded[:, :, :-1]).abs().mean() > 1e-3


@pytest.mark.parametrize("task", TASKS)
def test_diffusers_transformers(made: Any, task: str) -> None:
    from diffusers import WanTransformer3DModel

    folder, official = made(task, "diffusers"), made(task, "official")
    parts = {"transformer": "."} if task == "ti2v" else {}
    parts = parts or {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
    for part, expert in parts.items():
        config = WanTransformer3DModel.load_config(folder / part)
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(config)
        stored = shards(folder / part)
        model.load_state_dict(stored, strict=True, assign=True)
        same_tensors(stored, {transformer.diffusers_name(k): v for k, v in shards(official / expert).items()})


def test_diffusers_index_names_parts_that_are_there(made: Any) -> None:
    from diffusers import UniPCMultistepScheduler

    for task in TASKS:
        folder = made(task, "diffusers")
        index = json.loads((folder / "model_index.json").read_text())
        parts = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
        assert parts == {p.name for p in folder.iterdir() if p.is_dir()}
        assert index["boundary_ratio"] == {"t2v": 0.875, "i2v": 0.9, "ti2v": None}[task]
        assert index.get("expand_timesteps", False) == (task == "ti2v")
        scheduler = UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
        assert scheduler.config.flow_shift == sampling.DEFAULTS[Task(task)].shift


def test_i2v_diffusers_folder_names_its_pipeline(made: Any) -> None:
    folder = made("i2v", "diffusers")
    index = json.loads((folder / "model_index.json").read_text())
    assert (index["_class_name"], index["boundary_ratio"]) == ("WanImageToVideoPipeline", 0.9)
    assert json.loads((folder / "transformer" / "config.json").read_text())["in_channels"] == 36


def test_text_encoder_is_the_same_in_every_layout(made: Any) -> None:
    from transformers import UMT5EncoderModel

    official, diffusers, comfy = (made("t2v", layout) for layout in ("official", "diffusers", "comfy"))
    first = load_text_encoder(official)
    third = load_text_encoder(comfy / "text_encoders" / "umt5_xxl_tiny.safetensors")
    for source in (official, official / "models_t5_umt5-xxl-enc-bf16.pth", diffusers, diffusers / "text_encoder"):
        found = load_text_encoder(source)  # with the tokenizer that lies beside it
        assert torch.equal(found.encode("a cat"), third.encode("a cat")), source
    prompt = "Two cats box on a stage, 两只猫 🐈"
    assert first.tokenize(prompt) == third.tokenize(prompt)
    rows = first.encode_prompt(prompt)
    assert rows.shape[1] == 4096 and rows.isfinite().all() and rows.float().std() > 0.1
    assert torch.equal(rows, third.encode_prompt(prompt))
    theirs = UMT5EncoderModel.from_pretrained(
        diffusers / "text_encoder", dtype=torch.bfloat16, attn_implementation="eager"
    )
    ids = torch.tensor([first.tokenize(prompt).ids])
    with torch.no_grad():
        expected = theirs(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(rows, expected.to(rows.dtype), rtol=2e-2, atol=2e-2)  # transformers keeps `wo` in fp32


def test_tokenizer_files_agree_and_cover_any_text(made: Any) -> None:
    import sentencepiece
    from transformers import AutoTokenizer, T5TokenizerFast

    folder = made("t2v", "official") / "google" / "umt5-xxl"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"), add_eos=True)
    automatic, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert (automatic.pad_token_id, automatic.eos_token_id, automatic.unk_token_id) == (0, 1, 2)
    samples = [
        "A white cat, wearing sunglasses!",
        "一只戴着墨镜的白猫",
        "Ελληνικά, кириллица, العربية, 日本語, 한국어",
        "emoji 🐈‍⬛🎬 and \u0301 marks",
        "tab\tand  spaces",
        "",
    ]
    for sample in samples:
        cleaned = " ".join(sample.split())
        ids = reference.encode(cleaned)
        assert ids[-1] == 1 and 2 not in ids, sample
        assert automatic(cleaned).input_ids == ids
        assert ours.ids(cleaned) == ids
        assert reference.decode(ids) == cleaned
        assert max(ids) < text.vocab_rows((folder / "spiece.model").read_bytes())
    padded = automatic(["a cat"], padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    assert padded.input_ids.shape == (1, 512) and padded.input_ids[0, -1] == 0
    assert T5TokenizerFast.from_pretrained(folder)("a cat").input_ids == reference.encode("a cat")


@pytest.fixture(scope="module")
def both_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same tokenizer from its two files."""
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    text.write_tokenizer(folder, text.train_sentencepiece())
    return load_tokenizer(folder / "tokenizer.json"), load_tokenizer(folder / "spiece.model")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
@example("🐈‍⬛ \u0301 <pad")
def test_both_tokenizer_files_give_any_text_the_same_known_ids(both_tokenizers: tuple[Any, Any], raw: str) -> None:
    cleaned = clean_prompt(raw)
    # Only tokenizer.json reads a spelled-out special or byte token as that token, as the published code does.
    assume(not any(token in cleaned for token in ("<pad>", "</s>", "<unk>", "<0x")))
    as_json, as_spiece = (tokenizer.ids(cleaned) for tokenizer in both_tokenizers)
    assert as_json == as_spiece
    assert as_json[-1] == 1 and 2 not in as_json


@pytest.mark.parametrize("task", TASKS)
def test_comfy_files_load_in_core(comfy_core: Path, made: Any, task: str) -> None:
    import comfy.sd

    folder = made(task, "comfy")
    official = made(task, "official")
    for path in sorted((folder / "diffusion_models").iterdir()):
        stored = load_file(path)
        patcher = comfy.sd.load_diffusion_model_state_dict(dict(stored))
        model = patcher.model
        assert type(model).__name__ == ("WAN22" if task == "ti2v" else "WAN21")
        assert model.diffusion_model.dim == transformer.SIZES[task].dim
        loaded = model.diffusion_model.state_dict()
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name].to(stored[name].dtype), stored[name]) for name in stored)
        expert = "." if task == "ti2v" else "high_noise_model" if "high" in path.name else "low_noise_model"
        same_tensors(stored, shards(official / expert))


def test_comfy_vae_loads_in_core(comfy_core: Path, made: Any) -> None:
    import comfy.sd

    core = comfy.sd.VAE(sd=load_file(made("t2v", "comfy") / "vae" / "wan_2.1_vae.safetensors"), dtype=torch.float32)
    assert core.latent_channels == 16
    pixels = core.decode(torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert pixels.shape == (1, 5, 32, 32, 3)
    assert pixels.isfinite().all() and 0.02 < pixels.std() < 0.5
    assert core.encode(pixels[0]).shape == (1, 16, 2, 4, 4)


def test_file_names_tell_the_experts_apart(made: Any) -> None:
    names = [p.name for p in sorted((made("i2v", "comfy") / "diffusion_models").iterdir())]
    assert names == [f"wan2.2_i2v_{expert}_noise_14B_tiny.safetensors" for expert in ("high", "low")]
    assert [p.name for p in (made("ti2v", "comfy") / "diffusion_models").iterdir()] == [
        "wan2.2_ti2v_5B_tiny.safetensors"
    ]


@pytest.mark.parametrize("fp8", transformer.FP8_FORMATS)
def test_fp8_files(comfy_core: Path, made: Any, fp8: str) -> None:
    import comfy.sd

    path = made("t2v", "comfy", fp8=fp8) / "diffusion_models" / "wan2.2_t2v_high_noise_14B_tiny.safetensors"
    plain = shards(made("t2v", "official") / "high_noise_model")
    stored = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    suffix = "scale_weight" if fp8 == "scaled_fp8" else "weight_scale"
    quantised = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn} - {"scaled_fp8"}
    assert quantised == {
        n for n, t in plain.items() if n.startswith("blocks.") and n.endswith("weight") and t.ndim == 2
    }
    for name in quantised:
        value = stored[name].float() * stored[name.removesuffix("weight") + suffix]
        assert ((value - plain[name].float()).norm() / plain[name].float().norm()) < 0.04
    assert ("scaled_fp8" in stored) == (fp8 == "scaled_fp8")
    assert ("_quantization_metadata" in metadata) == (fp8 == "metadata")
    if fp8 == "comfy_quant":  # newer than the core that the tests run on
        layer = bytes(stored["blocks.0.ffn.0.comfy_quant"].tolist()).decode()
        assert json.loads(layer) == {"format": "float8_e4m3fn"}
        return
    patcher = comfy.sd.load_diffusion_model_state_dict(dict(stored), metadata=metadata)
    layer = patcher.model.diffusion_model.blocks[0].ffn[0]
    x = torch.randn(3, layer.weight.shape[1])
    expected = torch.nn.functional.linear(
        x, plain["blocks.0.ffn.0.weight"].float(), plain["blocks.0.ffn.0.bias"].float()
    )
    with torch.inference_mode():
        result = layer(x).float()
    assert ((result - expected).norm() / expected.norm()) < 0.06


def test_same_arguments_write_the_same_tensors(tmp_path: Path, made: Any) -> None:
    first = made("ti2v", "official")
    again = script.make_tiny_checkpoint(tmp_path / "again", "ti2v", "official")
    other = script.make_tiny_checkpoint(tmp_path / "other", "ti2v", "official", seed=1)
    same_tensors(shards(first), shards(again))
    for name in ("google/umt5-xxl/spiece.model", "google/umt5-xxl/tokenizer.json", "config.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.2_VAE.pth"):
        same_tensors(torch.load(first / name, weights_only=True), torch.load(again / name, weights_only=True))
    a, b = shards(first), shards(other)
    assert not torch.equal(a["blocks.0.ffn.0.weight"], b["blocks.0.ffn.0.weight"])


def test_a_finished_folder_is_left_alone_and_a_damaged_one_made_again(tmp_path: Path) -> None:
    folder = script.make_tiny_checkpoint(tmp_path / "x", "ti2v", "comfy")
    path = folder / "vae" / "wan2.2_vae.safetensors"
    stamp = path.stat().st_mtime_ns
    script.make_tiny_checkpoint(folder, "ti2v", "comfy")
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(b"cut short")
    script.make_tiny_checkpoint(folder, "ti2v", "comfy")
    assert shapes_of(load_file(path)) == vae.shapes(vae.VAE_22)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"holds mine\.safetensors, which this script did not write"):
        script.make_tiny_checkpoint(tmp_path)
    folder = script.make_tiny_checkpoint(tmp_path / "tiny", "ti2v", "comfy")
    (folder / "vae" / "mine.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"holds vae/mine\.safetensors"):
        script.make_tiny_checkpoint(folder, "t2v")
    assert (folder / "vae" / "mine.safetensors").read_bytes() == b"precious"


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        script.make_tiny_checkpoint(tmp_path / "x", "ti2v", "official")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "vace"}, "task must be one of t2v, i2v, ti2v, animate, s2v; got 'vace'"),
        ({"task": "s2v", "layout": "diffusers"}, "for the other tasks only; got 's2v'"),
        ({"layout": "gguf"}, "layout must be one of official, diffusers, comfy; got 'gguf'"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"dtype": torch.int8}, "dtype must be one of bfloat16, float16, float32; got torch.int8"),
        ({"fp8": "nvfp4", "layout": "comfy"}, "fp8 must be one of scaled_fp8, comfy_quant, metadata; got 'nvfp4'"),
        ({"fp8": "scaled_fp8"}, "in the comfy layout only; got the official layout"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script.make_tiny_checkpoint(tmp_path / "x", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path) -> None:
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(script.main)
    good = CliRunner().invoke(app, [str(tmp_path / "x"), "--task", "ti2v", "--layout", "comfy", "--dtype", "float32"])
    assert good.exit_code == 0, good.output
    assert "diffusion_models/wan2.2_ti2v_5B_tiny.safetensors" in good.output
    assert load_file(tmp_path / "x" / "diffusion_models" / "wan2.2_ti2v_5B_tiny.safetensors")[
        "head.modulation"
    ].dtype == (torch.float32)
    bad = CliRunner().invoke(app, [str(tmp_path / "y"), "--task", "vace"])
    assert bad.exit_code == 2 and not (tmp_path / "y").exists()


def test_neither_engine_nor_comfyui_is_imported() -> None:
    import subprocess

    code = (
        f"import sys; sys.path.insert(0, {str(PACK / 'scripts')!r})\n"
        "import make_tiny_checkpoint\n"
        "print([m for m in ('wan_fp8', 'comfy', 'transformers', 'diffusers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
