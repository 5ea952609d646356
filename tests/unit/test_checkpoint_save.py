"""Saving a transformer: the same bits come back, core's format where it has one, and whole files or none."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model_parity import tiny_model
from test_recipe import NAMES, fp8_model, reference, step
from torch import Tensor

import wan_fp8
from wan_fp8.checkpoint import save
from wan_fp8.checkpoint.detect import inspect
from wan_fp8.checkpoint.header import read_header
from wan_fp8.checkpoint.load import load_transformer
from wan_fp8.checkpoint.quantized import Storage
from wan_fp8.errors import CheckpointError, InputError
from wan_fp8.kernels import quantize
from wan_fp8.quant import Recipe, apply_recipe, recipe_of
from wan_fp8.quant.convert import rounded_again
from wan_fp8.quant.linear import FP8Linear

NAME = "wan2.2_t2v_high_noise_14B.safetensors"
CORE_FORMAT = {"DelayedScaling", "Float8CurrentScaling"}


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and value.shape == b[name].shape, name
        assert torch.equal(value.flatten().view(torch.uint8), b[name].flatten().view(torch.uint8)), name


@pytest.fixture
def no_quantising(monkeypatch):
    """Any cast of a weight fails."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a weight was quantised")

    monkeypatch.setattr(quantize, "quantize_weight", fail)
    monkeypatch.setattr("wan_fp8.quant.convert.quantize_weight", fail)
    monkeypatch.setattr("wan_fp8.quant.linear.quantize_weight", fail)
    monkeypatch.setattr("wan_fp8.models.layers.quantize_weight", fail)


def rewritten(path: Path, target: Path, change) -> Path:
    """A copy of a file after ``change(tensors, metadata)``."""
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, target, metadata=metadata)
    return target


# ---- the same bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [(), ("blocks.0.", "ffn.2")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_recipe_comes_back_bit_for_bit(tmp_path, request, name, dtype, keep) -> None:
    recipe = reference(name, keep=keep)
    model = fp8_model(recipe, dtype=dtype)
    assert wan_fp8.save_checkpoint(model, tmp_path / NAME) == tmp_path / NAME
    assert [path.name for path in tmp_path.iterdir()] == [NAME], "nothing is left beside it"

    request.getfixturevalue("no_quantising")
    plain = load_transformer(tmp_path / NAME, dtype=None)
    same(plain.state_dict(), model.state_dict())
    assert recipe_of(plain) is None
    for again in (
        apply_recipe(plain, recipe),
        load_transformer(tmp_path / NAME, dtype=None, recipe=recipe),
        load_transformer(tmp_path / NAME, dtype=dtype, recipe=recipe),
    ):
        same(again.state_dict(), model.state_dict())
        assert recipe_of(again) == recipe and rounded_again(again) == 0
        model.begin_run()
        model.compute_dtype_override = again.compute_dtype  # a loaded FP8 model computes in bf16
        assert torch.equal(step(again, 900), step(model, 900))


def test_weights_are_views_of_the_file(tmp_path) -> None:
    """Loading reads nothing but small tensors: the weights are its mapped pages, under the recipe as well."""
    wan_fp8.save_checkpoint(fp8_model(reference("rowwise")), tmp_path / NAME)
    header = read_header(tmp_path / NAME)
    model = load_transformer(tmp_path / NAME, recipe=reference("rowwise"))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    first = next(iter(linears))
    base = linears[first].weight.data_ptr() - header.offsets[f"{first}.weight"]
    for name, module in linears.items():
        assert module.weight.data_ptr() == base + header.offsets[f"{name}.weight"], name
    for name, info in header.tensors.items():
        aligned = next((step for step in (4096, 64) if info.nbytes % step == 0), info.dtype.itemsize)
        assert header.offsets[name] % aligned == 0, f"{name} cannot be mapped or pinned by itself"


