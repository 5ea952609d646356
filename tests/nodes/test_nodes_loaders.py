"""The loader on every layout, through ComfyUI's model folders, and what it refuses before it takes memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import time
from pathlib import Path

import bridge_kit as kit
import nodes_kit
import pytest
import torch
from nodes_kit import PACK, call, latents
from safetensors.torch import load_file, save_file

sys.path.append(str(PACK / "scripts"))
from make_tiny_checkpoint import make_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("comfy_core", "inference")

NODE = "WanFP8LoadCheckpoint"


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """``made(task, layout, **more)``: a tiny checkpoint, written once. Read only: copy before changing."""
    base = tmp_path_factory.mktemp("checkpoints")

    def make(task, layout="official", **more):
        return make_tiny_checkpoint(base / "-".join([task, layout, *map(str, more.values())]), task, layout, **more)

    return make


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty ``models`` folder that ComfyUI looks in, and nowhere else."""
    import folder_paths

    nodes_kit.load_pack()
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for kind in ("wan", "diffusion_models", "text_encoders", "vae"):
        (tmp_path / kind).mkdir()
        extensions = set() if kind == "wan" else folder_paths.supported_pt_extensions
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], extensions))
    return tmp_path


def put(models, source, kind="wan", name=None):
    """Link a folder or file into one of the model folders; its name."""
    name = name or source.name
    (models / kind / name).parent.mkdir(parents=True, exist_ok=True)
    (models / kind / name).symlink_to(source)
    return name


def put_comfy(models, folder):
    """Link single files into their folders; the names of the transformers."""
    for file in sorted(folder.glob("*/*.safetensors")):
        put(models, file, file.parent.name)
    return sorted(f.name for f in (folder / "diffusion_models").glob("*.safetensors"))


def options(box):
    schema = nodes_kit.load_pack()[NODE].GET_SCHEMA()
    return next(i.options for i in schema.inputs if i.id == box)


def weights_of(model):
    return {k: v.detach() for k, v in model.model.diffusion_model.state_dict().items()}


def refused(error_name="CheckpointError", **inputs):
    errors = nodes_kit.module("wan_fp8.errors")
    with pytest.raises(getattr(errors, error_name)) as caught:
        call(NODE, **inputs)
    message = str(caught.value)
    assert "\n" not in message and 30 < len(message) < 600, message
    return message


# ---- what it finds -------------------------------------------------------------------------------------------------


def test_lists_folders_then_files(models, made):
    put(models, made("t2v"), name="org/Wan2.2-T2V-A14B")
    put(models, made("ti2v", "diffusers"), name="Wan2.2-TI2V-5B-Diffusers")
    files = put_comfy(models, made("i2v", "comfy"))
    assert options("checkpoint") == ["org/Wan2.2-T2V-A14B", "Wan2.2-TI2V-5B-Diffusers", *files]
    assert options("low_noise") == ["auto", "none", *options("checkpoint")]
    assert options("text_encoder") == ["from checkpoint", "umt5_xxl_tiny.safetensors"]
    assert options("vae") == ["from checkpoint", "wan_2.1_vae.safetensors"]


def test_an_empty_installation_says_what_to_do(models):
    only = options("checkpoint")
    assert len(only) == 1 and "models/wan" in only[0]
    assert "put an official or Diffusers Wan2.2 folder into" in refused(checkpoint=only[0])


def test_large_folders_list_quickly(models):
    for index in range(300):
        folder = models / "wan" / f"checkpoint-{index:03d}" / "high_noise_model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"in_dim": 16, "out_dim": 16}))
    for index in range(1000):
        (models / "diffusion_models" / f"{index}.safetensors").touch()
    options("checkpoint")
    start = time.perf_counter()
    assert len(options("checkpoint")) == 1300
    assert time.perf_counter() - start < 1


def test_models_wan_is_registered(monkeypatch, comfy_core):
    import folder_paths

    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folder_paths.folder_names_and_paths["wan"] = (["/somewhere/else"], set())
    sources = nodes_kit.module("nodes.sources")
    sources.register_model_folder()
    sources.register_model_folder()
    expected = ["/somewhere/else", os.path.join(folder_paths.models_dir, "wan")]
    assert folder_paths.get_folder_paths("wan") == expected, "extra model paths come first and stay"


