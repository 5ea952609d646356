"""Block-sparse attention inside the transformers: the token order changes nothing, every task follows it, and what a
run reports is what happened."""

from __future__ import annotations

import pytest
import test_model_animate
import test_model_s2v
import torch
from test_model_parity import inputs, relative, tiny_model

from wan_fp8 import Attention, Recipe, apply_recipe, compile_blocks, set_attention
from wan_fp8.attention import Step, attention_cores
from wan_fp8.attention.sparse import Sparsity
from wan_fp8.errors import InputError
from wan_fp8.models.blocks import ForwardOptions

EVERYWHERE = {"skip_first": 0.0, "skip_last": 0.0, "skip_first_blocks": 0, "skip_last_blocks": 0}
ALL_BLOCKS = Attention(sparsity=Sparsity(policy="density", density=1.0, bound=None, **EVERYWHERE))
NEVER = Attention(sparsity=Sparsity(skip_first=0.9, skip_last=0.05))
FIRST = ForwardOptions(step=Step(0, 10))


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def half(**more) -> Attention:
    return Attention(sparsity=Sparsity(policy="density", density=0.5, bound=None, **EVERYWHERE, **more))


@pytest.mark.parametrize("setting", [ALL_BLOCKS, NEVER], ids=["all blocks", "outside the window"])
@pytest.mark.parametrize("name", ["t2v", "i2v", "ti2v"])
def test_the_order_of_tokens_changes_nothing(name: str, setting: Attention) -> None:
    model = tiny_model(name, torch.float64)
    x, context = (t.double() for t in inputs(name, batch=2, frames=4, rows=16, columns=24))
    timestep = torch.tensor([[0.0, 650.0, 650.0, 650.0]] * 2) if name == "ti2v" else torch.tensor([900.0, 30.0])
    plain = model(x, timestep, context)
    for multiple in (1, 160):
        model.token_multiple = multiple
        assert relative(model(x, timestep, context, options=FIRST), plain) < 1e-12
        set_attention(model, setting)
        assert relative(model(x, timestep, context, options=FIRST), plain) < 1e-12
        answered = [run.answered for core in attention_cores(model) for run in core.sparse_runs.values()]
        assert [dict(a) for a in answered] == [{"masked" if setting is ALL_BLOCKS else "dense": 1}] * 2
        set_attention(model, None)


@pytest.mark.parametrize("batch", [1, 2])
def test_s2v_follows_the_order(batch: int) -> None:
    model = test_model_s2v.tiny(dtype=torch.float64)
    given = test_model_s2v.inputs(batch, 19, torch.float64)
    plain = model(**given)
    set_attention(model, ALL_BLOCKS)
    assert relative(model(**given), plain) < 1e-10
    model.token_multiple = 96
    assert relative(model(**given), plain) < 1e-10


def test_animate_follows_the_order() -> None:
    model = test_model_animate.tiny()
    given = test_model_animate.inputs(2)
    plain = model(**given)
    set_attention(model, ALL_BLOCKS)
    assert relative(model(**given), plain) < 1e-5
    model.token_multiple = 96
    assert relative(model(**given), plain) < 1e-5
    assert relative(model(**given), model(**given, options=ForwardOptions(attention=Attention()))) < 1e-5


def test_cross_attention_stays_dense() -> None:
    model = set_attention(tiny_model("t2v"), half())
    x, context = inputs("t2v", frames=4, rows=16, columns=24)
    model(x, torch.tensor([900.0]), context)
    ran = [bool(core.sparse_runs) for core in attention_cores(model)]
    assert ran == [not core.always_exact for core in attention_cores(model)] and sum(ran) == 2


def test_half_of_the_blocks_is_another_result_and_is_measured() -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v", frames=4, rows=16, columns=24)
    plain = model(x, torch.tensor([900.0]), context)
    set_attention(model, half())
    sparse = model(x, torch.tensor([900.0]), context)
    assert 1e-4 < relative(sparse, plain) < 1
    (run,) = attention_cores(model)[0].sparse_runs.values()
    (call,) = run.calls
    assert call.density.tolist() == pytest.approx([2 / 3, 2 / 3])  # 2 of 3 blocks are the half, rounded up
    assert float(call.found.dropped.min()) > 0 and float(call.found.worst.max()) < 1
    set_attention(model, half())
    assert torch.equal(model(x, torch.tensor([900.0]), context), sparse), "a fresh run makes the same choices"


def test_replaced_blocks_see_the_frame_order() -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v", frames=4, rows=16, columns=24)
    plain = model(x, torch.tensor([900.0]), context)
    seen = []

    def replace(args, extra):
        seen.append((args["img"], args["pe"][0]))
        return extra["original_block"](args)

    options = [ForwardOptions(block_replace={0: replace}, attention=a) for a in (None, ALL_BLOCKS)]
    results = [model(x, torch.tensor([900.0]), context, options=o) for o in options]
    assert all(relative(r, plain) < 1e-5 for r in results)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])


def test_with_recipe_and_compile() -> None:
    model = apply_recipe(tiny_model("t2v"), Recipe("rowwise", backend="reference"))
    x, context = inputs("t2v", frames=4, rows=16, columns=24)
    plain = model(x, torch.tensor([900.0]), context)
    set_attention(model, ALL_BLOCKS)
    assert relative(model(x, torch.tensor([900.0]), context), plain) < 1e-2
    model = tiny_model("t2v")
    plain = model(x, torch.tensor([900.0]), context)
    compile_blocks(set_attention(model, ALL_BLOCKS), backend="eager")
    assert relative(model(x, torch.tensor([900.0]), context), plain) < 1e-5


def test_what_cannot_be_honoured_is_refused() -> None:
    model = set_attention(tiny_model("t2v"), Attention(sparsity=Sparsity()))
    x, context = inputs("t2v")
    with pytest.raises(InputError, match="does not say its step"):
        set_attention(model, Attention(sparsity=Sparsity(skip_first_blocks=0, skip_last_blocks=0)))
        model(x, torch.tensor([900.0]), context)
    with pytest.raises(InputError, match="replaces the attention"):
        model(x, torch.tensor([900.0]), context, options=ForwardOptions(attention_override=lambda *a, **k: None))
    core = attention_cores(model)[0]
    set_attention(model, half())
    core.layout = None
    q = torch.randn(1, 200, 2, 128)
    with pytest.raises(InputError, match="needs all 300 tokens"):
        core(q, torch.randn(1, 300, 2, 128), torch.randn(1, 300, 2, 128))