def test_no_recipe_is_saved_as_it_is(tmp_path) -> None:
    model = tiny_model("ti2v", torch.bfloat16)
    wan_fp8.save_checkpoint(model, tmp_path / "ti2v.safetensors")
    assert inspect(tmp_path / "ti2v.safetensors").storage is Storage.BF16
    same(load_transformer(tmp_path / "ti2v.safetensors", dtype=None).state_dict(), model.state_dict())


def test_merged_weights_are_saved_with_their_own_scale(tmp_path) -> None:
    model = fp8_model(reference("rowwise"))
    layer = model.blocks[1].ffn[0]
    layer.set_weight(3 * layer.convert_weight(layer.weight))
    merged, scale = layer.weight.clone(), layer.current_scale().clone()
    assert not torch.equal(scale, layer.weight_scale)
    wan_fp8.save_checkpoint(model, tmp_path / NAME)
    again = load_transformer(tmp_path / NAME, dtype=None).blocks[1].ffn[0]
    assert torch.equal(again.weight.view(torch.uint8), merged.view(torch.uint8))
    assert torch.equal(again.weight_scale, scale)


@pytest.mark.parametrize("name, down, across", [("Float8BlockScaling", 128, 128), ("MXFP8BlockScaling", 1, 32)])
def test_fine_scales_are_multiplied_in_where_the_weight_is_not_kept(tmp_path, name, down, across) -> None:
    model = fp8_model(reference(name))
    wan_fp8.save_checkpoint(model, tmp_path / NAME)
    for dtype in (torch.float32, torch.bfloat16):
        high = load_transformer(tmp_path / NAME, dtype=dtype)
        for path, module in model.named_modules():
            if isinstance(module, FP8Linear):
                spread = module.weight_scale.float().repeat_interleave(down, 0).repeat_interleave(across, 1)
                assert torch.equal(high.get_submodule(path).weight, (module.weight.float() * spread).to(dtype)), path


