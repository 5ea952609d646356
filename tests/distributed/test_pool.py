"""A model in a pool is the same model: tasks, recipes, LoRAs, caches and attention, through the pool's messages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pool_kit
import pytest
import torch

import wan_fp8
from wan_fp8.attention import Attention, attention_report
from wan_fp8.caching import Conditioning, Curve, MagCache, RunPosition, apply_cache, apply_magcache, cache_of
from wan_fp8.checkpoint.live_lora import merge_changes
from wan_fp8.checkpoint.lora import Diff, LowRank
from wan_fp8.errors import InputError, UnsupportedPatchError
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.low_rank import LiveLora, LiveTerm
from wan_fp8.parallel import pools
from wan_fp8.parallel.remote import RemoteWanModel, Topology
from wan_fp8.quant import Recipe
from wan_fp8.sampling import sigmas

pytestmark = pytest.mark.timeout(120)
TOLERANCE = 1e-5
"""fp32, sums in another order."""
FP8_TOLERANCE = 2e-2
"""A sum in another order may move single values by a step of FP8."""
CFG, SEQUENCE = Topology(cfg=2), Topology(ulysses=2)
STEPS = 10
SCHEDULE = tuple(sigmas(STEPS, 3.0, "euler").tolist())


@pytest.fixture(scope="module", autouse=True)
def pool() -> Iterator[None]:
    yield
    pools.stop_pools()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("topology", [CFG, SEQUENCE], ids=["cfg", "ulysses"])
@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_every_task(checkpoints: dict[str, Path], task: str, topology: Topology, batch: int) -> None:
    expert = None if task == "ti2v" else "low_noise"
    one, many = pool_kit.here(checkpoints[task], expert), pool_kit.in_pool(checkpoints[task], expert, topology=topology)
    inputs = pool_kit.Inputs(one.spec, batch)
    if task == "ti2v":
        inputs.timestep = torch.tensor([[0.0, 600.0, 600.0]] * batch)
    assert pool_kit.relative(inputs.into(many), inputs.into(one)) < TOLERANCE


@pytest.mark.parametrize("recipe", ["rowwise", "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"])
def test_every_recipe(checkpoints: dict[str, Path], recipe: str) -> None:
    setting = Recipe(recipe, backend="reference")
    one = pool_kit.here(checkpoints["t2v"], "high_noise", recipe=setting)
    many = pool_kit.in_pool(checkpoints["t2v"], "high_noise", topology=SEQUENCE, recipe=setting)
    inputs = pool_kit.Inputs(one.spec)
    plain = inputs.into(pool_kit.here(checkpoints["t2v"], "high_noise"))
    for step in (900.0, 600.0):
        ours, theirs = inputs.into(many, timestep=step), inputs.into(one, timestep=step)
        assert pool_kit.relative(ours, theirs) < FP8_TOLERANCE
    assert pool_kit.relative(theirs, plain) > 1e-3, "the recipe was not at work"


def test_sharded_weights_are_the_same_bits(checkpoints: dict[str, Path]) -> None:
    setting = Recipe("rowwise", backend="reference")
    models = [
        pool_kit.in_pool(
            checkpoints["t2v"],
            "high_noise",
            topology=Topology(ulysses=2, weights=weights),
            recipe=setting,
            dtype=torch.bfloat16,
        )
        for weights in ("replicate", "shard")
    ]
    inputs = pool_kit.Inputs(models[0].spec)
    whole, parts = (inputs.into(model) for model in models)
    assert torch.equal(whole, parts) and models[1].remote.dims is not None and models[1].remote.dims.shard == 2


def changes(model: torch.nn.Module, seed: int = 3) -> dict[str, list]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    found: dict[str, list] = {"blocks.1.modulation": [(Diff(noise(1, 6, model.spec.dim)), 0.5)]}
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.0", "text_embedding.0"):
        linear = model.get_submodule(name)
        pair = LowRank(noise(4, linear.in_features), noise(linear.out_features, 4), alpha=8.0)
        found[f"{name}.weight"] = [(pair, 0.7), (Diff(noise(linear.out_features, linear.in_features)), -0.2)]
    return found


@pytest.mark.parametrize("weights", ["replicate", "shard"])
def test_merged_changes_come_and_go(checkpoints: dict[str, Path], weights: str) -> None:
    one = pool_kit.here(checkpoints["t2v"], "high_noise")
    many = pool_kit.in_pool(checkpoints["t2v"], "high_noise", topology=Topology(ulysses=2, weights=weights))
    inputs = pool_kit.Inputs(one.spec)
    before = inputs.into(many)
    many.remote.changes, many.remote.merged = changes(one), "first"
    with_them = inputs.into(many)
    merge_changes(one, changes(one))
    assert pool_kit.relative(with_them, inputs.into(one)) < TOLERANCE
    assert pool_kit.relative(with_them, before) > 1e-2
    many.remote.changes, many.remote.merged = {}, ""
    assert torch.equal(inputs.into(many), before)


def test_live_loras(checkpoints: dict[str, Path]) -> None:
    one = pool_kit.here(checkpoints["t2v"], "high_noise")
    many = pool_kit.in_pool(checkpoints["t2v"], "high_noise", topology=SEQUENCE)
    inputs = pool_kit.Inputs(one.spec)
    pairs = {
        name.removesuffix(".weight"): entries[0][0]
        for name, entries in changes(one).items()
        if isinstance(entries[0][0], LowRank)
    }
    seen = []
    for strength in (1.0, 0.5, 1.0):
        options = ForwardOptions(lora=LiveLora((LiveTerm("test", strength, pairs),)))
        ours, theirs = inputs.into(many, options), inputs.into(one, options)
        assert pool_kit.relative(ours, theirs) < TOLERANCE
        seen.append(ours)
        many.begin_run()
    assert torch.equal(seen[0], seen[2]) and pool_kit.relative(seen[1], seen[0]) > 1e-3
    assert pool_kit.relative(inputs.into(many), inputs.into(one)) < TOLERANCE


@pytest.mark.parametrize("topology", [CFG, SEQUENCE], ids=["cfg", "ulysses"])
def test_a_cache_skips_the_same_passes_and_says_so(checkpoints: dict[str, Path], topology: Topology) -> None:
    one = pool_kit.here(checkpoints["t2v"], "high_noise")
    many = pool_kit.in_pool(checkpoints["t2v"], "high_noise", topology=topology)
    cond = (1.0, *[0.99] * (STEPS - 1))
    uncond = (1.0, *[0.99, 0.94] * STEPS)[:STEPS]
    shape = (one.spec.dim, one.spec.num_layers)
    curve = Curve("own", "t2v", SCHEDULE[:-1], cond, uncond, None, models=(("only", "x"),), shape=shape)
    for model in (one, many):
        apply_magcache(model, MagCache(0.1, 2, 0.2, curve=curve))
    inputs = pool_kit.Inputs(one.spec)
    for _ in range(2):
        for step in range(STEPS):
            parts = (Conditioning(("c", 1), 0), Conditioning(("u", 2), 1))
            position = RunPosition(sigma=SCHEDULE[step], schedule=SCHEDULE, conditionings=parts)
            options = ForwardOptions(position=position, text_key=("p", step > 5))
            ours = inputs.into(many, options, timestep=1000 * SCHEDULE[step])
            theirs = inputs.into(one, options, timestep=1000 * SCHEDULE[step])
            assert pool_kit.relative(ours, theirs) < TOLERANCE
        there, mine = (cache_of(model).report for model in (many, one))
        assert there.skipped == mine.skipped > 0 and there.computed == mine.computed
        assert there.skipped_passes == mine.skipped_passes and there.steps == mine.steps
        assert there.computed_passes == mine.computed_passes != set()
        assert there.worst_error == pytest.approx(mine.worst_error) and there.most_bytes > 0
        assert len(there.lines()) == len(mine.lines())
        for model in (one, many):
            model.begin_run()
    apply_cache(many, None)
    assert pool_kit.relative(inputs.into(many), inputs.into(apply_cache(one, None))) < TOLERANCE


def test_a_low_precision_attention_and_its_guard_are_reported(checkpoints: dict[str, Path]) -> None:
    one = pool_kit.here(checkpoints["t2v"], "high_noise")
    many = pool_kit.in_pool(checkpoints["t2v"], "high_noise", topology=SEQUENCE)
    window = {"skip_first_steps": 0, "skip_last_steps": 0, "skip_first_blocks": 0, "skip_last_blocks": 0}
    for bound in (1.0, 1e-6):
        options = ForwardOptions(attention=Attention("reference-fp8", bound=bound, **window))
        inputs = pool_kit.Inputs(one.spec)
        assert pool_kit.relative(inputs.into(many, options), inputs.into(one, options)) < FP8_TOLERANCE
        (there,), (mine,) = attention_report(many), attention_report(one)
        assert there.answered == mine.answered and there.verdicts.keys() == mine.verdicts.keys()
        assert there.refused.keys() == mine.refused.keys() and bool(mine.refused) is (bound < 1)
        for model in (one, many):
            model.begin_run()


def test_the_layout_follows_what_is_asked(checkpoints: dict[str, Path]) -> None:
    """``auto`` splits guidance where there is some, and tokens where there is none; a chosen one stays."""
    many = pool_kit.in_pool(checkpoints["t2v"], "high_noise")
    seen = []
    for batch in (2, 1, 2):
        pool_kit.Inputs(many.spec, batch).into(many)
        many.begin_run()
        seen.append((many.remote.dims.cfg, many.remote.dims.sequence))
    assert seen == [(2, 1), (1, 2), (2, 1)]
    fixed = pool_kit.in_pool(checkpoints["t2v"], "high_noise", topology=CFG)
    pool_kit.Inputs(fixed.spec, 1).into(fixed)
    assert fixed.remote.dims.cfg == 2


def test_both_experts_share_the_pool(checkpoints: dict[str, Path]) -> None:
    high, low = (pool_kit.in_pool(checkpoints["t2v"], expert) for expert in ("high_noise", "low_noise"))
    inputs = pool_kit.Inputs(high.spec)
    first, second = inputs.into(high), inputs.into(low)
    assert high.remote.pool() is low.remote.pool() and not torch.equal(first, second)
    assert {high.remote.name, low.remote.name} <= high.remote.pool().loaded.keys()
    name, pool = low.remote.name, low.remote.pool()
    del low
    pool_kit.eventually(lambda: name not in pool.loaded, "a model that nobody has is still in the pool")


def test_what_cannot_travel_is_refused_by_name(checkpoints: dict[str, Path]) -> None:
    many = pool_kit.in_pool(checkpoints["t2v"], "high_noise")
    inputs = pool_kit.Inputs(many.spec)
    for options in (ForwardOptions(block_replace={0: max}), ForwardOptions(attention_override=max)):
        with pytest.raises(UnsupportedPatchError, match=r"code of its own"):
            inputs.into(many, options)
    many.stack_wrappers["other"] = lambda tokens, state, inner: inner(tokens, state)
    with pytest.raises(UnsupportedPatchError, match=r"'other' around the blocks"):
        inputs.into(many)
    del many.stack_wrappers["other"]
    inputs.x = inputs.x[:, :3]
    with pytest.raises(InputError, match=r"takes latents \[batch, 16"):
        inputs.into(many)
    assert isinstance(many, RemoteWanModel) and wan_fp8.__version__
