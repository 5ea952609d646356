"""Files that nodes write: checkpoints that come back bit for bit, here and in core; FP8 files whose bytes survive every
route; activation scales with which runs begin."""

from __future__ import annotations

import errno
import json
import os

import bridge_kit as kit
import nodes_kit
import pytest
import torch
from nodes_kit import call
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("comfy_core")

NAMES = ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "rowwise", "MXFP8BlockScaling"]
SIZE = {"width": 32, "height": 32, "length": 5}
TEXT = {"positive": kit.prompt(1), "negative": kit.prompt(2)}


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield
    kit.unload_everything()


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty ``models`` folder that ComfyUI looks in, and nowhere else."""
    import folder_paths

    nodes_kit.load_pack()
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for kind in ("wan", "diffusion_models", "text_encoders", "vae", "wan_fp8_scales"):
        (tmp_path / kind).mkdir()
        extensions = folder_paths.supported_pt_extensions if kind != "wan" else set()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], extensions))
    return tmp_path


def loaded(name, weight_dtype="as stored"):
    return call("WanFP8LoadCheckpoint", checkpoint=name, low_noise="none", weight_dtype=weight_dtype).args[0]


def with_recipe(model, name, **more):
    return call("WanFP8Recipe", model=model, recipe=name, backend="reference", **more).args[0]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def error(name):
    return getattr(nodes_kit.module("wan_fp8.errors"), name)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_comes_back_bit_for_bit(models, name):
    fp8 = with_recipe(kit.core_model(), name)
    want = kit.ksample(fp8)
    out = call("WanFP8SaveCheckpoint", model=fp8, filename="mine/wan2.2_t2v_high_noise")
    path = models / "diffusion_models" / "mine" / "wan2.2_t2v_high_noise.safetensors"
    assert out.args == (str(path), "") and files(models) == [str(path.relative_to(models))]
    assert ("core's Load Diffusion Model" in out.ui.value) == (name in ("DelayedScaling", "Float8CurrentScaling"))
    kit.unload_everything()
    again = with_recipe(loaded("mine/wan2.2_t2v_high_noise.safetensors"), name)
    assert kit.same_bytes(kit.state_bytes(fp8), kit.state_bytes(again))
    again.model.manual_cast_dtype = None  # our loader computes FP8 in bf16; the first model was fp32
    assert torch.equal(kit.ksample(again), want)
    assert nodes_kit.module("nodes.bridge").rounded_again(again) == 0


def test_core_reads_what_its_format_allows(models):
    """Bytes and scales in core's own tensors, and latents within the error of FP8; other scales stop core's loader."""
    import comfy.sd

    exact = kit.ksample(kit.core_model())
    fp8 = with_recipe(kit.core_model(), "Float8CurrentScaling")
    path = call("WanFP8SaveCheckpoint", model=fp8, filename="wan2.2_t2v_high_noise").args[0]
    theirs = comfy.sd.load_diffusion_model(path)
    ours = fp8.model.diffusion_model
    for layer in ("blocks.0.self_attn.q", "blocks.1.ffn.2"):
        weight, held = theirs.model.diffusion_model.get_submodule(layer).weight, ours.get_submodule(layer)
        assert torch.equal(weight._qdata.view(torch.uint8), held.weight.view(torch.uint8))
        assert torch.equal(weight._layout_params["scale"], held.weight_scale)
    weight_only = kit.ksample(loaded("wan2.2_t2v_high_noise.safetensors"))
    assert 0.002 < kit.distance(kit.ksample(theirs), exact) < 0.06
    assert kit.distance(kit.ksample(theirs), weight_only) < 0.02
    assert kit.distance(kit.ksample(theirs), kit.ksample(fp8)) < 0.06
    forms = {"rowwise": "wan_fp8_row", "Float8BlockScaling": "wan_fp8_block_128", "MXFP8BlockScaling": "wan_fp8_mx_32"}
    for name, form in forms.items():
        path = call("WanFP8SaveCheckpoint", model=with_recipe(kit.core_model(), name), filename=name).args[0]
        with pytest.raises(KeyError, match=form):
            comfy.sd.load_diffusion_model(path)


@pytest.mark.parametrize("recipe", ["none", "rowwise"])
def test_loras_are_part_of_the_file_and_not_of_the_model(models, recipe):
    model = kit.core_model()
    lora = kit.core_lora(kit.lora_pairs(kit.core_weights()))
    lora["diffusion_model.blocks.0.modulation.diff"] = 0.1 * torch.ones(1, 6, 128)
    base = with_recipe(model, recipe) if recipe != "none" else nodes_kit.module("nodes.bridge").fork(model)
    before = kit.state_bytes(base)
    merged = kit.with_core_lora(base, lora)
    want = kit.ksample(merged)
    kit.unload_everything()
    call("WanFP8SaveCheckpoint", model=merged, filename="wan2.2_t2v_high_noise")
    assert torch.equal(kit.ksample(merged), want), "the MODEL works on"
    kit.unload_everything()
    assert kit.same_bytes(before, kit.state_bytes(base)), "and loses the LoRA as ever"
    again = loaded("wan2.2_t2v_high_noise.safetensors")
    if recipe != "none":
        again = with_recipe(again, recipe)
        again.model.manual_cast_dtype = None
    assert kit.distance(kit.ksample(again), want) < 1e-5


def test_a_pair_is_saved_and_found_as_one(models):
    high, low = (with_recipe(kit.core_model(seed=seed), "rowwise") for seed in (0, 1))
    out = call("WanFP8SaveCheckpoint", model=high, model_low=low, filename="mine_t2v.safetensors")
    names = ["mine_t2v_high_noise.safetensors", "mine_t2v_low_noise.safetensors"]
    assert [os.path.basename(path) for path in out.args] == names
    again = call("WanFP8LoadCheckpoint", checkpoint=names[0], weight_dtype="as stored").args[:2]
    bridge = nodes_kit.module("nodes.bridge")
    for saved, read, expert in zip((high, low), again, ("high_noise", "low_noise"), strict=True):
        assert bridge.expert_of(read) == expert
        assert kit.same_bytes(kit.state_bytes(saved), kit.state_bytes(read))
    same = call("WanFP8SaveCheckpoint", model=high, model_low=high, filename="one")
    assert same.args == (str(models / "diffusion_models" / "one.safetensors"), "")


def test_what_cannot_be_written_is_refused(models, monkeypatch):
    import comfy.model_management as management

    model, save = kit.core_model(), nodes_kit.module("wan_fp8.checkpoint.save")
    call("WanFP8SaveCheckpoint", model=model, filename="here")
    for inputs, words in (
        ({"filename": "here"}, r"here.safetensors exists already"),
        ({"filename": "../outside"}, r"'../outside' is no name for a file in models/diffusion_models"),
        ({"filename": "/elsewhere/x"}, r"no name for a file"),
        ({"filename": "  "}, r"no name for a file"),
    ):
        with pytest.raises(error("InputError"), match=words):
            call("WanFP8SaveCheckpoint", model=model, **inputs)
    call("WanFP8SaveCheckpoint", model=model, filename="here", overwrite=True)

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 200_000

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    with monkeypatch.context() as patched:
        patched.setattr(save, "open", lambda *args: Full(open(*args)), raising=False)  # noqa: SIM115
        with pytest.raises(error("InputError"), match=r"No space left.*nothing of it was left behind"):
            call("WanFP8SaveCheckpoint", model=model, filename="there")
    with monkeypatch.context() as patched:
        patched.setattr(management, "interrupt_processing", True)
        with pytest.raises(management.InterruptProcessingException):
            call("WanFP8SaveCheckpoint", model=model, filename="there")
    assert files(models) == ["diffusion_models/here.safetensors"]
    whole = (models / "diffusion_models" / "here.safetensors").read_bytes()
    (models / "diffusion_models" / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(error("CheckpointError"), match="is truncated"):
        loaded("half.safetensors")


def test_a_file_of_other_scales_is_used_and_named(models):
    call("WanFP8SaveCheckpoint", model=with_recipe(kit.core_model(), "rowwise"), filename="wan2.2_t2v_high")
    read = call("WanFP8LoadCheckpoint", checkpoint="wan2.2_t2v_high.safetensors", low_noise="none")
    assert "stored as wan_fp8" in read.ui.value and 'with the recipe {"name": "rowwise"' in read.ui.value
    model = read.args[0]
    out = call("WanFP8Recipe", model=model, recipe="DelayedScaling", backend="reference")
    assert "20 linears came in FP8 under scales that DelayedScaling cannot multiply" in out.ui.value
    same = call("WanFP8Recipe", model=model, recipe="rowwise", backend="reference")
    assert "second time" not in same.ui.value


def test_cores_own_saving_nodes_name_every_scale(models, tmp_path):
    import comfy.sd

    for name in NAMES:
        fp8 = with_recipe(kit.core_model(), name)
        comfy.sd.save_checkpoint(str(models / "diffusion_models" / f"{name}_high.safetensors"), fp8)
        kit.unload_everything()
        assert kit.same_bytes(kit.state_bytes(fp8), kit.state_bytes(loaded(f"{name}_high.safetensors"))), name


# ---- FP8 files of core ----------------------------------------------------------------------------------------------


def core_file(folder, form):
    """A file in one of core's FP8 formats, activation scales included; its weights and scales."""
    weights, scales = kit.to_fp8(kit.core_weights(dtype=torch.bfloat16))
    stored, metadata = dict(weights), {}
    for layer, scale in scales.items():
        old = form == "scaled_fp8"
        stored[f"{layer}.scale_weight" if old else f"{layer}.weight_scale"] = scale
        stored[f"{layer}.scale_input" if old else f"{layer}.input_scale"] = torch.tensor(0.7)
    if form == "scaled_fp8":
        stored["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    else:
        layers = {layer: {"format": "float8_e4m3fn"} for layer in scales}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    path = folder / "wan2.2_t2v_high_noise_fp8.safetensors"
    save_file(stored, path, metadata=metadata)
    return path, weights, scales


@pytest.mark.parametrize("route", ["ours", "core"])
@pytest.mark.parametrize("form", ["scaled_fp8", "quantization_metadata"])
@pytest.mark.parametrize("name", NAMES[:4])
def test_bytes_of_cores_fp8_files_reach_the_multiplication(models, monkeypatch, name, form, route):
    """By either loader, no weight is rounded again: what the GEMM is given is what the file holds."""
    import comfy.sd

    path, weights, scales = core_file(models / "diffusion_models", form)
    model = comfy.sd.load_diffusion_model(str(path)) if route == "core" else loaded(path.name, "auto")
    for place in ("wan_fp8.quant.convert", "wan_fp8.quant.linear", "wan_fp8.models.layers"):
        monkeypatch.setattr(nodes_kit.module(place), "quantize_weight", lambda *_, **__: pytest.fail("a cast"))
    fp8 = with_recipe(model, name)
    seen = {}
    linear = nodes_kit.module("wan_fp8.quant.linear")
    runner = linear.Quantization.runner

    def recorded(self, *args):
        multiply = runner(self, *args)

        class Recorder:
            quantize, __getattr__ = multiply.quantize, lambda _, attribute: getattr(multiply, attribute)

            def __call__(self, x, weight, scale, bias):
                seen[weight.data_ptr()] = (weight, scale)
                return multiply(x, weight, scale, bias)

        return Recorder()

    monkeypatch.setattr(linear.Quantization, "runner", recorded)
    assert kit.ksample(fp8, steps=1).isfinite().all()
    net = fp8.model.diffusion_model
    for layer, scale in scales.items():
        weight, used = seen[net.get_submodule(layer).weight.data_ptr()]
        assert torch.equal(weight.view(torch.uint8), weights[f"{layer}.weight"].view(torch.uint8)), layer
        assert (used == scale).all(), layer
    assert nodes_kit.module("nodes.bridge").rounded_again(fp8) == 0


# ---- activation scales ---------------------------------------------------------------------------------------------


def delayed(seeds=(0, 1), **more):
    """Two fresh experts with DelayedScaling."""
    high, low = (kit.core_model(seed=seed) for seed in seeds)
    given = dict(model=high, model_low=low, recipe="DelayedScaling", backend="reference")
    return call("WanFP8Recipe", **given, **more).args


def sample(pair, seed=7, **more):
    given = dict(model=pair[0], model_low=pair[1], **TEXT, **SIZE, steps=4, seed=seed)
    return call("WanFP8SampleT2V", **given, **more).args[0]


def scale_menu():
    boxes = nodes_kit.load_pack()["WanFP8Recipe"].GET_SCHEMA().inputs
    return next(box.options for box in boxes if box.id == "scales")


def test_scales_of_a_run_make_later_runs_equal(models, monkeypatch):
    import folder_paths

    first = delayed()
    made = sample(first)
    passed = call("WanFP8SaveScales", latent=made, model=first[0], model_low=first[1], filename="mine/t2v")
    assert passed.args[0] is made
    assert files(models) == [f"wan_fp8_scales/mine/t2v.{e}.safetensors" for e in ("high_noise", "low_noise")]
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert scale_menu() == ["none", "mine/t2v"], "two files, one name"

    results, multipliers = [], []
    for before in (None, 8, 9):
        pair = delayed(scales="mine/t2v")
        if before is not None:
            sample(pair, seed=before)  # another run first changes nothing
        results.append(sample(pair)["samples"])
        multipliers.append([m.model.diffusion_model.quantization.scales.multiplier.clone() for m in pair])
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(torch.equal(a, b) for a, b in zip(multipliers[0], multipliers[1], strict=True)), "frozen"
    for mine, saved in zip(first, multipliers[0], strict=True):
        assert torch.equal(mine.model.diffusion_model.quantization.scales.multiplier, saved), "each expert's own"
    assert not torch.equal(results[0], made["samples"]) and kit.distance(results[0], made["samples"]) < 0.1

    frozen = delayed(scales="mine/t2v")
    again = call("WanFP8Recipe", model=frozen[0], model_low=frozen[1], recipe="DelayedScaling", backend="reference")
    assert torch.equal(sample(again.args)["samples"], made["samples"]), "'none' begins uncalibrated again"


def test_scales_of_one_model(models):
    bridge = nodes_kit.module("nodes.bridge")
    model = call("WanFP8Recipe", model=kit.core_model("ti2v"), recipe="DelayedScaling", backend="reference").args[0]
    kit.ksample(model)
    call("WanFP8SaveScales", latent={}, model=model, filename="5b")
    assert files(models) == ["wan_fp8_scales/5b.safetensors"]
    out = call("WanFP8Recipe", model=kit.core_model("ti2v"), recipe="DelayedScaling", backend="reference", scales="5b")
    assert "activation scales of 5b.safetensors, frozen" in out.ui.value
    twice = [kit.ksample(out.args[0]) for _ in range(2)]
    assert torch.equal(*twice) and bridge.recipe_of(out.args[0]).is_delayed


def test_scales_that_do_not_fit_are_refused(models):
    first = delayed()
    with pytest.raises(error("InputError"), match="no scale yet: run a forward first"):
        call("WanFP8SaveScales", latent={}, model=first[0], model_low=first[1], filename="t2v")
    sample(first)
    call("WanFP8SaveScales", latent={}, model=first[0], model_low=first[1], filename="t2v")
    node = nodes_kit.load_pack()["WanFP8SaveScales"]
    assert "exists already" in node.validate_inputs(filename="t2v", overwrite=False), "said when it is queued"
    assert "no name for a file" in node.validate_inputs(filename="../x", overwrite=True)
    assert node.validate_inputs(filename="t2v", overwrite=True) is True and node.validate_inputs() is True
    with pytest.raises(error("InputError"), match="exists already"):
        call("WanFP8SaveScales", latent={}, model=first[0], model_low=first[1], filename="t2v")
    call("WanFP8SaveScales", latent={}, model=first[0], model_low=first[1], filename="t2v", overwrite=True)
    model = kit.core_model()
    with pytest.raises(error("InputError"), match="no DelayedScaling recipe"):
        call("WanFP8SaveScales", latent={}, model=with_recipe(model, "rowwise"), filename="x")
    for inputs, kind, words in (
        ({"recipe": "rowwise", "scales": "t2v"}, "InputError", r"of a model without a partner"),
        ({"recipe": "DelayedScaling", "scales": "gone"}, "InputError", r"has no scales 'gone'"),
        ({"recipe": "rowwise", "scales": "t2v", "model_low": kit.core_model(seed=1)}, "InputError", "takes no scales"),
        (
            {"recipe": "DelayedScaling", "margin": 1, "scales": "t2v", "model_low": kit.core_model(seed=1)},
            "CheckpointError",
            r"was made with .* this recipe has",
        ),
        (
            {"recipe": "DelayedScaling", "keep": "ffn.2", "scales": "t2v", "model_low": kit.core_model(seed=1)},
            "CheckpointError",
            r"belongs to a model with other FP8 layers",
        ),
    ):
        with pytest.raises(error(kind), match=words):
            call("WanFP8Recipe", model=model, backend="reference", **inputs)


def test_scales_that_were_saved_again_are_others(models):
    node = nodes_kit.load_pack()["WanFP8Recipe"]
    path = models / "wan_fp8_scales" / "t2v.high_noise.safetensors"
    path.write_bytes(b"1")
    before = node.fingerprint_inputs(scales="t2v", recipe="DelayedScaling")
    path.write_bytes(b"12")
    assert node.fingerprint_inputs(scales="t2v", recipe="DelayedScaling") != before
    assert node.fingerprint_inputs(scales="none") == node.fingerprint_inputs() == []


def test_a_bf16_file_takes_no_host_memory_beside_fp8(models):
    """Load, then Recipe: what FP8 was made of stays the file's mapped pages."""
    path = models / "diffusion_models" / "wan2.2_t2v_high_noise.safetensors"
    save_file({k: v.contiguous() for k, v in kit.core_weights(dtype=torch.bfloat16).items()}, path)
    header = nodes_kit.module("wan_fp8.checkpoint.header").read_header(path)
    fp8 = with_recipe(loaded(path.name, "auto"), "rowwise")
    linear = nodes_kit.module("wan_fp8.quant.linear").FP8Linear
    sources = {name: m.source for name, m in fp8.model.diffusion_model.named_modules() if isinstance(m, linear)}
    first = next(iter(sources))
    base = sources[first].data_ptr() - header.offsets[f"{first}.weight"]
    assert len(sources) == 20
    for name, source in sources.items():
        assert source.data_ptr() == base + header.offsets[f"{name}.weight"], f"{name} is a copy"
