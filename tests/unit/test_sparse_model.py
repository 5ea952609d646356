"""Block-sparse attention inside the transformers: the token order changes nothing, every task follows it, and what a
run reports is what happened."""

from __future__ import annotations

import json

import pytest
import test_model_animate
import test_model_s2v
import torch
from test_model_parity import inputs, relative, tiny_model
from test_step_cache import Listed

from wan_fp8 import Attention, Lora, Recipe, apply_magcache, apply_recipe, compile_blocks, set_attention, set_lora
from wan_fp8.attention import Step, attention_cores, sparsity_report
from wan_fp8.attention.sparse import Sparsity
from wan_fp8.attention.sparse.run import SparseRun
from wan_fp8.caching import Conditioning, Curve, MagCache, RunPosition, apply_cache, cache_of
from wan_fp8.errors import InputError
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.sampling import sigmas

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


def test_with_a_cache_of_steps() -> None:
    """Residuals are kept in the order of the blocks, in dense and sparse steps alike."""
    steps = 8
    schedule = tuple(sigmas(steps, 3.0, "euler").tolist())
    curve = Curve(
        "own", "t2v", schedule[:-1], (1.0, *[0.99] * (steps - 1)), None, None, models=(("only", "x"),), shape=(256, 2)
    )
    window = Sparsity(policy="density", density=1.0, bound=None, skip_first=0.4, skip_last=0.1, skip_first_blocks=0)
    results = []
    for setting in (None, Attention(sparsity=window)):
        model = set_attention(tiny_model("t2v", torch.float64), setting)
        apply_magcache(model, MagCache(0.12, 2, 0.2, curve=curve))
        x, context = (t.double() for t in inputs("t2v", frames=4, rows=16, columns=24))
        for index in range(steps):
            position = RunPosition(sigma=schedule[index], schedule=schedule, conditionings=(Conditioning("c", 0),))
            options = ForwardOptions(position=position, step=Step(index, steps))
            x = x + 0.1 * model(x, torch.tensor([1000 * schedule[index]]), context, options=options)
        cache = cache_of(model)
        assert cache is not None and cache.report.skipped > 1
        results.append(x)
    assert relative(results[1], results[0]) < 1e-10
    ran = [run for core in attention_cores(model) for run in core.sparse_runs.values()]
    assert 0 < len(ran[0].calls) < 4, "skipped passes look at nothing"
    report = sparsity_report(model)
    assert len(report) == 1 and report[0].sparse_calls == sum(len(run.calls) for run in ran)


def test_a_skipped_pass_does_not_mix_choices_up(monkeypatch) -> None:
    """Both passes in one batch, and a cache that skips one of them: what the other attends to was chosen for it."""
    steps = 10
    schedule = tuple(sigmas(steps, 3.0, "euler").tolist())
    model = set_attention(tiny_model("t2v"), half(reuse=9))
    apply_cache(model, Listed(passes=(2 * 2, 2 * 3 + 1, 2 * 4)))  # cond, uncond, cond
    attended: list[tuple[tuple, int]] = []
    plain = SparseRun.selected

    def selected(self, q, k, v, step, *rest):
        backend, selection = plain(self, q, k, v, step, *rest)
        if self.block == 0:
            attended.append((step.conditionings, selection.blocks.data_ptr()))
        return backend, selection

    monkeypatch.setattr(SparseRun, "selected", selected)
    x, context = inputs("t2v", batch=2, frames=4, rows=16, columns=24)
    conditionings = (Conditioning("u", 1), Conditioning("c", 0))
    for index in range(6):
        position = RunPosition(sigma=schedule[index], schedule=schedule, conditionings=conditionings)
        options = ForwardOptions(position=position, step=Step(index, steps))
        model(x, torch.tensor([1000 * schedule[index]] * 2), context, options=options)
    both, first, second = ("u", "c"), ("u",), ("c",)
    assert [keys for keys, _ in attended] == [both, both, first, second, first, both]
    assert len(set(attended)) == 3, "one choice for each"


def test_with_a_live_lora() -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v", frames=4, rows=16, columns=24)
    generator = torch.Generator().manual_seed(0)
    state = {
        f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight": torch.randn(shape, generator=generator) / 16
        for part, shape in (("A", (4, 256)), ("B", (256, 4)))
    }
    set_lora(model, Lora(state))
    plain = model(x, torch.tensor([900.0]), context)
    set_attention(model, ALL_BLOCKS)
    assert relative(model(x, torch.tensor([900.0]), context), plain) < 1e-5


def test_what_a_run_reports() -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v", frames=4, rows=16, columns=24)
    window = Sparsity(policy="density", density=0.5, bound=1e-6, skip_first=0.5, skip_last=0.0, skip_last_blocks=0)
    set_attention(model, Attention(sparsity=window))  # block 1 of two
    for index in range(6):
        model(x, torch.tensor([900.0]), context, options=ForwardOptions(step=Step(index, 6)))
    (report,) = sparsity_report(model)
    assert report.answered == {"dense": 9, "masked": 3} and report.sparse_calls == 3
    assert list(report.density_by_step) == [3, 4, 5] and list(report.density_by_block) == [1]
    assert report.heads == 2 and report.samples == 3
    assert report.seconds_saved is not None and report.dense_ms is not None
    text = "\n".join(report.lines())
    assert "3 of 12 self-attentions" in text and "heads dense at the end" in text and "bound of 1e-06" in text
    facts = json.loads(json.dumps(report.facts()))
    assert facts["density_by_step"].keys() == {"4", "5", "6"} and facts["bound"] == 1e-6
    table = report.calibration(6)
    assert table.shares(4, 6, 1) == pytest.approx([c for c in facts["density_by_step"].values()][:1] * 2, abs=0.5)
    model.begin_run()
    assert sparsity_report(model) == []
    model(x, torch.tensor([900.0]), context, options=ForwardOptions(step=Step(0, 6)))
    (empty,) = sparsity_report(model)
    assert empty.sparse_calls == 0 and "was not used" in empty.lines()[0] and not empty.as_asked


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