# ---- what it loads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["official", "diffusers", "comfy"])
@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_every_layout_gives_the_same_models(models, made, task, layout):
    if layout == "comfy":
        name = put_comfy(models, made(task, layout))[0]
        inputs = {
            "text_encoder": "umt5_xxl_tiny.safetensors",
            "vae": "wan2.2_vae.safetensors" if task == "ti2v" else "wan_2.1_vae.safetensors",
        }
    else:
        name, inputs = put(models, made(task, layout)), {}
    high, low, encoder, vae, *_ = call(NODE, checkpoint=name, **inputs).args
    reference = {
        expert: load_file(made(task, "comfy") / "diffusion_models" / file)
        for expert, file in zip(
            ("high", "low"),
            sorted(f.name for f in (made(task, "comfy") / "diffusion_models").glob("*.safetensors")),
            strict=False,
        )
    }
    for model, expert in ((high, "high"), (low, "low")):
        loaded, expected = weights_of(model), reference.get(expert, reference["high"])
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[k], expected[k]) for k in expected)
    assert (high is low) == (task == "ti2v")
    rows = encoder.encode("a cat").rows
    assert rows.shape == (1, 512, high.model.diffusion_model.spec.text_dim)
    channels, stride = (48, 16) if task == "ti2v" else (16, 8)
    assert vae.latent_channels == channels
    assert vae.decode(torch.zeros(1, channels, 2, 2, 2)).shape == (1, 5, 2 * stride, 2 * stride, 3)


def test_what_it_loads_samples(models, made):
    name = put(models, made("t2v"))
    high, low, encoder, vae, *_ = call(NODE, checkpoint=name, weight_dtype="fp32").args
    positive, negative = call("WanFP8TextEncode", text_encoder=encoder, prompt="a cat").args
    common = dict(model=high, model_low=low, positive=positive, negative=negative, width=32, height=32, length=5)
    out = latents(call("WanFP8SampleT2V", **common, steps=4))
    assert out.shape == (1, 16, 2, 4, 4) and out.isfinite().all() and out.std() > 0
    assert vae.decode(out).shape == (1, 5, 32, 32, 3)


def test_the_same_video_as_from_cores_loader(models, made):
    import comfy.sd

    files = put_comfy(models, made("t2v", "comfy"))
    ours = call(NODE, checkpoint=files[0], weight_dtype="fp32").args[:2]
    theirs = [
        comfy.sd.load_diffusion_model(str(models / "diffusion_models" / f), {"dtype": torch.float32}) for f in files
    ]
    width = ours[0].model.diffusion_model.spec.text_dim
    text = {n: [[torch.randn(1, 512, width), {}]] for n in ("positive", "negative")}
    common = dict(**text, width=32, height=32, length=5, steps=3)
    results = [latents(call("WanFP8SampleT2V", model=m[0], model_low=m[1], **common)) for m in (ours, theirs)]
    assert kit.distance(*results) < 1e-5


def test_text_encoder_and_vae_are_read_when_first_used(models, made, monkeypatch):
    loaders = nodes_kit.module("nodes.loaders")
    reads = []
    for name in ("load_text_encoder", "load_vae_state_dict"):
        original = getattr(loaders, name)
        monkeypatch.setattr(
            loaders, name, lambda *a, _name=name, _original=original, **k: (reads.append(_name), _original(*a, **k))[1]
        )
    _, _, encoder, vae, *_ = call(NODE, checkpoint=put(models, made("t2v"))).args
    assert vae.get_ram_usage() == 0 and not encoder.loaded
    assert reads == []
    vae.decode(torch.zeros(1, 16, 1, 2, 2))
    vae.decode(torch.zeros(1, 16, 1, 2, 2))
    nodes_kit.module("nodes.encoder").CACHE.clear()
    encoder.encode("a dog")
    encoder.encode("two dogs")
    assert reads == ["load_vae_state_dict", "load_text_encoder"]


