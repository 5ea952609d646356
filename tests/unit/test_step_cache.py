"""How passes are skipped: against a loop written out by hand, on tiny models, in one batch and in two calls."""

from __future__ import annotations

import dataclasses
import gc
from collections import Counter
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from test_model_parity import inputs, relative, tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode

import wan_fp8
from wan_fp8.caching import (
    Conditioning,
    Curve,
    Decision,
    EasyCache,
    MagCache,
    Policy,
    Recording,
    RunPosition,
    Taylor,
    Tracker,
    apply_cache,
    apply_magcache,
    cache_of,
    remove_magcache,
)
from wan_fp8.errors import InputError
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.layers import Leaf
from wan_fp8.models.wan import WanModel
from wan_fp8.sampling import Euler, sigmas

STEPS = 10
SCHEDULE = tuple(sigmas(STEPS, 3.0, "euler").tolist())
COND, UNCOND = Conditioning("c", 0), Conditioning("u", 1)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@dataclasses.dataclass(frozen=True)
class Listed(Policy):
    """Skips the passes of a list."""

    name: ClassVar[str] = "Listed"
    passes: tuple[int, ...] = ()

    def start(self, plan):
        return ListedTracker(self.passes)


class ListedTracker(Tracker):
    def __init__(self, passes):
        self.passes = passes

    def decide(self, step, kind, key, tokens_BSD, kinds):
        return Decision(2 * step + kind in self.passes, error=0.01 * step)


def both(*steps: int) -> tuple[int, ...]:
    return tuple(2 * step + kind for step in steps for kind in (0, 1))


def at(step: int, *conditionings: Conditioning, schedule=SCHEDULE) -> ForwardOptions:
    position = RunPosition(sigma=schedule[step], schedule=schedule, conditionings=conditionings)
    return ForwardOptions(position=position)


def prompts(seed: int = 5) -> Tensor:
    return torch.randn(2, 1, 12, 4096, generator=torch.Generator().manual_seed(seed))


def timestep(model: WanModel, step: int, batch: int = 1) -> Tensor:
    now = 1000 * SCHEDULE[step]
    return torch.tensor([[0.0, now, now]] * batch if model.spec.task == "ti2v" else [now] * batch)


def loop(model: WanModel, name: str, *, batched: bool = False, guidance: float = 3.0, seed: int = 3, last: int = STEPS):
    """A run; returns its latents and every velocity."""
    x, _ = inputs(name)
    conditions = x[:, model.spec.out_dim :]
    latents = torch.randn(1, model.spec.out_dim, *x.shape[2:], generator=torch.Generator().manual_seed(seed))
    text, solver, seen = prompts(), Euler(SCHEDULE), []
    for step in range(last):
        given = torch.cat([latents, conditions], dim=1)
        if batched:  # core's order: uncond first
            options = at(step, UNCOND, COND)
            uncond, cond = model(
                torch.cat([given, given]), timestep(model, step, 2), torch.cat([text[1], text[0]]), options=options
            ).chunk(2)
        else:
            uncond = model(given, timestep(model, step), text[1], options=at(step, UNCOND)) if guidance != 1 else None
            cond = model(given, timestep(model, step), text[0], options=at(step, COND))
        velocity = cond if uncond is None else uncond + guidance * (cond - uncond)
        latents = solver.step(velocity, step, latents)
        seen.append(velocity)
    return latents, seen


# ---- skipped passes against the written-out mathematics ------------------------------------------------------------