# ---- what other programs find ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_documented_layout(tmp_path, name) -> None:
    """Held against safetensors' own reader: names, types, shapes, marks and metadata of docs/checkpoints.md."""
    wan_fp8.save_checkpoint(fp8_model(reference(name)), tmp_path / "t2v.safetensors", expert="low_noise")
    ours = {"rowwise": "wan_fp8_row", "Float8BlockScaling": "wan_fp8_block_128", "MXFP8BlockScaling": "wan_fp8_mx_32"}
    form = ours.get(name, "float8_e4m3fn")
    with safe_open(tmp_path / "t2v.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
        keys = set(opened.keys())
        for layer in ("blocks.0.self_attn.q", "blocks.1.ffn.2"):
            weight, scale = (opened.get_tensor(f"{layer}.{part}") for part in ("weight", "weight_scale"))
            assert weight.dtype == torch.float8_e4m3fn
            assert scale.dtype == (torch.float8_e8m0fnu if form == "wan_fp8_mx_32" else torch.float32)
            rows, columns = weight.shape
            shapes = {"wan_fp8_row": (rows, 1), "wan_fp8_block_128": (rows // 128, columns // 128)}
            shapes["wan_fp8_mx_32"] = (rows, columns // 32)
            assert scale.shape == shapes.get(form, ())
            assert json.loads(bytes(opened.get_tensor(f"{layer}.comfy_quant").tolist())) == {"format": form}
    listed = json.loads(metadata["_quantization_metadata"])
    assert listed["format_version"] == "1.0" and set(map(str, listed["layers"].values())) == {f"{{'format': '{form}'}}"}
    assert {f"{layer}.comfy_quant" for layer in listed["layers"]} == {k for k in keys if k.endswith(".comfy_quant")}
    assert metadata["wan_fp8_format"] == "transformer" and metadata["wan_fp8_version"] == "1"
    assert json.loads(metadata["wan_fp8_recipe"]) == {"name": name, "keep": []}
    found = inspect(tmp_path / "t2v.safetensors")
    assert found.expert == "low_noise", "the file's name does not say it, its title does"
    assert found.storage is (Storage.COMFY_QUANT if name in CORE_FORMAT else Storage.WAN_FP8)


@pytest.mark.parametrize("saved, applied", [("rowwise", "DelayedScaling"), ("Float8BlockScaling", "rowwise")])
def test_another_recipe_than_the_file_was_saved_with(tmp_path, saved, applied) -> None:
    """It works, from the file's values, and is counted: those are rounded a second time."""
    model = fp8_model(reference(saved))
    wan_fp8.save_checkpoint(model, tmp_path / NAME)
    other = load_transformer(tmp_path / NAME, recipe=reference(applied))
    linears = [module for module in other.modules() if isinstance(module, FP8Linear)]
    assert rounded_again(other) == len(linears) > 0
    held, before = other.blocks[0].ffn[0], model.blocks[0].ffn[0]
    error = (held.dequantized(held.weight, torch.float32) - before.dequantized(before.weight, torch.float32)).norm()
    assert 0.001 < error / before.dequantized(before.weight, torch.float32).norm() < 0.03
    apply_recipe(other, reference(saved))
    assert rounded_again(other) == 0
    same(other.state_dict(), load_transformer(tmp_path / NAME, recipe=reference(saved)).state_dict())


def test_one_scale_serves_every_recipe(tmp_path) -> None:
    model = fp8_model(reference("Float8CurrentScaling"))
    wan_fp8.save_checkpoint(model, tmp_path / NAME)
    for name in NAMES:
        other = load_transformer(tmp_path / NAME, recipe=reference(name))
        if name == "MXFP8BlockScaling":  # unless the one scale is a power of two
            assert rounded_again(other) > 0
            continue
        assert rounded_again(other) == 0
        held = other.blocks[1].ffn[2].weight
        assert torch.equal(held.view(torch.uint8), model.blocks[1].ffn[2].weight.view(torch.uint8))


# ---- whole or not at all --------------------------------------------------------------------------------------------


class FullDisk:
    """A file that fails after some bytes, as on a full disk."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def test_a_disk_that_becomes_full(tmp_path, monkeypatch) -> None:
    kept = tmp_path / NAME
    kept.write_bytes(b"an older file")
    opened = lambda *args: FullDisk(open(*args), 100_000)  # noqa: E731, SIM115
    monkeypatch.setattr(save, "open", opened, raising=False)
    with pytest.raises(InputError, match=r"could not be written \(No space left.*nothing of it was left behind"):
        wan_fp8.save_checkpoint(fp8_model(reference("rowwise")), kept, overwrite=True)
    assert kept.read_bytes() == b"an older file" and list(tmp_path.iterdir()) == [kept]


def test_a_disk_that_is_full_is_known_before(tmp_path, monkeypatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(save.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"takes .* GB and .* has 0\.0 GB free: make room"):
        wan_fp8.save_checkpoint(tiny_model("t2v"), tmp_path / "new" / NAME)
    assert list((tmp_path / "new").iterdir()) == []


def test_cancelling_leaves_nothing(tmp_path) -> None:
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wan_fp8.save_checkpoint(tiny_model("t2v"), tmp_path / NAME, progress=progress)
    assert list(tmp_path.iterdir()) == [] and len(seen) > 1 and seen == sorted(seen)


def test_progress_ends_at_the_whole(tmp_path) -> None:
    seen = []
    wan_fp8.save_checkpoint(tiny_model("t2v"), tmp_path / NAME, progress=lambda *counts: seen.append(counts))
    header = read_header(tmp_path / NAME)
    assert seen[-1] == (sum(info.nbytes for info in header.tensors.values()),) * 2


def test_files_are_not_replaced_by_accident(tmp_path) -> None:
    model = tiny_model("t2v")
    wan_fp8.save_checkpoint(model, tmp_path / NAME)
    before = (tmp_path / NAME).stat().st_mtime_ns
    with pytest.raises(InputError, match=r"exists already: choose another name.*overwrite"):
        wan_fp8.save_checkpoint(model, tmp_path / NAME)
    assert (tmp_path / NAME).stat().st_mtime_ns == before
    for name, words in (("a.gguf", "must end in .safetensors"), ("b", "must end in .safetensors")):
        with pytest.raises(InputError, match=words):
            wan_fp8.save_checkpoint(model, tmp_path / name)
    with pytest.raises(InputError, match="expert must be"):
        wan_fp8.save_checkpoint(model, tmp_path / "c.safetensors", expert="medium")
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_file_can_be_replaced_while_its_pages_are_the_weights(tmp_path) -> None:
    wan_fp8.save_checkpoint(fp8_model(reference("rowwise")), tmp_path / NAME)
    model = load_transformer(tmp_path / NAME, recipe=reference("rowwise"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wan_fp8.save_checkpoint(model, tmp_path / NAME, overwrite=True)
    same(model.state_dict(), state)
    same(load_transformer(tmp_path / NAME, dtype=None).state_dict(), state)


# ---- files that lie -------------------------------------------------------------------------------------------------


LAYER = "blocks.0.self_attn.q"


def _no_scale(tensors, metadata) -> None:
    del tensors[f"{LAYER}.weight_scale"]


def _one_scale(tensors, metadata) -> None:
    tensors[f"{LAYER}.weight_scale"] = torch.ones(())


def _bf16(tensors, metadata) -> None:
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.bfloat16)


def _not_finite(tensors, metadata) -> None:
    tensors[f"{LAYER}.weight_scale"][3] = float("nan")


def _newer(tensors, metadata) -> None:
    metadata["wan_fp8_version"] = "2"


def _other_format(tensors, metadata) -> None:
    mark = list(b'{"format": "wan_fp8_row_64"}')
    tensors[f"{LAYER}.comfy_quant"] = torch.tensor(mark, dtype=torch.uint8)


@pytest.mark.parametrize(
    "change, words",
    [
        (_no_scale, rf"is mislabelled: it calls {LAYER} wan_fp8_row, and holds F8_E4M3 .* with no scale"),
        (_one_scale, r"is mislabelled: .* with a scale F32 \[\]"),
        (_bf16, r"is mislabelled: .* holds BF16"),
        (_not_finite, rf"is damaged: {LAYER}.weight_scale is not finite"),
        (_newer, r"version 2 of this pack's own format \(this is version 1\)"),
        (_other_format, r"stores its weights as wan_fp8_row_64"),
    ],
)
def test_a_file_that_lies_is_refused(tmp_path, change, words) -> None:
    wan_fp8.save_checkpoint(fp8_model(reference("rowwise")), tmp_path / NAME)
    bad = rewritten(tmp_path / NAME, tmp_path / f"bad_{NAME}", change)
    with pytest.raises(CheckpointError, match=words):
        load_transformer(bad, dtype=None)


def test_a_truncated_file_is_refused(tmp_path) -> None:
    wan_fp8.save_checkpoint(fp8_model(reference("Float8BlockScaling")), tmp_path / NAME)
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="is truncated"):
        load_transformer(tmp_path / NAME)


def test_loading_with_a_recipe_takes_no_memory_for_what_it_casts(tmp_path) -> None:
    """A file in fp32, as the published ones: linears stay mapped until each is cast, and are cast from fp32."""
    model = tiny_model("t2v", torch.float32)
    wan_fp8.save_checkpoint(model, tmp_path / NAME)
    header = read_header(tmp_path / NAME)
    loaded = load_transformer(tmp_path / NAME, recipe=reference("rowwise"))
    direct = apply_recipe(model, Recipe("rowwise", backend="reference"))
    sources = {name: m.source for name, m in loaded.named_modules() if isinstance(m, FP8Linear)}
    first = next(iter(sources))
    base = sources[first].data_ptr() - header.offsets[f"{first}.weight"]
    for name, source in sources.items():
        assert source.dtype == torch.float32 and source.data_ptr() == base + header.offsets[f"{name}.weight"]
        mine, theirs = (m.get_submodule(name).weight.view(torch.uint8) for m in (loaded, direct))
        assert torch.equal(mine, theirs)
    assert loaded.text_embedding[0].weight.dtype == torch.bfloat16 and loaded.compute_dtype == torch.bfloat16
