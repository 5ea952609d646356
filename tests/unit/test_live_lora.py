"""Live LoRAs on engine models: every format against a merge by hand, errors under FP8, and nothing left behind."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from checkpoint_kit import official_state, tiny_spec
from test_checkpoint_lora import FORMATS, RANK, diffusers, lora_state, pairs
from test_model_parity import inputs, relative, tiny_model
from torch import Tensor

from wan_fp8 import Lora, Recipe, apply_recipe, compile_blocks, remove_lora, remove_recipe, set_lora
from wan_fp8.checkpoint.live_lora import split
from wan_fp8.checkpoint.lora import delta, fit, read_lora
from wan_fp8.checkpoint.save import save_checkpoint
from wan_fp8.errors import CheckpointError, InputError
from wan_fp8.kernels import low_rank
from wan_fp8.kernels.quantize import Cast, Granularity, quantize, quantize_current, quantize_weight, spread_scale
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.layers import Linear
from wan_fp8.models.low_rank import LiveLora, LiveTerm
from wan_fp8.models.wan import WanModel, build_model
from wan_fp8.quant.recipe import GRANULARITIES, LINEARS

STRENGTH = 0.7


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def lora_file(
    model: WanModel, rank: int = 4, seed: int = 5, scale: float = 0.3, only: tuple[str, ...] = LINEARS
) -> dict[str, Tensor]:
    """A pair for the linears of every block; changes of a third of the weights' size."""
    generator = torch.Generator().manual_seed(seed)
    file = {}
    for index, block in enumerate(model.blocks):
        for name in only:
            linear = block.get_submodule(name)
            key = f"diffusion_model.blocks.{index}.{name}"
            file[f"{key}.lora_A.weight"] = (
                torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
            )
            file[f"{key}.lora_B.weight"] = (
                torch.randn(linear.out_features, rank, generator=generator) * scale / rank**0.5
            )
    return file


def merged(model: WanModel, *loras: tuple[dict[str, Tensor], float]) -> WanModel:
    """The same model with the changes added to its weights in float64."""
    other = copy.deepcopy(model)
    shapes = {name: tuple(p.shape) for name, p in other.named_parameters()}
    for file, strength in loras:
        for name, entries in fit(read_lora(file), shapes).entries.items():
            parameter = other.get_parameter(name)
            value = parameter.double()
            for entry in entries:
                value = value + delta(entry, strength, torch.float64, shape=shapes[name]).to(value.device)
            parameter.data = value.to(parameter.dtype)
    return other


def run(model: WanModel, kind: str = "t2v", batch: int = 1, text: int = 0, **options) -> Tensor:
    x, context = inputs(kind, batch)
    timestep = torch.tensor([900.0, 300.0][:batch])
    dtype = model.compute_dtype
    return model(
        x.to(dtype), timestep, context.roll(text, 1).to(dtype), options=ForwardOptions(text_key=text, **options)
    )


def snapshot(model: WanModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: WanModel, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        torch.equal(now[k].float(), before[k].float()) and now[k].dtype == before[k].dtype for k in now
    )


def reference(name: str, **options) -> Recipe:
    return Recipe(name, backend="reference", **options)