class ByHand:
    """The same run with the residuals taken from outside: hooks see the tokens before the first block and after the
    last one, and put others there."""

    def __init__(self, model: WanModel, passes: tuple[int, ...], reuse: str = "keep", scales=None) -> None:
        self.passes, self.reuse, self.scales = passes, reuse, scales or {}
        self.history: dict[str, list[tuple[float, Tensor]]] = {}
        model.stack_wrappers["by hand"] = self

    def __call__(self, tokens, state, inner):
        position = state.options.position
        (conditioning,) = position.conditionings
        step, kind = position.step, conditioning.kind
        kept = self.history.setdefault(conditioning.key, [])
        if 2 * step + kind not in self.passes:
            out = inner(tokens.clone(), state)
            kept.insert(0, (position.sigma, out - tokens))
            return out
        residual = kept[0][1]
        if self.reuse == "scale":
            residual = residual * self.scales[2 * step + kind]
        if self.reuse == "linear":
            (s1, r1), (s0, r0) = kept[:2]
            residual = r1 + (r1 - r0) * (position.sigma - s1) / (s1 - s0)
        return tokens + residual


@pytest.mark.parametrize("name", ["t2v", "i2v", "ti2v"])
@pytest.mark.parametrize("reuse", ["keep", "linear"])
def test_a_skipped_pass_is_input_plus_residual(name, reuse):
    passes = both(3, 5, 6, 9)
    model = tiny_model(name)
    expected, _ = loop(model, name)
    reference = tiny_model(name)
    ByHand(reference, passes, reuse)
    by_hand, _ = loop(reference, name)
    apply_cache(model, Listed(passes=passes, reuse=reuse))
    ours, _ = loop(model, name)
    assert relative(ours, by_hand) < 1e-5
    assert relative(ours, expected) > 1e-3, "something was skipped"
    report = cache_of(model).finish()
    assert report.skipped_passes == set(passes) and report.computed == 2 * STEPS - len(passes)
    facts = report.facts("high_noise")
    assert (
        facts["steps_skipped"] == {"cond": [4, 6, 7, 10], "uncond": [4, 6, 7, 10]} and facts["expert"] == "high_noise"
    )
    assert facts["steps_computed"] == {"cond": [1, 2, 3, 5, 8, 9], "uncond": [1, 2, 3, 5, 8, 9]}
    assert (facts["passes_computed"], facts["passes_skipped"], facts["residuals_gib"]) == (
        12,
        8,
        report.most_bytes / 2**30,
    )


@dataclasses.dataclass(frozen=True)
class Scaled(Listed):
    reuse: str = "scale"

    def start(self, plan):
        tracker = ListedTracker(self.passes)
        tracker.decide = lambda step, kind, *_: Decision(2 * step + kind in self.passes, scale=0.5 + 0.1 * step)
        return tracker


def test_scaled_residuals():
    passes = both(4, 5)
    model, reference = tiny_model("t2v"), tiny_model("t2v")
    ByHand(reference, passes, "scale", {c: 0.5 + 0.1 * (c // 2) for c in passes})
    apply_cache(model, Scaled(passes=passes))
    assert relative(loop(model, "t2v")[0], loop(reference, "t2v")[0]) < 1e-5


@pytest.mark.parametrize("name", ["t2v", "ti2v"])
@pytest.mark.parametrize("stream", [None, torch.bfloat16])
def test_nothing_skipped_is_the_uncached_run_to_the_bit(name, stream):
    model = tiny_model(name, torch.bfloat16)
    model.stream_dtype_override = stream
    expected, _ = loop(model, name)
    model.begin_run()
    apply_cache(model, Listed())
    for batched in (False, True):
        model.begin_run()
        plain = expected if not batched else loop(remove_magcache(model), name, batched=True)[0]
        apply_cache(model, Listed())
        assert torch.equal(loop(model, name, batched=batched)[0], plain)
        assert cache_of(model).finish().skipped == 0


@pytest.mark.parametrize("name", ["t2v", "ti2v"])
@pytest.mark.parametrize("passes", [both(3, 5, 6), (6, 11, 12, 13, 17), tuple(2 * s for s in (2, 4, 5))])
def test_one_batch_equals_two_calls(name, passes):
    """In phase, out of phase (only what must be computed runs), and one conditioning alone."""
    model = apply_cache(tiny_model(name), Listed(passes=passes))
    apart, _ = loop(model, name)
    assert cache_of(model).finish().skipped == len(passes)
    model.begin_run()
    sizes = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0]._x.shape[0]))
    together, _ = loop(model, name, batched=True)
    handle.remove()
    report = cache_of(model).finish()
    assert report.skipped_passes == set(passes)
    assert relative(together, apart) < 1e-5
    assert sum(sizes) == 2 * STEPS - len(passes), "the blocks ran for what had to be computed, no more"


