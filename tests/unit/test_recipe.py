"""Recipes at work in a model: conversion and back, scales that follow a history, files, token counts, outliers."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_parity import TINY, inputs, relative, tiny_model
from torch import Tensor

from wan_fp8 import compile_blocks
from wan_fp8.checkpoint.load import load_transformer
from wan_fp8.errors import BackendUnavailableError, CheckpointError, InputError
from wan_fp8.gemm import GEMM, GemmRunner, register_backends
from wan_fp8.kernels.quantize import Granularity, QuantizedActivation, quantize, quantize_current
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.layers import Linear
from wan_fp8.quant import (
    RECIPES,
    Recipe,
    apply_recipe,
    convert,
    freeze_scales,
    load_scales,
    recipe_of,
    remove_recipe,
    save_scales,
)
from wan_fp8.quant.convert import LINEARS, share_recipe
from wan_fp8.quant.linear import FP8Linear, Quantization

NAMES = RECIPES[1:]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def reference(name: str, **options) -> Recipe:
    return Recipe(name, backend="reference", **options)


def fp8_model(recipe: Recipe, kind: str = "t2v", dtype: torch.dtype = torch.float32):
    return apply_recipe(tiny_model(kind, dtype), recipe)


def step(model, timestep: float, scale: float = 1.0, kind: str = "t2v", text: int = 0) -> Tensor:
    x, context = inputs(kind)
    options = ForwardOptions(text_key=text)
    return model(scale * x, torch.tensor([timestep]), context.roll(text, 1), options=options)


# ---- the setting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"name": "int8"}, "unknown FP8 recipe 'int8'"),
        ({"backend": "cutlass"}, "unknown FP8 GEMM backend"),
        ({"amax_history_len": 0}, "amax_history_len is a whole number from 1"),
        ({"amax_history_len": True}, "amax_history_len"),
        ({"amax_compute_algo": "mean"}, "'max' or 'most_recent'"),
        ({"margin": -1}, "margin is a whole number from 0"),
        ({"keep": "blocks.0."}, "tuple of parameter name prefixes"),
        ({"keep": ("",)}, "tuple of parameter name prefixes"),
    ],
)
def test_settings_are_checked(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Recipe(**options)


def test_nvfp4_says_why_not() -> None:
    with pytest.raises(BackendUnavailableError, match=r"NVFP4BlockScaling is not offered .*two 4-bit.*rowwise, MXFP8"):
        Recipe("NVFP4BlockScaling")


def test_auto_on_a_cpu_names_every_reason() -> None:
    model = fp8_model(Recipe("rowwise"))
    with pytest.raises(BackendUnavailableError, match=r"torch: it needs an NVIDIA GPU.*reference: never chosen auto"):
        step(model, 900)


# ---- conversion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["t2v", "ti2v"])
def test_conversion(name: str, kind: str) -> None:
    """Ten linears a block, one byte a weight, everything else untouched; bit-equal after removal."""
    model = tiny_model(kind)
    before, exact = {k: v.clone() for k, v in model.state_dict().items()}, step(model, 900, kind=kind)
    assert apply_recipe(model, reference(name)) is model and recipe_of(model) == reference(name)
    converted = {n for n, m in model.named_modules() if isinstance(m, FP8Linear)}
    assert converted == {f"blocks.{i}.{n}" for i in range(len(model.blocks)) for n in LINEARS}
    for key, value in model.state_dict().items():
        layer = key.rpartition(".")[0]
        if layer in converted and key.endswith(".weight"):
            assert type(value) is Tensor and value.dtype == torch.float8_e4m3fn
        elif not key.endswith(".weight_scale"):
            assert torch.equal(value, before[key]), key
    sizes = {
        "rowwise": lambda m: (m.out_features, 1),
        "Float8BlockScaling": lambda m: (m.out_features // 128, m.in_features // 128),
        "MXFP8BlockScaling": lambda m: (m.out_features, m.in_features // 32),
    }
    for module in model.modules():
        if isinstance(module, FP8Linear):
            assert module.weight_scale.shape == sizes.get(name, lambda _: ())(module)
    error = relative(step(model, 900, kind=kind), exact)
    assert 0.01 < error < 0.06, error
    weights = {k: v.data_ptr() for k, v in model.state_dict().items()}
    apply_recipe(model, reference(name))
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == weights, "applying it again changes nothing"
    remove_recipe(model)
    assert recipe_of(model) is None and torch.equal(step(model, 900, kind=kind), exact)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, FP8Linear) for m in model.modules())


def test_one_recipe_after_another_starts_from_the_original_weights() -> None:
    direct, detour = fp8_model(reference("rowwise")), fp8_model(reference("Float8BlockScaling"))
    apply_recipe(detour, reference("Float8CurrentScaling"))
    apply_recipe(detour, reference("rowwise", keep=("blocks.0.", "ffn.2")))
    kept = [n for n, m in detour.named_modules() if n.startswith("blocks.") and type(m) is Linear]
    assert kept == [f"blocks.0.{n}" for n in LINEARS] + [f"blocks.{i}.ffn.2" for i in range(1, len(detour.blocks))]
    apply_recipe(detour, reference("rowwise"))
    state = detour.state_dict()
    for key, value in direct.state_dict().items():
        assert torch.equal(value.float(), state[key].float()), key
    assert torch.equal(step(direct, 900), step(detour, 900))


def test_keep_must_name_something() -> None:
    model = tiny_model("t2v")
    with pytest.raises(InputError, match=r"keep names 'blocks.99.'.*blocks"):
        apply_recipe(model, reference("rowwise", keep=("blocks.99.",)))
    assert recipe_of(model) is None and not any(isinstance(m, FP8Linear) for m in model.modules())


def test_without_sources_it_says_that_it_cannot_be_undone() -> None:
    model = tiny_model("t2v")
    apply_recipe(model, reference("rowwise"), keep_sources=False)
    result = step(model, 900)
    for change in (lambda: remove_recipe(model), lambda: apply_recipe(model, reference("Float8BlockScaling"))):
        with pytest.raises(InputError, match=r"original weights of .* are gone.*load the model again"):
            change()
    assert torch.equal(step(model, 900), result)
    apply_recipe(model, reference("rowwise", margin=1))  # the same weights serve it


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_an_fp8_file_keep_their_bytes(name: str) -> None:
    """One scale for the tensor serves every recipe (MXFP8: a power of two); nothing goes through bf16."""
    model = tiny_model("t2v", torch.bfloat16)
    stored = {}
    for path, module in model.named_modules():
        if type(module) is Linear and path.startswith("blocks."):
            scale = module.weight.float().abs().amax() / 448
            scale = scale.log2().ceil().exp2() if name == "MXFP8BlockScaling" else scale
            module.weight = torch.nn.Parameter((module.weight.float() / scale).to(torch.float8_e4m3fn), False)
            module.weight_scale = torch.nn.Parameter(scale, False)
            stored[path] = module.weight.data_ptr()
    weight_only = step(model, 900)
    apply_recipe(model, reference(name))
    for path, module in model.named_modules():
        if isinstance(module, FP8Linear):
            assert module.weight.data_ptr() == stored[path]
            assert (module.weight_scale.float() == module.original[1]).all()
    assert 0.005 < relative(step(model, 900), weight_only) < 0.06
    remove_recipe(model)
    assert torch.equal(step(model, 900), weight_only)


def test_a_fork_shares_weights_and_recipe_but_no_history() -> None:
    model = fp8_model(reference("DelayedScaling"))
    step(model, 900)
    other = tiny_model("t2v")
    for path, module in model.named_modules():
        if isinstance(module, FP8Linear):
            twin = other.get_submodule(path)
            twin.weight, twin.weight_scale = module.weight, module.weight_scale
    share_recipe(model, other)
    history = model.quantization.scales.history.clone()
    fresh = fp8_model(reference("DelayedScaling"))
    assert torch.equal(step(other, 500, 2.0), step(fresh, 500, 2.0))
    assert torch.equal(model.quantization.scales.history, history)
    assert other.blocks[0].ffn[0].source is model.blocks[0].ffn[0].source is not None


# ---- the forward ---------------------------------------------------------------------------------------------------


class Recorder:
    """A backend that counts, and answers as the reference does."""

    def __init__(self, multiple: int = 1, own_cast: bool = False) -> None:
        """``own_cast``: with a cast of its own, as Transformer Engine has, which knows nothing of padding."""
        self.inputs: list[QuantizedActivation] = []
        register_backends()
        runner = GEMM.backend("reference").run

        def multiply(x, weight, scale, bias):
            assert weight.dtype == torch.float8_e4m3fn
            self.inputs.append(x)
            return runner(x, weight, scale, bias)

        def cast(x, wanted, gelu):
            blind = dataclasses.replace(wanted, padding=None)
            if wanted.granularity is Granularity.TENSOR and wanted.multiplier is None:
                return quantize_current(x, gelu=gelu)
            return quantize(x, blind, gelu=gelu)

        self.runner = GemmRunner(
            multiply,
            quantize=cast if own_cast else None,
            multiples=tuple((kind, multiple) for kind in Granularity),
        )

    def attach(self, model):
        model.quantization.runner = lambda device, dtype: self.runner
        return model


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_cast_once(name: str) -> None:
    model = fp8_model(reference(name))
    step(model, 900)
    recorder = Recorder()
    step(recorder.attach(model), 900)
    blocks = len(model.blocks)
    assert len(recorder.inputs) == 8 * blocks, "text keys and values are kept from the first forward"
    assert len({id(x) for x in recorder.inputs}) == 6 * blocks, "q, k and v share one"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(3, 6, 6), (1, 6, 14), (5, 2, 14)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("own_cast", [False, True])
def test_any_number_of_tokens(name: str, size: tuple[int, int, int], batch: int, own_cast: bool) -> None:
    """Padded once to what a backend needs, the result is that of no padding: no maximum takes a padding row in.

    In float64: in float32 some CPUs round a product of more rows otherwise, and now and then a value falls on the other
    side of one of e4m3's steps.
    """
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, TINY["t2v"].in_dim, *size, generator=generator).double()
    context = torch.randn(batch, 512, TINY["t2v"].text_dim, generator=generator).double()
    results = []
    for multiple in (1, 16, 128):
        recorder = Recorder(multiple, own_cast)
        model = recorder.attach(fp8_model(reference(name), dtype=torch.float64))
        # the second forward of DelayedScaling uses the maxima of the first
        results.append([model(x, torch.full((batch,), t), context) for t in (900.0, 800.0)])
        tokens = math.prod(size) // 4
        assert {q.shape[1] for q in recorder.inputs} == {512, -(-tokens // multiple) * multiple}
    for padded in results[1:]:
        assert all(relative(ours, plain) < 1e-5 for ours, plain in zip(padded, results[0], strict=True))


def test_text_of_any_length() -> None:
    """Padded where it is projected; the keys and values of the prompt are those of no padding."""
    x, context = inputs("t2v", tokens=13)
    plain, padded = (Recorder(multiple).attach(fp8_model(reference("Float8CurrentScaling"))) for multiple in (1, 16))
    assert relative(padded(x, torch.tensor([900]), context), plain(x, torch.tensor([900]), context)) < 1e-5
    keys = padded.blocks[0].cross_attn.k(torch.randn(2, 13, TINY["t2v"].dim))
    assert keys.shape[1] == 13 and keys.is_contiguous(), "the fused norm reads rows that lie side by side"


@pytest.mark.parametrize("name", ["rowwise", "Float8BlockScaling"])
def test_an_outlier_in_the_activations(name: str) -> None:
    model, exact = fp8_model(reference(name)), tiny_model("t2v")
    x, context = inputs("t2v")
    x[0, 3, 1, 2, 2] = 1e4
    ours, theirs = (m(x, torch.tensor([900]), context) for m in (model, exact))
    assert not ours.isnan().any()
    patches = [
        v.unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(0, 3) for v in (ours, theirs)
    ]
    errors = (patches[0] - patches[1]).norm(dim=1) / patches[1].norm(dim=1)
    assert errors.median() < 0.05


# ---- delayed scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 2])
def test_scales_follow_the_history(algorithm: str, margin: int) -> None:
    """From step to step, under inference mode: 448 / max(history) / 2^margin, and never 1."""
    recipe = reference("DelayedScaling", amax_history_len=3, amax_compute_algo=algorithm, margin=margin)
    model = fp8_model(recipe)
    scales, seen, maxima = model.quantization.scales, [], []
    for index in range(5):
        step(model, 900.0 - 100 * index, 1 + index % 3)
        maxima.append(scales.history[0].clone())
        window = torch.stack(maxima[-3:])
        want = 448 / (window.amax(0) if algorithm == "max" else window[-1]) / 2**margin
        assert torch.allclose(scales.multiplier, want) and torch.allclose(scales.dequant, 1 / want)
        assert (scales.multiplier != 1).all() and scales.history.shape == (3, len(scales.sites))
        seen.append(scales.multiplier.clone())
    moved = [(a != b).any() for a, b in itertools.pairwise(seen)]
    assert all(moved) if algorithm == "most_recent" else any(moved)
    # and these are the maxima of the real inputs
    inputs_of: dict[str, list[Tensor]] = {}
    plain = tiny_model("t2v")
    plain.get_submodule("blocks.0.self_attn.q").register_forward_pre_hook(
        lambda _, args: inputs_of.setdefault("q", []).append(args[0])
    )
    step(plain, 500, 2)
    index = scales.sites.index("blocks.0.self_attn.q")
    assert math.isclose(float(maxima[-1][index]), float(inputs_of["q"][0].abs().max()), rel_tol=1e-3)


def test_the_first_forward_casts_by_its_own_maximum() -> None:
    first = step(fp8_model(reference("DelayedScaling")), 900)
    assert torch.equal(first, step(fp8_model(reference("Float8CurrentScaling")), 900))
    tiny = fp8_model(reference("DelayedScaling"))
    exact = step(tiny_model("t2v"), 900)
    assert relative(step(tiny, 900), exact) < 0.06


def test_an_outlier_step_is_clamped_once_and_remembered() -> None:
    model = fp8_model(reference("DelayedScaling", amax_history_len=2))
    exact = tiny_model("t2v")
    scales = model.quantization.scales
    site = scales.sites.index("blocks.0.self_attn.o")
    step(model, 900)
    usual = float(scales.multiplier[site])
    for module in (model, exact):  # values a hundred times as large as those before
        module.blocks[0].self_attn.v.bias.mul_(0).add_(400.0)
    outlier = step(model, 800)
    assert not outlier.isnan().any()
    assert float(scales.multiplier[site]) < usual / 10, "the next step knows"
    assert relative(step(model, 700), step(exact, 700)) < 0.06
    for module in (model, exact):
        module.blocks[0].self_attn.v.bias.mul_(0)
    step(model, 600)
    assert float(scales.multiplier[site]) < usual / 10, "still in the history of two"
    step(model, 500)
    assert float(scales.multiplier[site]) > usual / 3, "forgotten"


def test_branches_of_one_step_share_an_entry_and_experts_share_nothing() -> None:
    model, other = fp8_model(reference("DelayedScaling")), fp8_model(reference("DelayedScaling"))
    for branch in (0, 1):
        step(model, 900, 1 + branch, text=branch)
        step(other, 900, 2 - branch, text=1 - branch)
    mine, theirs = model.quantization.scales, other.quantization.scales
    assert (mine.history[0] > 0).all() and (mine.history[1:] == 0).all(), "one entry a step"
    first = mine.sites.index("blocks.0.self_attn.q")
    assert torch.allclose(mine.history[0, first], theirs.history[0, first], rtol=1e-3), "in either order"
    before = theirs.history.clone()
    step(model, 800)
    assert (mine.history[1] > 0).all() and torch.equal(theirs.history, before)


def test_a_run_gives_the_same_bits_whatever_ran_before() -> None:
    model = fp8_model(reference("DelayedScaling"))

    def run(scale: float = 1.0) -> list[Tensor]:
        model.begin_run()
        return [step(model, t, scale) for t in (900, 700, 500)]

    first = run()
    run(3.0)
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_a_failed_forward_leaves_no_maxima() -> None:
    model, twin = fp8_model(reference("DelayedScaling")), fp8_model(reference("DelayedScaling"))
    step(model, 900), step(twin, 900)
    broken = ForwardOptions(block_replace={1: lambda args, extra: 1 / 0})
    x, context = inputs("t2v")
    with pytest.raises(ZeroDivisionError):
        model(50 * x, torch.tensor([800]), context, options=broken)
    for t in (700, 600):
        assert torch.equal(step(model, t), step(twin, t))


def test_saved_scales_make_a_second_run_start_calibrated(tmp_path) -> None:
    model = fp8_model(reference("DelayedScaling"))
    with pytest.raises(InputError, match="no scale yet: run a forward first"):
        save_scales(model, tmp_path / "scales.safetensors")
    for t in (900, 700, 500):
        step(model, t, 2.0)
    model.begin_run()  # what was found stays readable until the next forward
    save_scales(model, tmp_path / "scales.safetensors")
    found = model.quantization.scales.multiplier.clone()

    results = []
    for _ in range(2):
        second = load_scales(fp8_model(reference("DelayedScaling")), tmp_path / "scales.safetensors")
        step(second, 333, 5.0)
        second.begin_run()
        results.append([step(second, t) for t in (900, 700)])
        assert torch.equal(second.quantization.scales.multiplier, found), "frozen"
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    follows = load_scales(fp8_model(reference("DelayedScaling")), tmp_path / "scales.safetensors", freeze=False)
    assert torch.equal(step(follows, 900), results[0][0]), "calibrated from the first forward on"
    assert not torch.equal(follows.quantization.scales.history[0], model.quantization.scales.history[0])


def test_frozen_scales_stay() -> None:
    model = fp8_model(reference("DelayedScaling"))
    with pytest.raises(InputError, match="run a forward first"):
        freeze_scales(model)
    step(model, 900)
    freeze_scales(model)
    found = model.quantization.scales.multiplier.clone()
    step(model, 800, 4.0)
    assert torch.equal(model.quantization.scales.multiplier, found)
    freeze_scales(model, False)
    step(model, 700, 4.0)
    assert not torch.equal(model.quantization.scales.multiplier, found)
    with pytest.raises(InputError, match="no DelayedScaling"):
        freeze_scales(fp8_model(reference("rowwise")))


def test_files_of_scales_are_checked(tmp_path) -> None:
    path = tmp_path / "scales.safetensors"
    model = fp8_model(reference("DelayedScaling"))
    step(model, 900)
    save_scales(model, path)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    save_file({"history": torch.zeros(1)}, tmp_path / "other.safetensors")
    bad = load_file(path)
    bad["multiplier"][0] = float("nan")
    with __import__("safetensors").safe_open(path, framework="pt") as opened:
        save_file(bad, tmp_path / "nan.safetensors", metadata=opened.metadata())
    for name, words in (
        ("broken", "no readable"),
        ("other", "holds no DelayedScaling"),
        ("nan", "no positive numbers"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_scales(model, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="was made with"):
        load_scales(fp8_model(reference("DelayedScaling", margin=1)), path)
    with pytest.raises(CheckpointError, match="other FP8 layers"):
        load_scales(fp8_model(reference("DelayedScaling", keep=("ffn.2",))), path)


def test_loading_with_a_recipe(tmp_path) -> None:
    """From a mapped file, tensor by tensor: the same bits as loading first; the originals stay the file's pages."""
    original, path = tiny_model("t2v", torch.bfloat16), tmp_path / "wan2.2_t2v_high_noise.safetensors"
    save_file({k: v.contiguous() for k, v in original.state_dict().items()}, path)
    loaded = load_transformer(path, recipe=reference("rowwise"))
    direct = apply_recipe(original, reference("rowwise"))
    state = direct.state_dict()
    assert recipe_of(loaded) == reference("rowwise")
    assert all(torch.equal(v.float(), state[k].float()) for k, v in loaded.state_dict().items())
    assert torch.equal(step(loaded, 900), step(direct, 900))
    assert loaded.blocks[0].ffn[0].source is not None
    plain = load_transformer(path, recipe=Recipe("none"))
    assert recipe_of(plain) is None