@pytest.mark.parametrize(
    "fp8, choice, stored",
    [
        (None, "auto", torch.bfloat16),
        (None, "bf16", torch.bfloat16),
        (None, "fp16", torch.float16),
        (None, "fp32", torch.float32),
        (None, "as stored", torch.float32),
        ("scaled_fp8", "auto", torch.float8_e4m3fn),
        ("comfy_quant", "as stored", torch.float8_e4m3fn),
        ("metadata", "bf16", torch.bfloat16),
    ],
)
def test_weight_dtypes(models, made, fp8, choice, stored):
    more = {"fp8": fp8} if fp8 else {"dtype": torch.float32}
    files = put_comfy(models, made("t2v", "comfy", **more))
    high = call(NODE, checkpoint=files[0], weight_dtype=choice).args[0]
    assert high.model.diffusion_model.blocks[0].ffn[0].weight.dtype is stored
    assert high.model.diffusion_model.blocks[0].modulation.dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert (high.model.diffusion_model.blocks[0].ffn[0].weight_scale is not None) == (stored is torch.float8_e4m3fn)


def test_the_partner_of_a_single_file(models, made):
    files = put_comfy(models, made("t2v", "comfy"))
    assert [("high" in f, "low" in f) for f in files] == [(True, False), (False, True)]
    for first in files:
        high, low = call(NODE, checkpoint=first).args[:2]
        expected = [load_file(models / "diffusion_models" / f)["blocks.0.ffn.0.bias"] for f in files]
        assert torch.equal(weights_of(high)["blocks.0.ffn.0.bias"], expected[0])
        assert torch.equal(weights_of(low)["blocks.0.ffn.0.bias"], expected[1])
    renamed = put(models, made("t2v", "comfy") / "diffusion_models" / files[1], "diffusion_models", "other.safetensors")
    explicit = call(NODE, checkpoint=files[0], low_noise=renamed).args[1]
    assert torch.equal(weights_of(explicit)["blocks.0.ffn.0.bias"], expected[1])


def test_the_line_says_what_was_found(models, made):
    files = put_comfy(models, made("t2v", "comfy", fp8="scaled_fp8"))
    shown = call(NODE, checkpoint=files[0]).ui.value
    assert files[0] in shown and files[1] in shown and "T2V" in shown and "scaled_fp8" in shown


def test_fingerprints_follow_the_files(models, made):
    cls = nodes_kit.load_pack()[NODE]
    folder = models / "wan" / "copy"
    shutil.copytree(made("t2v"), folder)
    boxes = dict(checkpoint="copy", low_noise="auto", text_encoder="from checkpoint", vae="from checkpoint")
    before = cls.fingerprint_inputs(**boxes, weight_dtype="bf16")
    assert cls.fingerprint_inputs(**boxes, weight_dtype="bf16") == before
    os.utime(next((folder / "low_noise_model").glob("*.safetensors")))
    after = cls.fingerprint_inputs(**boxes)
    assert after != before
    shutil.copy(made("t2v") / "Wan2.1_VAE.pth", models / "vae" / "new.pth")
    with_vae = cls.fingerprint_inputs(**{**boxes, "vae": "new.pth"})
    assert with_vae != after
    (models / "vae" / "new.pth").unlink()
    assert cls.fingerprint_inputs(**{**boxes, "vae": "new.pth"}) != with_vae, "a missing file is no error here"


# ---- what it refuses -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    """Reading a single weight fails the test."""
    loaders = nodes_kit.module("nodes.loaders")
    monkeypatch.setattr(loaders, "build_from", lambda *a, **k: pytest.fail("weights were read"))


def broken(models, made, change):
    """A copy of the comfy T2V pair whose high-noise file went through ``change(path)``; its name."""
    for file in (made("t2v", "comfy") / "diffusion_models").glob("*.safetensors"):
        shutil.copy(file, models / "diffusion_models" / file.name)
    name = next(f.name for f in (models / "diffusion_models").iterdir() if "high" in f.name)
    change(models / "diffusion_models" / name)
    return name


def with_tensors(*names, shape=(4, 4)):
    def change(path):
        path.unlink()
        save_file({name: torch.zeros(shape) for name in names}, path)

    return change