def test_a_skipped_pass_touches_no_block():
    model = apply_cache(tiny_model("t2v"), Listed(passes=both(1)))
    names = {id(module): name for name, module in model.named_modules()}
    fetched: Counter[str] = Counter()
    plain = Leaf.fetch

    def counted(self, like):
        fetched[names[id(self)]] += 1
        return plain(self, like)

    x, _ = inputs("t2v")
    text = prompts()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Leaf, "fetch", counted)
        model(x, timestep(model, 0), text, options=at(0, COND))
        assert any(name.startswith("blocks.") for name in fetched)
        fetched.clear()
        model.clear_text_cache()
        model(x, timestep(model, 1), text, options=at(1, COND))
    assert set(fetched) == {"patch_embedding", "time_embedding.0", "time_embedding.2", "time_projection.1", "head.head"}


def test_the_head_runs_with_the_step_of_the_skipped_pass():
    model = apply_cache(tiny_model("t2v"), Listed(passes=both(1, 2)))
    x, _ = inputs("t2v")
    text = prompts()[0]
    out = [model(x, timestep(model, step), text, options=at(step, COND)) for step in range(3)]
    assert relative(out[2], out[1]) > 1e-3, "same tokens, same residual, another time embedding"


# ---- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reuse", "most"), [("keep", 1), ("linear", 2)])
def test_residuals_take_one_activation_of_the_compute_type_each(reuse, most):
    model = apply_cache(tiny_model("t2v", torch.bfloat16), Listed(passes=both(4, 7), reuse=reuse))
    x, _ = inputs("t2v")
    tokens = x[0, 0].numel() // 4
    loop(model, "t2v")
    cache = cache_of(model)
    assert cache.bytes() == most * 2 * tokens * model.spec.dim * 2
    assert cache.finish().most_bytes == most * 2 * tokens * model.spec.dim * 2
    model.begin_run()
    assert cache.bytes() == 0


def test_a_residual_is_freed_before_the_next_one_is_made():
    model = apply_cache(tiny_model("t2v"), Listed())
    x, _ = inputs("t2v")
    text = prompts()[0]
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(cache_of(model).bytes()))
    for step in range(3):
        model(x, timestep(model, step), text, options=at(step, COND))
    handle.remove()
    assert seen == [0, 0, 0]


@pytest.mark.parametrize("reuse", ["keep", "linear"])
@pytest.mark.parametrize("batched", [False, True])
def test_what_a_computed_pass_holds_beside_the_blocks_is_what_is_kept(reuse, batched):
    """While blocks run: one activation of the compute type for each residual that is kept, the one that is being made
    among them; no other copy of the tokens before the first block."""
    model = apply_cache(tiny_model("t2v", torch.bfloat16), Listed(passes=both(4, 7), reuse=reuse))
    x, _ = inputs("t2v")
    activation = x[0, 0].numel() // 4 * model.spec.dim * torch.bfloat16.itemsize
    held: dict[bool, list[int]] = {True: [], False: []}

    def measure(*_) -> None:
        found = {}
        for tensor in gc.get_objects():
            if (
                type(tensor) is Tensor
                and tensor.dim() == 3
                and tensor.shape[2] == model.spec.dim
                and not tensor.is_meta
            ):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held[cache_of(model) is not None].append(sum(found.values()))

    handle = model.blocks[-1].register_forward_pre_hook(measure)
    for _ in range(2):
        loop(model, "t2v", batched=batched)
        remove_magcache(model).begin_run()
    handle.remove()
    plain, cached = (max(held[with_cache]) for with_cache in (False, True))
    assert plain > 0
    assert cached - plain == (2 if reuse == "linear" else 1) * 2 * activation


