"""What other nodes leave on the weights of a MODEL in a pool: the same latents as without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bridge_kit
import pytest
import torch
from bridge_kit import bridge, distance, engine, ksample
from safetensors.torch import save_file
from torch import Tensor

pytestmark = [pytest.mark.usefixtures("comfy_core", "inference", "pools_end"), pytest.mark.timeout(120)]
TOLERANCE = 1e-4
"""fp32 over a few steps, sums in another order."""
QUERY, HIDDEN = "blocks.0.self_attn.q", "blocks.1.ffn.0"
PATCH = "patch_embedding"


@pytest.fixture(scope="module")
def file(comfy_core: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "t2v.safetensors"
    save_file(bridge_kit.core_weights("t2v"), path)
    return path


@pytest.fixture(scope="module")
def t2v(file: Path) -> Any:
    return model_of(file)


def model_of(path: Path, **reading: Any) -> Any:
    """A MODEL as Load Wan2.2 Checkpoint returns it."""
    with torch.inference_mode(False):
        net = engine("checkpoint.load").load_transformer(path, dtype=torch.float32, **reading)
    source = engine("parallel.source").ModelSource.of(path, dtype=torch.float32, **reading)
    return bridge().build_model_patcher(net, None, source)


def in_pool(model: Any, **topology: Any) -> Any:
    pools, remote = engine("parallel.pools"), engine("parallel.remote")
    return bridge().in_pool(model, pools.PoolSpec(devices=("cpu", "cpu")), remote.Topology(**topology))


@pytest.fixture(scope="module")
def many(t2v: Any) -> Any:
    return in_pool(t2v)


def noise(*shape: int, seed: int = 1, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loha(out: int, wide: int, rank: int = 3, dora: bool = False) -> dict[str, Tensor]:
    found = {
        "hada_w1_a": noise(out, rank, seed=1), "hada_w1_b": noise(rank, wide, seed=2, scale=1.0),
        "hada_w2_a": noise(out, rank, seed=3), "hada_w2_b": noise(rank, wide, seed=4, scale=1.0),
        "alpha": torch.tensor(2.0),
    }  # fmt: skip
    return found | ({"dora_scale": 1.0 + noise(out, 1, seed=5)} if dora else {})


def lokr(out: int, wide: int, *, inner: int = 0, dora: bool = False) -> dict[str, Tensor]:
    """``inner``: rank of the second matrix, 0: it is whole."""
    found = {"lokr_w1": noise(4, 4, seed=6), "alpha": torch.tensor(2.0)}
    if inner:
        found |= {"lokr_w2_a": noise(out // 4, inner, seed=7), "lokr_w2_b": noise(inner, wide // 4, seed=8)}
    else:
        found["lokr_w2"] = noise(out // 4, wide // 4, seed=7)
    return found | ({"dora_scale": 1.0 + noise(1, wide, seed=9)} if dora else {})


def tucker(out: int, wide: int, kernel: tuple[int, ...]) -> dict[str, Tensor]:
    """LoHa of a convolution: cores [rank, rank, kernel]."""
    return {
        f"hada_{name}": noise(3, size, seed=seed)
        for seed, (name, size) in enumerate((("w1_a", out), ("w1_b", wide), ("w2_a", out), ("w2_b", wide)))
    } | {f"hada_t{half}": noise(3, 3, *kernel, seed=9 + half) for half in (1, 2)}


def lora(out: int, wide: int, *, dora: bool = False) -> dict[str, Tensor]:
    found = {"lora_up.weight": noise(out, 4, seed=1), "lora_down.weight": noise(4, wide, seed=2)}
    return found | ({"dora_scale": 1.0 + noise(out, 1, seed=5)} if dora else {})


def oft(out: int) -> dict[str, Tensor]:
    """An adapter that multiplies the weight: core has to compute it."""
    return {"oft_blocks": noise(4, out // 4, out // 4, seed=8, scale=0.02), "alpha": torch.tensor(1.0)}


FILES: dict[str, Callable[[], dict[str, dict[str, Tensor]]]] = {
    "LoHa": lambda: {QUERY: loha(128, 128), HIDDEN: loha(256, 128)},
    "LoHa, DoRA": lambda: {QUERY: loha(128, 128, dora=True)},
    "LoKr": lambda: {QUERY: lokr(128, 128), HIDDEN: lokr(256, 128, inner=3)},
    "LoKr, DoRA": lambda: {QUERY: lokr(128, 128, dora=True), HIDDEN: lokr(256, 128, inner=3, dora=True)},
    "LoRA, DoRA": lambda: {QUERY: lora(128, 128, dora=True), HIDDEN: lora(256, 128, dora=True)},
    "OFT": lambda: {QUERY: oft(128), HIDDEN: lora(256, 128)},
}


def with_file(model: Any, parts: dict[str, dict[str, Tensor]], strength: float = 0.7) -> Any:
    given = {
        f"diffusion_model.{layer}.{name}": value for layer, found in parts.items() for name, value in found.items()
    }
    return bridge_kit.with_core_lora(model, given, strength)


@pytest.mark.parametrize("kind", FILES)
def test_adapters(t2v: Any, many: Any, kind: str) -> None:
    """Of core's loader, all on one MODEL after another: what one leaves is taken away before the next."""
    parts = FILES[kind]()
    here, there = with_file(t2v, parts), with_file(many, parts)
    assert here.patches.keys() == there.patches.keys() == {f"diffusion_model.{layer}.weight" for layer in parts}
    theirs = ksample(here)
    assert distance(theirs, ksample(t2v)) > 1e-2, "it changes nothing"
    assert distance(ksample(there), theirs) < TOLERANCE
    changes = there.model.diffusion_model.remote.changes
    kinds = {type(entry).__name__ for entries in changes.values() for entry, _ in entries}
    assert kinds == {"LoHa": {"Hadamard"}, "LoKr": {"Kronecker"}, "OFT": {"Diff", "LowRank"}}.get(kind[:4], {"LowRank"})


