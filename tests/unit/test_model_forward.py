"""What the forward promises besides its values: caches, padding, options, refusals."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from test_model_parity import TINY, inputs, relative, tiny_model

from wan_fp8.attention import Attention, AttentionCore, set_attention
from wan_fp8.errors import BackendUnavailableError, InputError
from wan_fp8.models import functional
from wan_fp8.models.blocks import ForwardOptions, KeptText
from wan_fp8.models.functional import RopeOptions
from wan_fp8.models.layers import Linear


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def count_rows(model, name: str) -> list[int]:
    seen: list[int] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    return seen


def test_time_mlp_runs_on_distinct_timesteps_only() -> None:
    model = tiny_model("ti2v")
    x, context = inputs("ti2v", batch=2)
    seen = count_rows(model, "time_projection.1")
    model(x, torch.tensor([[0.0, 650.0, 650.0]] * 2), context)
    model(x, torch.tensor([900.0, 900.0]), context)
    assert seen == [2, 2]


def test_text_keys_and_values_are_computed_once_per_prompt() -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v")
    keys, projections = count_rows(model, "blocks.1.cross_attn.k"), count_rows(model, "text_embedding.0")
    first = model(x, torch.tensor([900]), context)
    again = model(x, torch.tensor([900]), context)
    assert torch.equal(first, again)
    assert len(keys) == len(projections) == 1
    model(x, torch.tensor([900]), context.clone())
    assert len(keys) == 2, "another tensor is another prompt"
    model(x, torch.tensor([900]), context.clone(), options=ForwardOptions(text_key="positive"))
    model(x, torch.tensor([900]), context.clone(), options=ForwardOptions(text_key="positive"))
    assert len(keys) == 3, "a named prompt is known by its name"
    model.clear_text_cache()
    model(x, torch.tensor([900]), context, options=ForwardOptions(cache_text=False))
    model(x, torch.tensor([900]), context, options=ForwardOptions(cache_text=False))
    assert len(keys) == 5


def test_a_reused_address_is_not_the_same_prompt() -> None:
    model = tiny_model("t2v")
    x, _ = inputs("t2v")
    results = []
    for seed in range(6):
        context = torch.randn(1, 12, 4096, generator=torch.Generator().manual_seed(seed))
        results.append(model(x, torch.tensor([900]), context))
        del context
        gc.collect()
    assert all(relative(a, b) > 1e-3 for a, b in itertools.pairwise(results))


def test_a_context_changed_in_place_is_another_prompt() -> None:
    with torch.inference_mode(False):
        model = tiny_model("t2v")
        x, context = inputs("t2v")
        with torch.no_grad():
            before = model(x, torch.tensor([900]), context)
            context.mul_(0.5)
            after = model(x, torch.tensor([900]), context)
    assert relative(after, before) > 1e-3


@pytest.mark.parametrize("name", ["t2v", "ti2v"])
@pytest.mark.parametrize("multiple", [16, 128])
def test_padding_changes_nothing(name: str, multiple: int) -> None:
    model = tiny_model(name, torch.float64)
    x, context = (t.double() for t in inputs(name, batch=2))
    timestep = torch.tensor([[0.0, 650.0, 650.0]] * 2) if name == "ti2v" else torch.tensor([900.0, 30.0])
    plain = model(x, timestep, context)
    lengths = []
    model.blocks[0].ffn[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.token_multiple = multiple
    assert relative(model(x, timestep, context), plain) < 1e-13
    assert lengths == [-(-36 // multiple) * multiple]


def test_one_frame_and_one_token() -> None:
    model = tiny_model("t2v")
    for size in ((1, 2, 2), (1, 6, 8)):
        x, context = inputs("t2v", frames=size[0], rows=size[1], columns=size[2])
        assert model(x, torch.tensor([5]), context).shape == x.shape


def test_block_replacement_and_attention_override() -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v")
    timestep = torch.tensor([900])
    plain = model(x, timestep, context)
    calls: list[str] = []

    def same(args, extra):
        calls.append("block")
        assert args["transformer_options"] == {"mine": 1}
        return extra["original_block"](args)

    def override(func, q, k, v, heads, mask=None, transformer_options=None):
        calls.append(f"attention {q.shape[1]}x{k.shape[1]}")
        assert transformer_options == {"mine": 1}
        return func(q, k, v, heads, mask=mask)

    options = ForwardOptions(block_replace={1: same}, attention_override=override, host_options={"mine": 1})
    assert torch.equal(model(x, timestep, context, options=options), plain)
    assert calls == ["attention 36x36", "attention 36x12", "block", "attention 36x36", "attention 36x12"]

    skip = ForwardOptions(block_replace={1: lambda args, extra: args})
    skipped = model(x, timestep, context, options=skip)
    model.blocks = model.blocks[:1]
    assert torch.equal(skipped, model(x, timestep, context))


def test_rope_options_move_and_stretch_positions() -> None:
    model = tiny_model("t2v", torch.float64)
    x, context = (t.double() for t in inputs("t2v"))
    timestep = torch.tensor([900])
    plain = model(x, timestep, context)
    shifted = model(x, timestep, context, options=ForwardOptions(rope=RopeOptions(shift_t=3.0, shift_x=1.0)))
    assert relative(shifted, plain) < 1e-12, "attention sees differences of positions only"
    stretched = model(x, timestep, context, options=ForwardOptions(rope=RopeOptions(scale_t=2.0)))
    assert relative(stretched, plain) > 1e-4


def test_stack_wrappers_nest_in_order_and_come_off() -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v")
    plain = model(x, torch.tensor([900]), context)
    calls = []

    def wrapper(name):
        def wrap(tokens, state, stack):
            calls.append(name)
            return stack(tokens, state)

        return wrap

    model.stack_wrappers["outer"] = wrapper("outer")
    model.stack_wrappers["inner"] = wrapper("inner")
    assert torch.equal(model(x, torch.tensor([900]), context), plain)
    assert calls == ["outer", "inner"]
    del model.stack_wrappers["outer"], model.stack_wrappers["inner"]
    model(x, torch.tensor([900]), context)
    assert calls == ["outer", "inner"]


def test_every_parameter_is_read_through_the_door() -> None:
    """A host that moves or patches weights sees every one of them asked for, and given back."""
    model = tiny_model("t2v")
    asked, returned = set(), set()

    class Recording:
        def fetch(self, module, like):
            asked.add(module)
            return module.weight.to(like.dtype), None if module.bias is None else module.bias.to(like.dtype), "ticket"

        def release(self, module, weight, bias, handle):
            assert handle == "ticket"
            returned.add(module)

    leaves = [m for m in model.modules() if "weight" in m._parameters]
    for leaf in leaves:
        leaf.weight_source = Recording()
    x, context = inputs("t2v")
    model(x, torch.tensor([900]), context)
    assert asked == returned == set(leaves)


def test_fp8_weight_with_scale_is_dequantised() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(64, 32)
    value = torch.randn(32, 64, generator=generator)
    scale = value.abs().amax(1, keepdim=True) / 448
    layer.weight = torch.nn.Parameter((value / scale).clamp(-448, 448).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    layer.bias = torch.nn.Parameter(torch.zeros(32), requires_grad=False)
    x = torch.randn(5, 64, generator=generator)
    assert 0.02 < relative(layer(x), x @ value.T) < 0.03
    assert relative(layer(x), x @ (layer.weight.float() * scale).T) < 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": (1, 20, 3, 6, 8)}, "takes latents"),
        ({"x": (1, 16, 3, 7, 8)}, "multiples of"),
        ({"context": (1, 12, 768)}, "UMT5-XXL"),
        ({"context": (2, 12, 4096)}, "batch size"),
        ({"timestep": (4,)}, "timestep takes"),
        ({"timestep": (1, 5)}, "timestep takes"),
    ],
)
def test_wrong_shapes_get_a_sentence(change: dict, words: str) -> None:
    model = tiny_model("t2v")
    shapes = {"x": (1, 16, 3, 6, 8), "timestep": (1,), "context": (1, 12, 4096)} | change
    with pytest.raises(InputError, match=words):
        model(**{name: torch.zeros(shape) for name, shape in shapes.items()})


def test_unknown_inputs_are_refused() -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v")
    with pytest.raises(InputError, match="pose_latents"):
        model(x, torch.tensor([900]), context, pose_latents=x)
    with pytest.raises(InputError, match="CLIP"):
        model(x, torch.tensor([900]), context, clip_fea=torch.zeros(1, 257, 1280))


def test_attention_settings() -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v")
    auto = model(x, torch.tensor([900]), context)
    assert set_attention(model, Attention("reference")) is model
    assert relative(model(x, torch.tensor([900]), context), auto) < 1e-5
    core = next(m for m in model.modules() if isinstance(m, AttentionCore))
    assert core.resolve(torch.zeros(1, 4, 2, 128), torch.zeros(1, 4, 2, 128)).backend.name == "reference"
    set_attention(model, None)
    assert torch.equal(model(x, torch.tensor([900]), context), auto)
    with pytest.raises(InputError, match="choose one of auto"):
        Attention("fa9")
    set_attention(model, Attention("fa3"))
    with pytest.raises(BackendUnavailableError, match="Hopper"):
        model(x, torch.tensor([900]), context)


def test_auto_says_why_others_were_refused() -> None:
    core = AttentionCore()
    resolution = core.resolve(torch.zeros(1, 4, 2, 128), torch.zeros(1, 4, 2, 128))
    assert resolution.backend.name == "sdpa"
    assert "Hopper" in resolution.refused["fa3"]
    assert "NVIDIA" in resolution.refused["cudnn"]


def test_specs_count_the_published_parameters() -> None:
    """14.288 B, 14.289 B and 5.000 B: the sizes of the released checkpoints."""
    from wan_fp8.models.specs import SPECS
    from wan_fp8.models.wan import build_model

    billions = {"t2v-A14B": 14.288, "i2v-A14B": 14.289, "ti2v-5B": 5.000}
    for name, expected in billions.items():
        with torch.device("meta"):
            model = build_model(SPECS[name])
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(expected, abs=1e-3)
    assert TINY["t2v"].head_dim == 128


def test_rotary_tables_are_built_once_a_shape(monkeypatch) -> None:
    built, original = [], functional.rope_table
    monkeypatch.setattr(functional, "rope_table", lambda *args: built.append(1) or original(*args))
    model = tiny_model("t2v")
    for frames in (3, 3, 5, 3, 5):
        x, context = inputs("t2v", frames=frames)
        model(x, torch.tensor([900.0]), context)
    assert len(built) == 2


def test_kept_text_of_a_prompt_that_is_trained() -> None:
    """Keys and values with derivatives are not written into memory that all blocks share; nor is there room for a block
    that was not counted."""
    room = [torch.zeros(2, 1, 3, 2, 4) for _ in range(2)]
    kept = KeptText(room)
    trained = tuple(torch.ones(1, 3, 2, 4, requires_grad=True) for _ in range(2))
    assert all(a is b for a, b in zip(kept.of_block(0, lambda: trained), trained, strict=True)) and not room[0].any()
    plain = tuple(torch.ones(1, 3, 2, 4) for _ in range(2))
    assert kept.of_block(1, lambda: plain)[0].data_ptr() == room[0][1].data_ptr() and room[1][1].all()
    assert kept.of_block(2, lambda: plain)[0] is plain[0]