def test_an_expert_that_is_done_frees_what_it_kept_and_still_reports():
    model = apply_cache(tiny_model("t2v"), Listed(passes=both(4)))
    loop(model, "t2v", last=6)
    cache = cache_of(model)
    assert cache.bytes() > 0
    cache.release()
    assert cache.bytes() == 0 and cache.finish().skipped == 2


def test_windows_that_move_do_not_pile_up():
    model = apply_cache(tiny_model("t2v"), Listed(passes=both(*range(1, STEPS))))
    x, _ = inputs("t2v")
    text = prompts()[0]
    for step in range(STEPS):
        for window in range(2):
            name = Conditioning(("c", step, window))  # other frames at every step
            model(x, timestep(model, step), text, options=at(step, name))
    report = cache_of(model).finish()
    assert report.skipped == 0 and report.refused == 2 * (STEPS - 1)
    model.begin_run()
    apply_cache(model, Listed())
    for step in range(STEPS):
        for window in range(2):
            model(x, timestep(model, step), text, options=at(step, Conditioning(("c", step, window))))
    assert len(cache_of(model)._kept) == 2


def test_windows_are_kept_apart():
    model = apply_cache(tiny_model("t2v"), Listed(passes=both(1)))
    text, outs = prompts()[0], {}
    windows = {w: torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(w)) for w in (1, 2)}
    for step in range(2):
        for w, x in windows.items():
            outs[step, w] = model(x, timestep(model, step), text, options=at(step, Conditioning(("c", w))))
    fresh = apply_cache(tiny_model("t2v"), Listed(passes=both(1)))
    for w, x in windows.items():
        fresh.begin_run()
        alone = [fresh(x, timestep(fresh, step), text, options=at(step, Conditioning("c"))) for step in range(2)]
        assert torch.equal(alone[1], outs[1, w])


def test_another_size_is_computed():
    model = apply_cache(tiny_model("t2v"), Listed(passes=both(1)))
    text = prompts()[0]
    model(torch.randn(1, 16, 3, 6, 8), timestep(model, 0), text, options=at(0, COND))
    model(torch.randn(1, 16, 2, 6, 8), timestep(model, 1), text, options=at(1, COND))
    report = cache_of(model).finish()
    assert (report.skipped, report.refused) == (0, 1)


def test_a_conditioning_that_was_away_is_computed():
    """Its residual is older than the last step that the policy had computed."""
    model = apply_cache(tiny_model("t2v"), Listed(passes=both(3)))
    x, _ = inputs("t2v")
    text = prompts()[0]
    other = Conditioning("second", 0)
    for step, conditionings in enumerate([(COND, other), (COND,), (COND,), (COND, other)]):
        for conditioning in conditionings:
            model(x, timestep(model, step), text, options=at(step, conditioning))
    report = cache_of(model).finish()
    assert (report.skipped, report.refused) == (1, 1)


def test_steps_are_counted_by_noise_level():
    """A solver that evaluates twice a step, and between steps."""
    model = apply_cache(tiny_model("t2v"), Listed(passes=(4,)))
    x, _ = inputs("t2v")
    text = prompts()[0]
    middle = (SCHEDULE[1] + SCHEDULE[2]) / 2
    for sigma in (SCHEDULE[0], SCHEDULE[0], SCHEDULE[1], middle, SCHEDULE[2], SCHEDULE[2], SCHEDULE[3]):
        position = RunPosition(sigma=sigma, schedule=SCHEDULE, conditionings=(COND,))
        model(x, torch.tensor([1000 * sigma]), text, options=ForwardOptions(position=position))
    report = cache_of(model).finish()
    assert report.skipped == 3 and report.computed == 4 and report.skipped_passes == {4}