def test_patches_that_core_computes_here(t2v: Any, many: Any, file: Path) -> None:
    """A strength of the model, a part of a weight, a whole new weight; two on one weight, in their order."""
    key, wide = f"diffusion_model.{QUERY}.weight", (f"diffusion_model.{HIDDEN}.weight", (0, 64, 128))
    results = []
    for model in (t2v, many, in_pool(t2v, weights="shard"), in_pool(bridge_kit.quantised_core_model("fp32"))):
        changed = model.clone()
        changed.add_patches({key: (noise(128, 128, seed=1),)}, 0.5, 0.8)
        changed.add_patches({key: ("diff", (noise(128, 128, seed=2),))}, 1.0)
        changed.add_patches({wide: (noise(128, 128, seed=3),)}, 0.5)
        changed.add_patches({f"diffusion_model.{PATCH}.bias": ("set", (noise(128, seed=4),))}, 1.0)
        results.append(ksample(changed))
    assert distance(results[0], ksample(t2v)) > 1e-2
    for ours in results[1:]:
        assert distance(ours, results[0]) < TOLERANCE
    for patch in (("model_as_lora", (noise(128, 128),)), ("diff", (noise(130, 128), {"pad_weight": True}))):
        changed = many.clone()
        changed.add_patches({key: patch}, 1.0)
        with pytest.raises(
            engine("errors").UnsupportedPatchError, match=r"self_attn\.q\.weight' by a patch of the kind"
        ):
            ksample(changed)
    assert distance(ksample(many), ksample(t2v)) < TOLERANCE


def test_products_are_what_core_computes(comfy_core: Path) -> None:
    """At every rank, kernel and DoRA, on one weight; shapes are known without it."""
    import comfy.lora

    lora_module, layers = engine("checkpoint.lora"), engine("checkpoint.products")
    entry_of = bridge().remote._entry
    linear, conv = torch.Size((128, 64)), torch.Size((32, 16, 1, 2))
    two = {"lokr_w1_a": noise(4, 2), "lokr_w1_b": noise(2, 4), **lokr(128, 64, inner=3)}
    del two["lokr_w1"]
    cases = [
        (linear, loha(128, 64)), (linear, loha(128, 64, dora=True)), (linear, lokr(128, 64)), (linear, two),
        (linear, lokr(128, 64, inner=2, dora=True)), (conv, tucker(32, 16, (1, 2))),
        (conv, {"lokr_w1": noise(4, 4), "lokr_w2": noise(8, 4, 1, 2)}),
        (linear, lora(128, 64, dora=True)),
    ]  # fmt: skip
    for shape, parts in cases:
        found = comfy.lora.load_lora({f"x.{name}": value for name, value in parts.items()}, {"x": "x"})
        patch, weight = (0.7, found["x"], 1.0, None, None), noise(*shape, seed=20)
        entry = entry_of(patch)
        assert isinstance(entry, layers.Hadamard | layers.Kronecker | lora_module.LowRank), parts.keys()
        wanted = comfy.lora.calculate_weight([patch], weight.clone(), "x") - weight
        ours = lora_module.delta(entry, 0.7, weight=weight)
        assert entry.shape == tuple(shape) and float((ours - wanted).abs().max()) < 1e-5 and wanted.std() > 1e-4