# ---- high precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_equals_the_merge(form: str, alpha: float | None) -> None:
    """Linears of blocks, text and time embedding, projection and head: in float32 the branch is the merge."""
    spec = tiny_spec("t2v", dim=256)
    weights = official_state(spec)
    changes = pairs(alpha=alpha)

    def model(extra: float = 0.0) -> WanModel:
        with torch.device("meta"):
            net = build_model(spec)
        state = {name: value.double() for name, value in weights.items()}
        for module, change in changes.items():
            factor = extra * (1.0 if alpha is None else alpha / RANK)
            state[f"{module}.weight"] += factor * change.up.double() @ change.down.double()
        net.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
        return net

    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    context = torch.randn(1, 6, spec.text_dim, generator=torch.Generator().manual_seed(2))
    timestep = torch.tensor([700.0])
    net = model()
    plain, before = net(x, timestep, context), snapshot(net)
    expected = model(0.02)(x, timestep, context)
    assert relative(expected, plain) > 0.05
    state = lora_state(form, changes)
    set_lora(net, Lora(state, 0.02, expert="low_noise" if "transformer_2" in next(iter(state)) else None))
    assert net.merged_by_lora == {}
    assert relative(net(x, timestep, context), expected) < 1e-5
    assert same(net, before), "no weight was touched"
    remove_lora(net)
    assert torch.equal(net(x, timestep, context), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_several_add_up_and_go_without_a_trace(dtype: torch.dtype, batch: int) -> None:
    model = tiny_model("t2v", dtype)
    exact = tiny_model("t2v")
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    first, second = lora_file(model, rank=4), lora_file(model, rank=24, seed=6, only=("self_attn.q", "ffn.2"))
    plain = run(model, batch=batch)
    expected = run(merged(exact, (first, STRENGTH), (second, -0.4)), batch=batch)
    noise = relative(plain, run(exact, batch=batch))
    assert set_lora(model, Lora(first, STRENGTH), Lora(second, -0.4)) is model
    both = run(model, batch=batch)
    assert relative(expected, plain) > 0.1
    assert relative(both, expected) < 1.3 * noise + 1e-5, "no worse than the type itself"
    set_lora(model, Lora(second, -0.4), Lora(first, STRENGTH))
    assert relative(run(model, batch=batch), both) < 0.3 * noise + 1e-5, "the order does not matter"
    set_lora(model, Lora(first, STRENGTH), Lora(second, 0.0))
    alone = run(model, batch=batch)
    set_lora(model, Lora(first, STRENGTH))
    assert torch.equal(run(model, batch=batch), alone), "strength 0 is no LoRA"
    set_lora(model, Lora(first, STRENGTH))
    assert torch.equal(run(model, batch=batch), alone), "setting it again changes nothing"
    set_lora(model, Lora(first, 0.0))
    assert model.lora is None and torch.equal(run(model, batch=batch), plain)
    set_lora(model, Lora(first, STRENGTH))
    run(model, batch=batch)
    assert remove_lora(model) is model and torch.equal(run(model, batch=batch), plain)
    assert torch.equal(run(remove_lora(model), batch=batch), plain), "removing nothing is nothing"


def test_what_has_no_low_rank_is_merged_and_put_back(caplog) -> None:
    model = tiny_model("t2v")
    generator = torch.Generator().manual_seed(9)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    names = {
        "blocks.0.modulation": "blocks.0.diff_m",
        "blocks.1.self_attn.q.bias": "blocks.1.self_attn.q.diff_b",
        "blocks.0.norm3.weight": "blocks.0.norm3.diff",
        "blocks.0.ffn.0.weight": "blocks.0.ffn.0.diff",
        "head.head.weight": "head.head.diff",
        "patch_embedding.weight": "patch_embedding.diff",
    }
    extras = {
        f"diffusion_model.{key}": 0.1 * torch.randn(shapes[name], generator=generator) for name, key in names.items()
    }
    file = {**lora_file(model), **extras}
    expected, plain, before = run(merged(model, (file, STRENGTH))), run(model), snapshot(model)
    parameters = dict(model.named_parameters())
    with caplog.at_level(logging.INFO, "wan_fp8"):
        set_lora(model, Lora(file, STRENGTH))
    assert model.merged_by_lora.keys() == names.keys()
    assert "6 parameters cannot be changed by a live branch and are merged" in caplog.text
    assert relative(run(model), expected) < 1e-5
    set_lora(model, Lora(file, 0.2))
    assert relative(run(model), run(merged(tiny_model("t2v"), (file, 0.2)))) < 1e-5, "from the originals again"
    remove_lora(model)
    assert same(model, before) and torch.equal(run(model), plain)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_dora_and_convolutions_are_merged() -> None:
    model = tiny_model("t2v")
    q = "diffusion_model.blocks.0.self_attn.q"
    generator = torch.Generator().manual_seed(3)
    file = {
        f"{q}.lora_A.weight": torch.randn(4, 256, generator=generator) / 16,
        f"{q}.lora_B.weight": torch.randn(256, 4, generator=generator),
        f"{q}.dora_scale": 1 + 0.1 * torch.randn(256, 1, generator=generator),
        "diffusion_model.patch_embedding.lora_A.weight": torch.randn(4, 16, 1, 2, 2, generator=generator),
        "diffusion_model.patch_embedding.lora_B.weight": torch.randn(256, 4, 1, 1, 1, generator=generator),
    }
    parts = split(fit(read_lora(file), {n: tuple(p.shape) for n, p in model.named_parameters()}).entries, model)
    assert not parts.live and "(DoRA, convolutions: " in str(parts.describe_rest())
    plain = run(model)
    weight = model.blocks[0].self_attn.q.weight.double()
    set_lora(model, Lora(file, 1.0))
    changed = weight + file[f"{q}.lora_B.weight"].double() @ file[f"{q}.lora_A.weight"].double()
    exact = file[f"{q}.dora_scale"].double() * changed / changed.norm(dim=1, keepdim=True)
    assert relative(model.blocks[0].self_attn.q.weight, exact) < 1e-6
    assert model.lora is None and set(model.merged_by_lora) == {"blocks.0.self_attn.q.weight", "patch_embedding.weight"}
    assert torch.equal(run(remove_lora(model)), plain)


def test_saving_is_refused(tmp_path) -> None:
    model = tiny_model("t2v")
    down, up = torch.randn(4, 256) / 16, torch.randn(256, 4)
    key = "diffusion_model.blocks.0.self_attn.q"
    set_lora(model, Lora({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}))
    with pytest.raises(InputError, match=r"live LoRAs.*remove_lora"):
        save_checkpoint(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    save_checkpoint(remove_lora(model), tmp_path / "a.safetensors")


def test_two_experts_in_one_file() -> None:
    model = tiny_model("t2v")
    down, up = torch.randn(4, 256) / 16, torch.randn(256, 4)
    key = diffusers("blocks.0.self_attn.q")
    file = {
        f"{component}.{key}.lora_{part}.weight": sign * value
        for component, sign in (("transformer", 1), ("transformer_2", -1))
        for part, value in (("A", down), ("B", up * sign))
    }
    file["transformer_2." + key + ".lora_B.weight"] = 2 * up
    with pytest.raises(InputError, match="both experts"):
        set_lora(model, Lora(file))
    plain = run(model)
    set_lora(model, Lora(file, expert="high_noise"))
    high = run(model)
    set_lora(model, Lora(file, expert="low_noise"))
    assert relative(run(model), high) > 0.01 < relative(high, plain)


def test_a_bad_lora_changes_nothing() -> None:
    model = tiny_model("t2v")
    good = lora_file(model)
    set_lora(model, Lora(good, STRENGTH))
    kept = run(model)
    wrong = {
        "blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 64),
        "blocks.0.self_attn.q.lora_B.weight": torch.zeros(64, 4),
    }
    with pytest.raises(CheckpointError, match="another model"):
        set_lora(model, Lora(good, 0.1), Lora(wrong))
    assert torch.equal(run(model), kept)
    found = fit(read_lora(good), {n: tuple(p.shape) for n, p in model.named_parameters()}).entries
    stranger = LiveLora((LiveTerm("x", 1.0, {"blocks.9.self_attn.q": found["blocks.0.self_attn.q.weight"][0]}),))
    with pytest.raises(InputError, match=r"blocks\.9\.self_attn\.q, which is no linear"):
        run(model, lora=stranger)
    assert torch.equal(run(model), kept)


def test_a_recipe_between_merge_and_removal_is_refused() -> None:
    model = tiny_model("t2v")
    file = {"diffusion_model.blocks.0.ffn.0.diff": torch.randn(384, 256)}
    apply_recipe(set_lora(model, Lora(file)), reference("rowwise"))
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.0\.weight has changed since"):
        remove_lora(model)
    remove_recipe(model)
    with pytest.raises(InputError, match="has changed since"):
        remove_lora(model)


# ---- what belongs to a run -------------------------------------------------------------------------------------------


def test_a_forward_may_bring_its_own() -> None:
    model = tiny_model("t2v")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    live = split(fit(read_lora(lora_file(model)), shapes).entries, model).live
    weak, strong = (LiveLora((LiveTerm("a", strength, live),)) for strength in (0.2, 1.0))
    assert copy.deepcopy(weak) is weak
    plain, first, second = run(model), run(model, lora=weak), run(model, lora=strong)
    assert relative(second, plain) > 2 * relative(first, plain) > 0.02
    for lora, expected in ((weak, first), (None, plain), (strong, second), (weak, first)):
        assert torch.equal(run(model, lora=lora), expected), "text keys and values follow"
    branches = [m for m in model.modules() if isinstance(m, Linear) and m.low_rank is not None]
    assert len(branches) == 20
    held = sum(b.low_rank.down_RD.nbytes + b.low_rank.up_NR.nbytes for b in branches)
    assert weak.device_bytes(torch.float32) == held
    model.begin_run()
    assert not any(isinstance(m, Linear) and m.low_rank is not None for m in model.modules())
    assert not any("low_rank" in vars(m) for m in model.modules())


def test_text_keys_and_values_follow_a_change_of_strength() -> None:
    model = tiny_model("t2v")
    file = lora_file(model, only=("cross_attn.k", "cross_attn.v"))
    plain = run(model)
    set_lora(model, Lora(file, 1.0))
    full = run(model)
    assert relative(full, plain) > 0.01
    set_lora(model, Lora(file, 0.5))
    half = run(model)
    assert relative(half, full) > 0.005
    assert torch.equal(run(remove_lora(model)), plain)


@pytest.mark.parametrize("recipe", ["none", "rowwise"])
def test_nothing_is_compiled_again(recipe: str) -> None:
    model = apply_recipe(tiny_model("t2v"), reference(recipe))
    files = [lora_file(model, rank=8, seed=seed) for seed in (5, 6)]
    plain = run(model)
    compile_blocks(model, backend="eager", fullgraph=True)
    run(model)
    parts = next(iter(model.compiled_parts.values()))
    without = parts.graphs
    set_lora(model, Lora(files[0], 1.0))
    run(model)
    with_it, expected = parts.graphs, {}
    assert with_it > without
    for seed, strength in ((0, 1.0), (0, 0.3), (1, -0.5)):
        set_lora(model, Lora(files[seed], strength))
        model.begin_run()
        expected[seed, strength] = run(model)
        assert parts.graphs == with_it
    set_lora(model, Lora(files[0], 0.3))
    x = torch.randn(1, 16, 5, 4, 6)
    model(x, torch.tensor([5.0]), inputs("t2v")[1])
    assert parts.graphs == with_it, "nor for another size"
    model.compile_setting = None
    for (seed, strength), compiled in expected.items():
        set_lora(model, Lora(files[seed], strength))
        assert torch.equal(run(model), compiled)
    model.compile_setting = parts.setting
    assert torch.equal(run(remove_lora(model)), plain) and parts.graphs == with_it


# ---- FP8 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [(), ("self_attn.k",)], ids=["shared input", "k in high precision"])
@pytest.mark.parametrize("name", GRANULARITIES)
def test_under_every_recipe(name: str, keep: tuple[str, ...]) -> None:
    """Against the exact merge: FP8 ran (the lower bound), and no worse than merging and casting once."""
    exact, file = tiny_model("t2v"), lora_file(tiny_model("t2v"))
    model = apply_recipe(tiny_model("t2v"), reference(name, keep=keep))
    before, plain = snapshot(model), run(model)
    truth = run(merged(exact, (file, STRENGTH)), batch=2)
    once = run(apply_recipe(merged(exact, (file, STRENGTH)), reference(name, keep=keep)), batch=2)
    set_lora(model, Lora(file, STRENGTH))
    model.begin_run()
    live = run(model, batch=2)
    assert 0.01 < relative(live, truth) < 1.15 * relative(once, truth) < 0.06
    assert relative(live, run(exact, batch=2)) > 0.15, "the LoRA does something"
    assert same(model, before)
    remove_lora(model)
    model.begin_run()
    assert torch.equal(run(model), plain)


def test_with_weights_in_fp8_alone() -> None:
    """Inputs in high precision: the branch is the exact change, what is left is the rounding of the weights."""
    exact, recipe = tiny_model("t2v"), Recipe("rowwise", backend="weight-only")
    file = lora_file(exact)
    truth = run(merged(exact, (file, STRENGTH)))
    once = run(apply_recipe(merged(exact, (file, STRENGTH)), recipe))
    model = apply_recipe(tiny_model("t2v"), recipe)
    plain = run(model)
    live = run(set_lora(model, Lora(file, STRENGTH)))
    assert 0.005 < relative(live, truth) < 1.1 * relative(once, truth) < 0.05
    assert relative(plain, truth) > 0.1
    assert torch.equal(run(remove_lora(model)), plain)


def product_errors(granularity: Granularity) -> dict[str, float]:
    """Relative errors of one linear's output against the exact merge of the high-precision weight: tokens of a
    transformer's width, and a change of a third of the weight's size."""
    activations, weights, low = (torch.Generator().manual_seed(seed) for seed in (1, 2, 3))
    tokens, width, out, rank = 256, 1024, 512, 64
    x = torch.randn(1, tokens, width, generator=activations)
    weight = torch.randn(out, width, generator=weights) / width**0.5
    down = torch.randn(rank, width, generator=low) / width**0.5
    up = 0.3 * torch.randn(out, rank, generator=low) / rank**0.5
    change = up.double() @ down.double()
    power = granularity is Granularity.BLOCK
    made = quantize_current(x) if granularity is Granularity.TENSOR else quantize(x, Cast(granularity, power))

    def cast(value: Tensor) -> Tensor:
        qdata, scale = quantize_weight(value, granularity, power_of_2=power)
        return qdata.double() * spread_scale(scale, value.shape).double()

    real, given = made.dequantized(torch.float64)[0], x[0].double()
    truth = given @ (weight.double() + change).t()
    thin = given @ change.t()
    base = real @ cast(weight).t()
    b16 = up.bfloat16().double()
    hidden = low_rank.project(made, down.bfloat16()).double()
    coarse, scale = quantize_weight(down, Granularity.ROW)
    eighth = real @ (coarse.double() * scale.double()).t()
    plain = F.linear(x.bfloat16()[0], down.bfloat16()).double()

    def off(y: Tensor) -> float:
        return float((y - truth).norm() / truth.norm())

    def alone(y: Tensor) -> float:
        return float((y @ b16.t() - thin).norm() / thin.norm())

    return {
        "merged from the source": off(real @ cast((weight.double() + change).float()).t()),
        "merged from FP8": off(real @ cast((cast(weight) + change).float()).t()),
        "live": off(base + hidden @ b16.t()),
        "branch, A in bf16 on the FP8 input": alone(hidden),
        "branch, A in FP8": alone(eighth),
        "branch, bf16 input": alone(plain),
    }


@pytest.mark.parametrize("granularity", list(Granularity))
def test_errors_of_one_linear(granularity: Granularity) -> None:
    """The table of docs/lora.md. The base product's own error is the same everywhere; the branch adds none that shows,
    and costs half of what an A in FP8 would."""
    errors = product_errors(granularity)
    assert 0.034 < errors["merged from the source"] < 0.042
    assert 1.1 < errors["merged from FP8"] / errors["merged from the source"] < 1.35
    assert 0.9 < errors["live"] / errors["merged from the source"] < 1.02
    assert 0.024 < errors["branch, A in bf16 on the FP8 input"] < 0.032
    assert 1.3 < errors["branch, A in FP8"] / errors["branch, A in bf16 on the FP8 input"] < 1.5
    assert 0.001 < errors["branch, bf16 input"] < 0.005


def test_weight_errors_of_a_merge() -> None:
    """From the source 0.026, from the FP8 values 0.036: what live LoRAs avoid where the source is gone."""
    model, exact = tiny_model("t2v", torch.bfloat16), tiny_model("t2v", torch.bfloat16)
    value = torch.randn(384, 256, generator=torch.Generator().manual_seed(1)) * 0.02
    file = {"diffusion_model.blocks.0.ffn.0.diff": value}
    want = exact.blocks[0].ffn[0].weight.float() + value
    errors = {}
    for keep in (True, False):
        fp8 = apply_recipe(tiny_model("t2v", torch.bfloat16), reference("rowwise"), keep_sources=keep)
        layer = fp8.blocks[0].ffn[0]
        stored = layer.weight
        set_lora(fp8, Lora(file))
        errors[keep] = relative(layer.dequantized(layer.weight, torch.float32), want)
        assert layer.weight is not stored
        remove_lora(fp8)
        assert layer.weight is stored and layer.current_scale() is layer.weight_scale and layer._merged is None
    assert 0.024 < errors[True] < 0.028 and 0.034 < errors[False] < 0.039, errors
    assert model.lora is None