def test_a_second_run_begins_afresh_even_unannounced():
    model = apply_cache(tiny_model("t2v"), Listed(passes=both(*range(1, 4))))
    first, _ = loop(model, "t2v")
    assert torch.equal(loop(model, "t2v")[0], first), "steps that start over drop what is kept"
    model.begin_run()
    assert torch.equal(loop(model, "t2v")[0], first)
    loop(model, "t2v", last=5)  # broken off
    model.begin_run()
    assert cache_of(model).bytes() == 0
    assert torch.equal(loop(model, "t2v")[0], first)
    assert cache_of(model).finish().skipped == 6


def test_two_models_do_not_disturb_each_other():
    """Experts in turn, and one alone."""
    models = [apply_cache(tiny_model("t2v"), Listed(passes=both(1))) for _ in range(2)]
    x, _ = inputs("t2v")
    text = prompts()[0]
    for step in range(2):
        for seed, model in enumerate(models):
            given = x + seed
            out = model(given, timestep(model, step), text, options=at(step, COND))
            if step == 1:
                alone = apply_cache(tiny_model("t2v"), Listed(passes=both(1)))
                expected = [alone(given, timestep(alone, s), text, options=at(s, COND)) for s in range(2)]
                assert torch.equal(out, expected[1])


def test_a_mixed_batch_is_computed_where_it_cannot_be_divided():
    """A host's override of attention sees the whole batch."""
    model = apply_cache(tiny_model("t2v"), Listed(passes=(2,)))
    x, _ = inputs("t2v")
    text = torch.cat([*prompts()])
    for step in range(2):
        position = RunPosition(sigma=SCHEDULE[step], schedule=SCHEDULE, conditionings=(COND, UNCOND))
        options = ForwardOptions(
            position=position, attention_override=lambda f, q, k, v, heads, transformer_options: f(q, k, v, heads)
        )
        model(torch.cat([x, x]), timestep(model, step, 2), text, options=options)
    report = cache_of(model).finish()
    assert (report.computed, report.skipped, report.refused) == (4, 0, 1)


# ---- with everything else ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["DelayedScaling", "rowwise"])
def test_with_an_fp8_recipe(recipe):
    """Scales follow the computed steps only; a skipped step enters nothing."""
    model = wan_fp8.apply_recipe(tiny_model("t2v"), wan_fp8.Recipe(recipe, backend="reference"))
    plain, _ = loop(model, "t2v")
    model.begin_run()
    apply_cache(model, Listed())
    assert torch.equal(loop(model, "t2v")[0], plain)
    passes = both(3, 6)
    apply_cache(model, Listed(passes=passes))
    model.begin_run()
    skipped, _ = loop(model, "t2v")
    assert cache_of(model).finish().skipped == 4
    if recipe == "DelayedScaling":
        assert int((model.quantization.scales.history.amax(1) > 0).sum()) == STEPS - 2
    reference = wan_fp8.apply_recipe(tiny_model("t2v"), wan_fp8.Recipe(recipe, backend="reference"))
    ByHand(reference, passes)
    assert relative(skipped, loop(reference, "t2v")[0]) < 1e-5


def test_with_compiled_blocks():
    passes = both(2, 4, 5)
    model = apply_cache(tiny_model("t2v"), Listed(passes=passes))
    plain, _ = loop(model, "t2v")
    model.begin_run()
    wan_fp8.compile_blocks(model, backend="eager")
    assert relative(loop(model, "t2v")[0], plain) < 1e-5
    assert cache_of(model).finish().skipped == 6


def test_with_padded_tokens():
    passes = both(2, 4, 5)
    model = apply_cache(tiny_model("ti2v"), Listed(passes=passes))
    plain, _ = loop(model, "ti2v")
    model.begin_run()
    model.token_multiple = 64
    assert relative(loop(model, "ti2v")[0], plain) < 1e-5


def test_another_wrapper_that_wants_its_input_keeps_it():
    model = apply_cache(tiny_model("t2v"), Listed(passes=both(1)))
    seen = []

    def outer(tokens, state, inner):
        before = tokens.clone()
        out = inner(tokens, state)
        seen.append(torch.equal(tokens, before))
        return out

    model.stack_wrappers["outer"] = outer
    model.stack_wrappers.move_to_end("outer", last=False)
    loop(model, "t2v", last=3)
    assert seen == [True] * 6