def test_changes_larger_than_one_message_go_in_parts(t2v: Any, many: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into weights that are there, into a model that is not, and, all at once or not at all, into sharded ones."""
    parts = bridge_kit.core_lora(bridge_kit.lora_pairs(bridge_kit.core_weights()))
    theirs = ksample(bridge_kit.with_core_lora(t2v, parts))
    remote = engine("parallel.remote")
    monkeypatch.setattr(remote, "PART_BYTES", 5000)
    for model in (many, in_pool(t2v), in_pool(t2v, weights="shard")):
        assert distance(ksample(bridge_kit.with_core_lora(model, parts)), theirs) < TOLERANCE
        assert distance(ksample(model), ksample(t2v)) < TOLERANCE
    monkeypatch.setattr(remote, "MOST_AT_ONCE", 5000)
    with pytest.raises(engine("errors").InputError, match="sharded weights take"):
        ksample(bridge_kit.with_core_lora(in_pool(t2v, weights="shard"), parts))


@pytest.mark.parametrize("stage", ["merge", "load"])
def test_a_merge_that_nobody_waited_for_leaves_nothing_behind(
    t2v: Any, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled while LoRAs are merged, or while a model is read with them: the next run has its own weights."""
    first, second = ({QUERY: lora(128, 128), HIDDEN: loha(256, 128)}, {QUERY: loha(128, 128)})
    model = in_pool(t2v)
    if stage == "merge":
        ksample(model)
    connection = model.model.diffusion_model.remote.pool().connection
    request = connection.request

    def give_up(kind: str, fields: Any, tensors: Any = None, **more: Any) -> Any:
        if kind != stage:
            return request(kind, fields, tensors, **more)
        connection._send(kind, fields, tensors or {}, awaited=False)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(connection, "request", give_up)
        ksample(with_file(model, first))
    assert distance(ksample(with_file(model, second)), ksample(with_file(t2v, second))) < TOLERANCE
    assert distance(ksample(model), ksample(t2v)) < TOLERANCE


def scheduled(strengths: tuple[float, ...], seed: int, parts: dict[str, dict[str, Tensor]]) -> Any:
    """A prompt with a LoRA of its own, whose strength changes as the run goes on."""
    import comfy.hooks

    given = {
        f"diffusion_model.{layer}.{name}": value for layer, found in parts.items() for name, value in found.items()
    }
    hooks = comfy.hooks.create_hook_lora(given, 1.0, 0.0)
    group = comfy.hooks.HookKeyframeGroup()
    for index, strength in enumerate(strengths):
        group.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=index / len(strengths)))
    hooks.set_keyframes_on_hooks(group)
    return comfy.hooks.set_hooks_for_conditioning(bridge_kit.prompt(seed), hooks)


@pytest.mark.parametrize("form", ["on one prompt", "scheduled", "beside a LoRA and a cache"])
def test_lora_hooks(t2v: Any, many: Any, form: str) -> None:
    """Weights are swapped in the middle of a run, and are what they were after it."""
    models = [t2v, many]
    if form.startswith("beside"):
        caching, levels = engine("caching"), engine("sampling").sigmas(8, 8.0, "euler").tolist()
        curve = caching.Curve(
            "own", "t2v", tuple(levels[:-1]), (1.0, *[0.99] * 7), None, None, (("only", "x"),), "", (128, 2)
        )
        models = [bridge().with_settings(model, cache=caching.MagCache(0.3, 2, 0.1, curve=curve)) for model in models]
        models = [with_file(model, {HIDDEN: loha(256, 128)}) for model in models]

    def sampled(model: Any) -> Tensor:
        strengths = (1.0,) if form == "on one prompt" else (1.0, 0.3)
        positive = scheduled(strengths, 1, {QUERY: lora(128, 128), HIDDEN: lora(256, 128)})
        negative = scheduled((0.6,), 2, {QUERY: loha(128, 128)}) if form == "scheduled" else bridge_kit.prompt(2)
        return ksample(model, steps=8, positive=positive, negative=negative)

    theirs, ours = (sampled(model) for model in models)
    assert distance(theirs, ksample(models[0], steps=8)) > 1e-2, "the hooks change nothing"
    assert distance(ours, theirs) < TOLERANCE
    assert distance(ksample(models[1], steps=8), ksample(models[0], steps=8)) < TOLERANCE
    assert torch.equal(sampled(models[1]), ours)


def test_lora_hooks_on_fp8_weights(t2v: Any) -> None:
    """Cast anew from the file's values at every swap: nearer to no FP8 than one GPU, which keeps a weight's scale."""
    recipe = engine("quant").Recipe("rowwise", backend="reference")
    here, there = (bridge().with_recipe(model, recipe)[0] for model in (t2v, in_pool(t2v, ring=2)))
    positive = scheduled((1.0, 0.3), 1, {QUERY: lora(128, 128), HIDDEN: lora(256, 128)})
    plain = ksample(there, steps=4)
    exact, theirs, ours = (ksample(model, steps=4, positive=positive) for model in (t2v, here, there))
    assert distance(ours, exact) < min(0.12, distance(theirs, exact)) and distance(exact, ksample(t2v, steps=4)) > 0.1
    assert torch.equal(ksample(there, steps=4), plain)


def test_sharded_weights_take_no_hooks(t2v: Any) -> None:
    sharded = in_pool(t2v, weights="shard")
    positive = scheduled((1.0,), 1, {QUERY: lora(128, 128)})
    for _ in range(2):
        with pytest.raises(engine("errors").InputError, match=r"LoRA hooks .* sharded over 2 GPUs"):
            ksample(sharded, positive=positive)
        ksample(sharded)