def pickled_code(path):
    path.unlink()
    torch.save({"weights": _Trap()}, path)


class _Trap:
    """Runs code when unpickled without care."""

    def __reduce__(self):
        return (Path.write_text, (Path(os.environ["WAN_FP8_TRAP"]), "sprung"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "truncated|shorter|ends|missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "header"),
        (lambda p: p.write_bytes(b"GGUF" + bytes(64)), "GGUF"),
        (lambda p: p.write_text("<html>404</html>"), "web page"),
        (with_tensors("diffusion_model.blocks.0.self_attn.q.lora_A.weight"), "is a LoRA.*LoRA loader"),
        (with_tensors("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"), "is a Flux transformer"),
    ],
)
def test_damaged_and_foreign_files(models, made, change, words):
    import re

    message = refused(checkpoint=broken(models, made, change))
    assert re.search(words, message), message


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    "extra, words",
    [
        ("vace_patch_embedding.weight", "VACE"),
        ("control_adapter.conv.weight", "Fun camera"),
        ("img_emb.proj.0.bias", "Wan2.1"),
    ],
)
def test_wan_models_of_other_kinds(models, made, extra, words):
    def change(path):
        weights = load_file(path)
        save_file({**weights, extra: torch.zeros(4, 4)}, path)

    assert words in refused(checkpoint=broken(models, made, change))


@pytest.mark.usefixtures("no_weights")
def test_a_pth_with_code_is_refused_not_run(models, made, tmp_path, monkeypatch):
    monkeypatch.setenv("WAN_FP8_TRAP", str(tmp_path / "sprung"))
    torch.save({"weights": _Trap()}, models / "diffusion_models" / "evil_high_noise.pth")
    message = refused(checkpoint="evil_high_noise.pth")
    assert "evil_high_noise.pth" in message and not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(_Trap()))
    assert (tmp_path / "sprung").exists(), "the trap itself works"


@pytest.mark.parametrize(
    ("task", "output", "words"),
    [("animate", 4, r"without a CLIP vision encoder: put clip_vision_h"), ("s2v", 5, r"without an audio encoder: put")],
)
def test_single_files_of_animate_and_s2v(models, made, task, output, words):
    """One MODEL on both outputs, core's own kind of shell, and a sentence where a file has no encoder."""
    files = put_comfy(models, made(task, "comfy"))
    out = call(NODE, checkpoint=files[0])
    high, low, _, vae, *senses = out.args
    assert low is high and type(high.model).__name__ == {"animate": "WAN22_Animate", "s2v": "WAN22_S2V"}[task]
    assert f"a Wan2.2 {task.upper()} transformer" in out.ui.value
    errors = nodes_kit.module("wan_fp8.errors")
    with pytest.raises(errors.InputError, match=words):
        _ = out.args[output].model
    with pytest.raises(errors.InputError, match="checkpoint, which has no"):
        _ = senses[5 - output].model
    with pytest.raises(errors.InputError, match=r"without a VAE.*models/vae"):
        vae.decode(torch.zeros(1, 16, 1, 2, 2))
    assert "leave" in refused(checkpoint=files[0], low_noise=files[0]) or "one model" in refused(
        checkpoint=files[0], low_noise=files[0]
    )


def test_folders_of_animate_and_s2v(models, made):
    """The encoders that see and hear are read when first used; a wrong file in their place is refused before."""
    bridge_module = nodes_kit.module("nodes.bridge")
    out = call(NODE, checkpoint=put(models, made("animate"), name="a"))
    assert "_pending" in vars(out.args[4]) and out.args[4].encode_image(torch.rand(1, 30, 40, 3)) is not None
    assert "_pending" not in vars(out.args[4]) and bridge_module.spec_of(out.args[0]).task == "animate"
    out = call(NODE, checkpoint=put(models, made("s2v"), name="s"))
    assert not out.args[5].loaded and out.ui.value.count("without") == 0
    for task, part in (("animate", "models_clip*"), ("s2v", "wav2vec2*/model.safetensors")):
        folder = models / "wan" / f"broken-{task}"
        folder.mkdir()
        for path in made(task).iterdir():
            (folder / path.name).symlink_to(path) if not path.name.startswith("wav2vec2") else shutil.copytree(
                path, folder / path.name
            )
        target = next(folder.glob(part))
        target.unlink()
        save_file({"x": torch.zeros(1)}, target)
        assert "and should be a" in refused(checkpoint=folder.name)