# ---- policies ------------------------------------------------------------------------------------------------------


def own_curve(shape=(256, 2), cond: float = 0.98, uncond: float | None = 0.98, **more) -> Curve:
    ratios = (1.0, *[cond] * (STEPS - 1))
    other = None if uncond is None else (1.0, *[uncond] * (STEPS - 1))
    fields = dict(name="own", task="t2v", sigmas=SCHEDULE[:-1], cond=ratios, uncond=other, switch=None)
    return Curve(**{**fields, "models": (("only", "x"),), "shape": shape, **more})


def test_magcache_on_a_model():
    model = apply_magcache(tiny_model("t2v"), MagCache(0.1, 2, 0.2, curve=own_curve()))
    loop(model, "t2v")
    report = cache_of(model).finish()
    # 0.02, then 0.02 + 0.0396: two steps after each computed one, from step 2 on
    assert sorted({c // 2 for c in report.skipped_passes}) == [2, 3, 5, 6, 8, 9]
    assert report.worst_error == pytest.approx(0.02 + (1 - 0.98**2))
    assert report.total_error == pytest.approx(2 * 3 * report.worst_error, rel=1e-6)
    assert (
        len(report.times) == 8
        and report.seconds_of_pass > 0
        and report.seconds_saved == pytest.approx(12 * report.seconds_of_pass)
    )
    lines = report.lines("high-noise expert")
    assert lines[0].startswith("MagCache (high-noise expert): 8 of 20 passes computed, 12 skipped; ")
    assert "error estimate at most 0.060 of 0.1 allowed" in lines[1]
    assert remove_magcache(model).stack_wrappers == {}


def test_without_guidance_cond_decides():
    """Uncond's ratios would forbid every skip; with guidance off they are nobody's."""
    setting = MagCache(0.1, 2, 0.2, curve=own_curve(uncond=0.5))
    model = apply_magcache(tiny_model("t2v"), setting)
    loop(model, "t2v", guidance=1)
    assert sorted(cache_of(model).finish().skipped_passes) == [2 * s for s in (2, 3, 5, 6, 8, 9)]
    model.begin_run()
    loop(model, "t2v")
    assert cache_of(model).finish().skipped == 0


def test_out_of_phase_by_name():
    setting = MagCache(0.1, 2, 0.2, phase="published", curve=own_curve(uncond=0.95))
    model = apply_magcache(tiny_model("t2v"), setting)
    loop(model, "t2v", batched=True)
    skipped = cache_of(model).finish().skipped_passes
    assert [c // 2 for c in sorted(skipped) if c % 2 == 0] == [2, 3, 5, 6, 8, 9]
    assert [c // 2 for c in sorted(skipped) if c % 2] == [2, 4, 6, 8]


def test_steps_outside_of_the_curve_are_computed_and_named():
    curve = dataclasses.replace(own_curve(uncond=None), sigmas=SCHEDULE[:8], cond=(1.0, *[0.98] * 7))
    model = apply_magcache(tiny_model("t2v"), MagCache(0.1, 2, 0.2, curve=curve))
    loop(model, "t2v")
    report = cache_of(model).finish()
    assert max(c // 2 for c in report.skipped_passes) == 6
    assert report.outside == {8, 9}
    assert any("2 of 10 steps lie outside of the curve, computed" in line for line in report.lines())


@pytest.mark.parametrize("policy", [EasyCache(threshold=10.0, max_skips=1, retention=0.2), Taylor(max_skips=1)])
def test_the_alternatives_skip_in_phase_and_compute_the_last_step(policy):
    model = apply_cache(tiny_model("t2v"), policy)
    for batched in (False, True):
        model.begin_run()
        ours, _ = loop(model, "t2v", batched=batched)
        report = cache_of(model).finish()
        steps = [c // 2 for c in sorted(report.skipped_passes) if c % 2 == 0]
        assert sorted(report.skipped_passes) == sorted(both(*steps))
        assert 2 <= len(steps) <= 4 and max(steps) < STEPS - 1 and min(steps) >= 2 and torch.isfinite(ours).all()
        assert all(b - a > 1 for a, b in pairwise(steps))


def test_easycache_by_hand():
    """The estimate, from the tokens themselves: rate of the last two computed steps times how far the input moved."""
    threshold, stride = 0.25, 16
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    x, _ = inputs("t2v")
    text = prompts()[0]
    plain = tiny_model("t2v")

    def watch(tokens, state, inner):
        before = tokens.clone()
        out = inner(tokens.clone(), state)
        seen[state.options.position.step] = before[:, ::stride], out[:, ::stride]
        return out

    plain.stack_wrappers["watch"] = watch
    latents = [x * (1 - 0.02 * step) for step in range(STEPS)]
    for step in range(STEPS):
        plain(latents[step], timestep(plain, step), text, options=at(step, COND))
    error, count, computed, expected = 0.0, 0, [0, 1], []
    for step in range(2, STEPS):
        i, j = computed[-2:]
        rate = (seen[j][1] - seen[i][1]).abs().mean() / (seen[j][0] - seen[i][0]).abs().mean()
        error += float(rate * (seen[step][0] - seen[step - 1][0]).abs().mean() / seen[j][1].abs().mean())
        count += 1
        if error < threshold and count <= 3 and step < STEPS - 1:
            expected.append(step)
        else:
            error, count = 0.0, 0
            computed.append(step)
    model = apply_cache(tiny_model("t2v"), EasyCache(threshold=threshold, max_skips=3, retention=0.0))
    for step in range(STEPS):
        model(latents[step], timestep(model, step), text, options=at(step, COND))
    assert sorted(c // 2 for c in cache_of(model).finish().skipped_passes) == expected
    assert 2 <= len(expected) < STEPS - 3


class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for a device: values that are read, one or many at once."""

    READS = frozenset(
        {Tensor.__float__, Tensor.__bool__, Tensor.__int__, Tensor.__index__, Tensor.item, Tensor.tolist, Tensor.cpu}
        | {Tensor.numpy, Tensor.nonzero, torch.equal, torch.allclose}
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in self.READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batched", [False, True])
def test_easycache_waits_for_the_device_once_for_a_step_that_may_be_skipped(batched):
    """Both conditionings together, in one batch or two; nothing is read at steps that are computed in any case."""
    model = apply_cache(tiny_model("t2v"), EasyCache(threshold=0.25, max_skips=2, retention=0.3))
    with HostReads() as reads:
        assert bool(torch.ones(1)) and float(torch.ones(1)) and torch.ones(1).tolist() and reads.count == 3
    x, _ = inputs("t2v")
    text, counts = torch.cat([*prompts()]), []
    for step in range(STEPS):
        given, now = x * (1 - 0.02 * step), timestep(model, step)
        with HostReads() as reads:
            if batched:
                model(torch.cat([given, given]), now.repeat(2), text, options=at(step, COND, UNCOND))
            else:
                for row, conditioning in enumerate((COND, UNCOND)):
                    model(given, now, text[row : row + 1], options=at(step, conditioning))
        counts.append(reads.count)
    plain = tiny_model("t2v")
    with HostReads() as reads:
        plain(x, timestep(plain, 0), text[:1], options=at(0, COND))
    assert reads.count == 0, "what the model itself reads would hide in the counts"
    assert counts == [0] * 3 + [1] * (STEPS - 4) + [0]
    assert 0 < cache_of(model).finish().skipped < 2 * (STEPS - 4)


# ---- measuring a curve ---------------------------------------------------------------------------------------------


def test_a_recorded_curve_is_the_ratio_of_residual_magnitudes():
    model = tiny_model("ti2v")
    recording, kept = Recording(), {}

    def watch(tokens, state, inner):
        out = inner(tokens.clone(), state)
        position = state.options.position
        for index, conditioning in enumerate(position.conditionings):
            kept[position.step, conditioning.kind] = (out - tokens)[index].norm(dim=-1)
        return out

    model.stack_wrappers["watch"] = watch
    model.stack_wrappers["recording"] = recording
    recording.begin("net", None, SCHEDULE)
    plain, _ = loop(tiny_model("ti2v"), "ti2v", batched=True)
    recorded, _ = loop(model, "ti2v", batched=True)
    assert torch.equal(recorded, plain)
    recording.end()
    curve = recording.curve("mine", model.spec, [("only", "f")])
    assert curve.sigmas == SCHEDULE[:-1] and curve.switch is None and curve.shape == (256, 2)
    for kind, row in ((0, curve.cond), (1, curve.uncond)):
        assert row[0] == 1
        for step in range(1, STEPS):
            expected = (kept[step, kind] / kept[step - 1, kind]).mean()
            assert row[step] == pytest.approx(float(expected), rel=1e-4)


def test_two_experts_make_one_curve_and_a_new_run_another():
    recording = Recording()
    models = [tiny_model("t2v"), tiny_model("t2v")]
    x, _ = inputs("t2v")
    text = prompts()[0]

    def run(last: int = STEPS) -> None:
        for model, share in zip(models, ((0, 4), (4, STEPS)), strict=True):
            recording.begin(id(model), None, SCHEDULE[share[0] : share[1] + 1])
            model.stack_wrappers["recording"] = recording
            for step in range(share[0], min(share[1], last)):
                model(x * (1 + step), timestep(model, step), text, options=at(step, COND))

    run()
    curve = recording.curve("mine", models[0].spec)
    assert curve.switch == 4 and curve.uncond is None and curve.cond[0] == curve.cond[4] == 1 != curve.cond[5]
    run()
    assert recording.curve("mine", models[0].spec) == curve, "nothing of the first run is left"
    run(last=7)
    with pytest.raises(InputError, match="the run was cut short: of its 10 steps"):
        recording.curve("mine", models[0].spec)
    with pytest.raises(InputError, match="nothing has been measured"):
        Recording().curve("mine", models[0].spec)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_a_forward_without_its_place_in_the_run_is_refused():
    model = apply_cache(tiny_model("t2v"), Listed())
    x, context = inputs("t2v")
    with pytest.raises(InputError, match=r"Listed needs to know the step and the conditionings of a forward"):
        model(x, torch.tensor([500.0]), context)


def test_conditionings_that_do_not_share_the_batch_are_refused():
    model = apply_cache(tiny_model("t2v"), Listed())
    x, context = inputs("t2v")
    with pytest.raises(InputError, match=r"a batch of 1 cannot be shared by 2 conditionings"):
        model(x, torch.tensor([500.0]), context, options=at(0, COND, UNCOND))
    with pytest.raises(InputError, match=r"the 2 conditionings of one batch need 2 different keys"):
        twice = at(0, COND, COND)
        model(torch.cat([x, x]), torch.tensor([500.0] * 2), torch.cat([context, context]), options=twice)


def test_a_run_that_cannot_be_cached_is_refused_at_its_first_forward():
    model = apply_magcache(tiny_model("t2v"))
    x, context = inputs("t2v")
    with pytest.raises(InputError, match=r"measured on a model of width 5120 with 40 blocks.*Calibrate MagCache"):
        model(x, torch.tensor([1000.0]), context, options=at(0, COND))
    short = tuple(sigmas(4, 5.0, "euler").tolist())
    model = apply_cache(tiny_model("t2v"), EasyCache())
    for share in (None, (0, 2)):
        position = RunPosition(sigma=1.0, schedule=short, conditionings=(COND,), share=share)
        with pytest.raises(InputError, match=r"EasyCache cannot skip in a run of 4 steps"):
            model(x, torch.tensor([1000.0]), context, options=ForwardOptions(position=position))
    part = at(0, COND, schedule=tuple(sigmas(20, 5.0, "euler").tolist())[13:])
    model(x, torch.tensor([700.0]), context, options=part)