@pytest.mark.parametrize("name", NAMES)
def test_compiled_blocks(name: str) -> None:
    """One graph a part, the same bits; delayed scales need a second one, once there are scales."""
    model = fp8_model(reference(name))
    want = [step(model, 900), step(model, 800)]
    model.begin_run()
    compile_blocks(model, backend="aot_eager")
    assert torch.equal(step(model, 900), want[0])
    assert torch.equal(step(model, 800), want[1])
    assert next(iter(model.compiled_parts.values())).graphs <= (8 if name == "DelayedScaling" else 4)


@pytest.mark.parametrize("keep_sources", [True, False])
def test_an_error_in_the_middle_leaves_a_model_that_works(keep_sources: bool, monkeypatch) -> None:
    model, x, context = tiny_model("t2v"), *inputs("t2v")
    plain = model(x, torch.tensor([900]), context)
    cast, calls = convert.quantize_weight, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return cast(*args, **kwargs)

    monkeypatch.setattr(convert, "quantize_weight", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        apply_recipe(model, Recipe("rowwise", backend="reference"), keep_sources=keep_sources)
    after = model(x, torch.tensor([900]), context)
    if keep_sources:
        assert torch.equal(after, plain) and recipe_of(model) is None
    else:
        assert 0.001 < relative(after, plain) < 0.02, "four of its linears are in FP8"
    monkeypatch.setattr(convert, "quantize_weight", cast)
    apply_recipe(model, Recipe("rowwise", backend="reference"))
    assert 0.02 < relative(model(x, torch.tensor([900]), context), plain) < 0.1


def test_compiled_blocks_are_refused_where_transformer_engine_multiplies() -> None:
    model = tiny_model("t2v")
    model.quantization = Quantization(Recipe("rowwise", backend="transformer_engine"), ())
    compile_blocks(model, backend="eager")
    with pytest.raises(InputError, match="Transformer Engine is called through objects that cannot be traced"):
        step(model, 900)