@pytest.mark.usefixtures("no_weights")
def test_the_high_noise_expert_alone(models, made):
    file = put(models, next((made("t2v", "comfy") / "diffusion_models").glob("*high*")), "diffusion_models")
    message = refused(checkpoint=file)
    assert file in message and "low_noise" in message and "'none'" in message
    folder = models / "wan" / "half"
    shutil.copytree(made("t2v"), folder)
    shutil.rmtree(folder / "low_noise_model")
    assert "no low_noise_model/" in refused(checkpoint="half")


def test_one_expert_on_purpose(models, made):
    name = put(models, made("t2v"))
    high, low, encoder, *_ = call(NODE, checkpoint=name, low_noise="none").args
    errors = nodes_kit.module("wan_fp8.errors")
    positive, negative = call("WanFP8TextEncode", text_encoder=encoder, prompt="").args
    common = dict(positive=positive, negative=negative, width=32, height=32, length=5, steps=2)
    with pytest.raises(errors.InputError, match="'low_noise' is 'none'"):
        call("WanFP8SampleT2V", model=high, model_low=low, **common)
    assert latents(call("WanFP8SampleT2V", model=high, model_low=low, boundary=0.0, **common)).isfinite().all()


@pytest.mark.usefixtures("no_weights")
def test_a_missing_shard(models, made):
    folder = models / "wan" / "copy"
    shutil.copytree(made("i2v"), folder)
    next((folder / "high_noise_model").glob("*-00002-of-*")).unlink()
    assert "00002-of" in refused(checkpoint="copy")


@pytest.mark.usefixtures("no_weights")
def test_experts_that_do_not_belong_together(models, made):
    t2v = put_comfy(models, made("t2v", "comfy"))
    i2v = [put(models, f, "diffusion_models") for f in sorted((made("i2v", "comfy") / "diffusion_models").iterdir())]
    assert "do not belong together" in refused(checkpoint=t2v[0], low_noise=i2v[1])
    assert "swapped" in refused(checkpoint=t2v[1], low_noise=t2v[0])
    assert "both files are the high-noise expert" in refused(checkpoint=t2v[0], low_noise=t2v[0])
    ti2v = put(models, next((made("ti2v", "comfy") / "diffusion_models").iterdir()), "diffusion_models")
    assert "one model" in refused(checkpoint=ti2v, low_noise=t2v[1])
    folder = put(models, made("t2v"))
    assert "brings both experts" in refused("InputError", checkpoint=folder, low_noise=t2v[1])


@pytest.mark.usefixtures("no_weights")
def test_the_wrong_vae_or_text_encoder(models, made):
    name = put(models, made("t2v"))
    put_comfy(models, made("ti2v", "comfy"))
    assert "Wan2.1 VAE" in refused(checkpoint=name, vae="wan2.2_vae.safetensors")
    put(models, models / "vae" / "wan2.2_vae.safetensors", "text_encoders", "oops.safetensors")
    assert "is the Wan2.2 VAE" in refused(checkpoint=name, text_encoder="oops.safetensors")
    put(models, models / "text_encoders" / "umt5_xxl_tiny.safetensors", "vae", "oops.safetensors")
    assert "is a UMT5 text encoder" in refused(checkpoint=name, vae="oops.safetensors")
    wide = load_file(models / "text_encoders" / "umt5_xxl_tiny.safetensors")
    table = "shared.weight"
    save_file({**wide, table: torch.zeros(16, 96)}, models / "text_encoders" / "wide.safetensors")
    assert "width 96" in refused(checkpoint=name, text_encoder="wide.safetensors")


