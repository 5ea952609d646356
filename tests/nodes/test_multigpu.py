"""MODELs in a pool under core's sampler, LoRA loader and patcher: the same latents as without, and no memory here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bridge_kit
import pytest
import torch
from bridge_kit import bridge, distance, engine, ksample
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))

pytestmark = [pytest.mark.usefixtures("comfy_core", "inference", "pools_end"), pytest.mark.timeout(120)]
TOLERANCE = 1e-4
"""fp32 over a few steps, sums in another order."""


@pytest.fixture(scope="module")
def files(comfy_core: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for kind in ("t2v", "i2v", "ti2v"):
        found[kind] = folder / f"{kind}.safetensors"
        save_file(bridge_kit.core_weights(kind), found[kind])
    return found


def model_of(path: Path) -> Any:
    """A MODEL as Load Wan2.2 Checkpoint returns it."""
    with torch.inference_mode(False):
        net = engine("checkpoint.load").load_transformer(path, dtype=torch.float32)
    source = engine("parallel.source").ModelSource.of(path, dtype=torch.float32)
    return bridge().build_model_patcher(net, None, source)


def in_pool(model: Any, **topology: Any) -> Any:
    pools, remote = engine("parallel.pools"), engine("parallel.remote")
    return bridge().in_pool(model, pools.PoolSpec(devices=("cpu", "cpu")), remote.Topology(**topology))


@pytest.fixture(scope="module")
def t2v(files: dict[str, Path]) -> Any:
    return model_of(files["t2v"])


@pytest.fixture(scope="module")
def many(t2v: Any) -> Any:
    return in_pool(t2v)


def close(ours: torch.Tensor, theirs: torch.Tensor, bound: float = TOLERANCE) -> None:
    assert distance(ours, theirs) < bound


def test_core_samples_it_as_any_model(t2v: Any, many: Any) -> None:
    import comfy.model_management

    close(ksample(many), ksample(t2v))
    close(ksample(many, cfg=1.0), ksample(t2v, cfg=1.0))
    assert many.model_size() == 0 and many.loaded_size() == 0 and many.memory_required([2, 16, 21, 90, 160]) == 0
    assert all(parameter.is_meta for parameter in many.model.diffusion_model.parameters())
    comfy.model_management.unload_all_models()
    close(ksample(many), ksample(t2v))


def test_tasks_with_images(files: dict[str, Path]) -> None:
    model = model_of(files["i2v"])
    generator = torch.Generator().manual_seed(4)
    image, mask = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.ones(1, 4, 2, 4, 4)
    mask[:, :, 0] = 0
    given = {
        name: [[rows[0][0], {"concat_latent_image": image, "concat_mask": mask}]]
        for name, rows in (("positive", bridge_kit.prompt(1)), ("negative", bridge_kit.prompt(2)))
    }
    close(ksample(in_pool(model), **given), ksample(model, **given))
    model = model_of(files["ti2v"])
    latent = bridge_kit.empty_latent(48)
    latent["samples"] += 0.3
    latent["noise_mask"] = torch.ones(1, 1, 2, 4, 4)
    latent["noise_mask"][:, :, 0] = 0
    close(ksample(in_pool(model), latent), ksample(model, latent))


def test_core_loras_before_and_after_the_node(t2v: Any, many: Any) -> None:
    file = bridge_kit.core_lora(bridge_kit.lora_pairs(bridge_kit.core_weights()))
    plain = ksample(many)
    for strength in (1.0, 0.4):
        theirs = ksample(bridge_kit.with_core_lora(t2v, file, strength))
        assert distance(theirs, plain) > 1e-2
        close(ksample(bridge_kit.with_core_lora(many, file, strength)), theirs)
    before = in_pool(bridge_kit.with_core_lora(t2v, file, 0.4))
    close(ksample(before), theirs)
    close(ksample(bridge_kit.with_core_lora(before, file, 0.3)), ksample(bridge_kit.with_core_lora(t2v, file, 0.7)))
    assert torch.equal(ksample(many), plain)


@pytest.mark.parametrize("live", [False, True])
def test_our_lora_loader(t2v: Any, many: Any, live: bool) -> None:
    file = bridge_kit.core_lora(bridge_kit.lora_pairs(bridge_kit.core_weights()))
    file["diffusion_model.blocks.0.diff_m"] = 0.2 * torch.randn(1, 6, 128, generator=torch.Generator().manual_seed(1))
    ours, theirs = (bridge().load_lora(model, file, 0.8, live=live) for model in (many, t2v))
    assert (ours.changed, ours.live) == (theirs.changed, theirs.live) and ours.live == (20 if live else 0)
    close(ksample(ours.model), ksample(theirs.model))
    close(ksample(many), ksample(t2v))


def test_recipes_before_and_after_the_node(t2v: Any, many: Any) -> None:
    recipe = engine("quant").Recipe("DelayedScaling", backend="reference", keep=("blocks.1.",))
    theirs, resolution = bridge().with_recipe(t2v, recipe)
    tokens = in_pool(t2v, ring=2)  # with cfg 2, each half of guidance has scales of its own for its text
    after, same = bridge().with_recipe(tokens, recipe)
    assert same.backend.name == resolution.backend.name and bridge().recipe_of(after) == recipe
    assert bridge().fp8_layers(after) == bridge().fp8_layers(theirs) == 10
    wanted = ksample(theirs)
    assert distance(wanted, ksample(t2v)) > 1e-3
    close(ksample(after), wanted, 2e-2)
    close(ksample(in_pool(theirs, ring=2)), wanted, 2e-2)
    undone, _ = bridge().with_recipe(after, engine("quant").Recipe("none"))
    assert torch.equal(ksample(undone), ksample(tokens)) and bridge().recipe_of(undone) is None
    with pytest.raises(engine("errors").InputError, match=r"keep names 'blocks\.7\.'"):
        bridge().with_recipe(many, engine("quant").Recipe("rowwise", backend="reference", keep=("blocks.7.",)))


@pytest.mark.parametrize("form", ["fp32", "bf16", "scaled_fp8"])
def test_a_model_of_cores_loader_hands_its_weights_over(form: str) -> None:
    theirs = bridge_kit.quantised_core_model(form)
    hosted, ours = bridge().hosted(theirs), in_pool(theirs, ring=2)
    close(ksample(ours), ksample(hosted))
    file = bridge_kit.core_lora(bridge_kit.lora_pairs(bridge_kit.core_weights()))
    close(
        *(ksample(bridge_kit.with_core_lora(model, file)) for model in (ours, hosted)), 1e-2 if "fp8" in form else 1e-4
    )
    recipe = engine("quant").Recipe("rowwise", backend="reference")
    made = bridge().with_recipe(hosted, recipe)[0]
    for model in (bridge().with_recipe(ours, recipe)[0], in_pool(made, ring=2)):
        close(ksample(model), ksample(made), 2e-2)
    assert bridge().fingerprint(ours) == bridge().fingerprint(hosted)
    assert ours.model.diffusion_model.state_dict().keys() <= theirs.model.diffusion_model.state_dict().keys()


def test_sparse_attention_and_its_report(t2v: Any, many: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "wan_fp8")
    sparsity = engine("attention.sparse.setting").Sparsity(
        policy="density", density=0.5, backend="masked", bound=0.3, skip_first=0.0, skip_last=0.0,
        skip_first_blocks=0, skip_last_blocks=0,
    )  # fmt: skip
    attention = engine("attention").Attention(sparsity=sparsity)
    latent = bridge_kit.empty_latent(size=24)
    results, facts = [], []
    for model in (many, t2v):
        sparse = bridge().with_settings(model, attention=attention)
        results.append(ksample(sparse, latent))
        facts += sparse.model.diffusion_model.sparse_facts
    close(*results)
    assert distance(results[1], ksample(t2v, latent)) > 1e-3
    told = [record.message for record in caplog.records if record.message.startswith("sparse attention (density")]
    assert len(told) == 2 and "self-attentions" in told[0], told
    assert facts[0]["policy"] == "density" and facts[0]["answered"]["masked"] == 2 * facts[1]["answered"]["masked"]
    for name in ("heads", "heads_dense", "density_by_step", "density_by_block"):
        assert facts[0][name] == facts[1][name], "the report is about both halves of guidance"
    ring = bridge().with_settings(in_pool(t2v, ring=2), attention=attention)
    with pytest.raises(engine("errors").InputError, match="which a ring splits: use ulysses alone"):
        ksample(ring, latent)


def test_a_cache_and_its_report(t2v: Any, many: Any, caplog: pytest.LogCaptureFixture) -> None:
    caching, levels = engine("caching"), engine("sampling").sigmas(12, 8.0, "euler").tolist()
    ratios = (1.0, *[0.99] * 11)
    curve = caching.Curve("own", "t2v", tuple(levels[:-1]), ratios, None, None, (("only", "x"),), "", (128, 2))
    cache = caching.MagCache(0.3, 2, 0.1, curve=curve)
    caplog.set_level("INFO", "wan_fp8")
    close(*(ksample(bridge().with_settings(model, cache=cache), steps=12) for model in (many, t2v)))
    assert bridge().fingerprint(many) == bridge().fingerprint(t2v)
    status = [record.message for record in caplog.records if record.message.startswith("pool: ")]
    assert len(status) == 1 and "CPU process 0, CPU process 1; " in status[0] and "(12 of them)" in status[0]
    told = [record.message for record in caplog.records if "passes computed" in record.message]
    assert len(told) == 2 and told[0].split(";")[0] == told[1].split(";")[0] and " 0 skipped" not in told[0]


def test_a_cache_and_sparse_attention_in_one_run(t2v: Any, many: Any, caplog: pytest.LogCaptureFixture) -> None:
    caching, levels = engine("caching"), engine("sampling").sigmas(12, 8.0, "euler").tolist()
    ratios = (1.0, *[0.99] * 11)
    curve = caching.Curve("own", "t2v", tuple(levels[:-1]), ratios, None, None, (("only", "x"),), "", (128, 2))
    sparsity = engine("attention.sparse.setting").Sparsity(
        policy="density", density=0.5, backend="masked", bound=None, skip_first=0.2, skip_last=0.0,
        skip_first_blocks=0, skip_last_blocks=0,
    )  # fmt: skip
    settings = {
        "cache": caching.MagCache(0.3, 2, 0.1, curve=curve),
        "attention": engine("attention").Attention(sparsity=sparsity),
    }
    caplog.set_level("INFO", "wan_fp8")
    latent = bridge_kit.empty_latent(size=24)
    models = [bridge().with_settings(model, **settings) for model in (many, t2v)]
    close(*(ksample(model, latent, steps=12) for model in models))
    for words in ("passes computed", "self-attentions"):
        told = [record.message.split(";")[0] for record in caplog.records if words in record.message]
        assert len(told) == 2 and told[0].split(":")[0] == told[1].split(":")[0], told


def test_cancelled_in_the_middle(many: Any) -> None:
    import comfy.model_management

    right, steps = ksample(many), []

    def cancel(step: int, *_: Any) -> None:
        steps.append(step)
        if step == 1:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ksample(many, steps=20, callback=cancel)
    assert steps == [0, 1]
    assert torch.equal(ksample(many), right)


def test_what_does_not_travel_is_refused_by_name(t2v: Any, many: Any, tmp_path: Path) -> None:

    refused = engine("errors").UnsupportedPatchError
    with pytest.raises(refused, match="put the node before Wan2"):
        bridge().fork(many)
    with pytest.raises(refused, match="put such a node before"):
        many.get_key_patches()
    other = many.clone()
    other.set_model_patch_replace(lambda *_: None, "dit", "double_block", 0)
    with pytest.raises(refused, match="replaces blocks or the attention"):
        ksample(other)
    for save in (bridge().save_model, bridge().save_scales):
        with pytest.raises(engine("errors").InputError, match="lies in the processes of a pool"):
            save(many, tmp_path / "x.safetensors")


@pytest.mark.parametrize("topology", [{"cfg": 2}, {"ulysses": 1, "ring": 2}])
def test_a_curve_is_measured_in_a_pool(t2v: Any, topology: dict[str, int]) -> None:
    """All tokens of a half of guidance are on one rank where it is measured; each half tells of its own passes."""
    caching = engine("caching")
    curves, results = [], []
    many = in_pool(t2v, **topology)
    for model in (many, t2v, many):
        recording = caching.Recording()
        measured = bridge().with_settings(model, recording=recording)
        results.append(ksample(measured, steps=6))
        curves.append(recording.curve("own", measured.model.diffusion_model.spec))
    close(results[0], results[1])
    assert len(curves[1].cond) == 6 and curves[1].uncond is not None and len(set(curves[1].cond)) > 3
    for name in ("sigmas", "cond", "uncond"):
        assert getattr(curves[0], name) == pytest.approx(getattr(curves[1], name), rel=1e-4), name
    assert curves[2] == curves[0], "a run before it left something"
    close(ksample(many), ksample(t2v))


def test_inputs_of_the_node() -> None:
    import nodes_kit

    multigpu = nodes_kit.module("nodes.multigpu")
    wrong = nodes_kit.module("wan_fp8.errors").InputError
    assert multigpu._pool(" CPU:3 ", "").devices == ("cpu",) * 3
    assert multigpu._pool("0, 2", "").devices == ("cuda:0", "cuda:2")
    chosen = multigpu._topology("2 x 3x1", "shard", 2)
    assert (chosen.cfg, chosen.ulysses, chosen.ring, chosen.weights, chosen.experts) == (2, 3, 1, "shard", 2)
    assert multigpu._topology("Auto", "auto", 1).cfg is None
    for call, words in (
        (lambda: multigpu._pool("two", ""), "numbers with commas"),
        (lambda: multigpu._topology("2x2", "auto", 1), "cfg x ulysses x ring"),
        (lambda: multigpu._topology("auto", "both", 1), "weights is one of"),
        (lambda: multigpu._pool("all", "10.0.0.1"), "host:port"),
        (lambda: multigpu._pool("all", "10.0.0.1:7421"), "WAN_FP8_POOL_TOKEN"),
    ):
        with pytest.raises(wrong, match=words):
            call()