def test_parts_that_a_single_file_does_not_bring(models, made):
    files = put_comfy(models, made("t2v", "comfy"))
    _, _, encoder, vae, *_ = call(NODE, checkpoint=files[0]).args
    errors = nodes_kit.module("wan_fp8.errors")
    with pytest.raises(errors.InputError, match=r"without a text encoder.*models/text_encoders"):
        call("WanFP8TextEncode", text_encoder=encoder, prompt="")
    with pytest.raises(errors.InputError, match=r"without a VAE.*models/vae"):
        vae.decode(torch.zeros(1, 16, 1, 2, 2))


@pytest.mark.usefixtures("no_weights")
def test_names_that_lead_elsewhere(models, made, tmp_path):
    shutil.copytree(made("t2v"), tmp_path / "outside")
    for name in ("../outside", str(tmp_path / "outside"), "", "gone.safetensors"):
        assert "no file" in refused(checkpoint=name)
    name = put(models, made("t2v"))
    for box in ("weight_dtype", "text_encoder_dtype", "vae_dtype"):
        message = refused("InputError", checkpoint=name, **{box: "fp4"})
        assert message.startswith(f"{box} must be one of") and "bf16" in message and "'fp4'" in message


def test_a_folder_that_lacks_a_part(models, made):
    folder = models / "wan" / "copy"
    shutil.copytree(made("t2v"), folder)
    (folder / "Wan2.1_VAE.pth").unlink()
    shutil.copy(made("ti2v") / "Wan2.2_VAE.pth", folder)
    for file in folder.glob("models_t5*"):
        file.unlink()
    out = call(NODE, checkpoint="copy")
    errors, (_, _, encoder, vae, *_) = nodes_kit.module("wan_fp8.errors"), out.args
    words = r"copy has no Wan2\.1_VAE\.pth and Wan2\.2_VAE\.pth is the VAE of other models.*models/vae.*under 'vae'"
    with pytest.raises(errors.InputError, match=words):
        vae.decode(torch.zeros(1, 16, 1, 2, 2))
    with pytest.raises(errors.InputError, match=r"has no text encoder: models_t5.*models/text_encoders"):
        call("WanFP8TextEncode", text_encoder=encoder, prompt="")
    assert "is the VAE of other models" in out.ui.value, "said before somebody samples for an hour"


def test_the_loader_marks_the_experts(models, made):
    expert_of = nodes_kit.module("nodes.bridge").expert_of
    files = put_comfy(models, made("t2v", "comfy"))
    folder = put(models, made("t2v"))
    for name in (folder, files[0]):
        assert [expert_of(m) for m in call(NODE, checkpoint=name).args[:2]] == ["high_noise", "low_noise"]
    alone = [call(NODE, checkpoint=name, low_noise="none").args[0] for name in files]
    assert [expert_of(m) for m in alone] == ["high_noise", "low_noise"]
    assert expert_of(call(NODE, checkpoint=put(models, made("ti2v"), name="5b")).args[0]) is None


def test_an_official_encoder_finds_the_tokenizer_of_the_checkpoint(models, made):
    folder = models / "wan" / "copy"
    shutil.copytree(made("t2v"), folder)
    given = next(folder.glob("models_t5*.pth"))
    shutil.move(given, models / "text_encoders" / given.name)
    boxes = {"checkpoint": "copy", "text_encoder": given.name}
    cache = nodes_kit.module("nodes.encoder").CACHE
    cache.clear()
    for kept in (1, 1, 2):
        if kept == 2:  # another tokenizer makes other rows
            for file in (folder / "google" / "umt5-xxl").iterdir():
                os.utime(file, (1, 1))
        assert call(NODE, **boxes).args[2].encode("a cat").rows.shape[1] == 512
        assert len(cache) == kept
    shutil.rmtree(folder / "google")
    errors = nodes_kit.module("wan_fp8.errors")
    with pytest.raises(errors.CheckpointError, match=r"no tokenizer.*google/umt5-xxl.*\.safetensors"):
        call(NODE, **boxes).args[2].encode("a cat")
    cls = nodes_kit.load_pack()[NODE]
    before = cls.fingerprint_inputs(**boxes)
    shutil.copytree(made("t2v") / "google", models / "text_encoders" / "google")
    assert cls.fingerprint_inputs(**boxes) != before, "a tokenizer beside the encoder counts"
