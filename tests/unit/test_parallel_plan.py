"""What ``auto`` chooses, as a table; the sizes that it goes by against the published ones."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from wan_fp8.errors import InputError
from wan_fp8.models.specs import ANIMATE_14B, I2V_A14B, S2V_14B, TI2V_5B, ModelSpec
from wan_fp8.models.wan import build_model
from wan_fp8.parallel import Machine, ParallelDims, Workload, plan
from wan_fp8.parallel.needs import TextNeeds, VAENeeds
from wan_fp8.parallel.plan import TextPlace, measured_tflops, sent_bytes, weight_bytes
from wan_fp8.parallel.remote import Topology
from wan_fp8.quant import Recipe

A14B = Workload(spec=I2V_A14B, tokens=75_600, experts=2)
BF16 = dataclasses.replace(A14B, fp8=False)
UNGUIDED = dataclasses.replace(A14B, guidance=False)
SMALL = Workload(spec=TI2V_5B, tokens=27_280)


@pytest.mark.parametrize(
    ("gpus", "memory", "work", "dims"),
    [
        (1, 80, A14B, ParallelDims()),
        (2, 80, A14B, ParallelDims(cfg=2)),
        (2, 80, UNGUIDED, ParallelDims(ulysses=2)),
        (3, 80, A14B, ParallelDims(ring=3)),  # 40 heads
        (3, 80, SMALL, ParallelDims(ulysses=3)),  # 24 heads
        (4, 80, A14B, ParallelDims(cfg=2, ulysses=2)),
        (4, 80, UNGUIDED, ParallelDims(ulysses=4)),
        (5, 80, SMALL, ParallelDims(ring=5)),
        (6, 80, A14B, ParallelDims(cfg=2, ring=3)),
        (6, 80, UNGUIDED, ParallelDims(ulysses=2, ring=3)),
        (8, 80, A14B, ParallelDims(cfg=2, ulysses=4)),
        (8, 80, UNGUIDED, ParallelDims(ulysses=8)),
        (16, 80, A14B, ParallelDims(cfg=2, ulysses=8)),
        (16, 80, UNGUIDED, ParallelDims(ulysses=8, ring=2)),
        (4, 80, BF16, ParallelDims(cfg=2, ulysses=2)),
        (4, 48, A14B, ParallelDims(cfg=2, ulysses=2)),
        (4, 32, A14B, ParallelDims(cfg=2, ulysses=2, shard=2)),
        (4, 18, A14B, ParallelDims(cfg=2, ulysses=2, shard=4)),
        (4, 48, BF16, ParallelDims(cfg=2, ulysses=2, shard=2)),
    ],
)  # fmt: skip
def test_choice(gpus: int, memory: float, work: Workload, dims: ParallelDims) -> None:
    chosen = plan(Machine(gpus=gpus, memory_gib=memory), work)
    assert chosen.dims == dims, str(chosen)
    assert chosen.weights_gib + chosen.activations_gib < memory


def test_hosts_shard_inside_themselves() -> None:
    chosen = plan(Machine(gpus=16, memory_gib=40, gpus_per_host=8), BF16)
    assert chosen.dims.shard in (2, 4, 8)
    tight = plan(Machine(gpus=16, memory_gib=12, gpus_per_host=8), BF16)
    assert tight.dims.shard == 16, str(tight)


def test_the_reason_is_told() -> None:
    text = str(plan(Machine(gpus=4, memory_gib=80), A14B))
    assert text.startswith("cfg 2 x ulysses 2 x ring 1, weights replicated: The two halves of guidance share nothing")
    assert "2 divides the 40 heads" in text and "2 experts in FP8 take" in text and "fit the 80 GiB" in text
    text = str(plan(Machine(gpus=3, memory_gib=28), A14B))
    assert "3 does not divide the 40 heads, so that 3 groups gather keys and values" in text
    assert "do not fit the 28 GiB of a GPU: weights are sharded over 3" in text


TEXT = TextNeeds(weights=11_360_000_000, gathered=2_860_000_000)
"""UMT5-XXL in bf16: its table and two of its 24 blocks are whole while it runs."""
VAE_21 = VAENeeds(weights=254_000_000, widest=288, stride=8, itemsize=2)
VAE_22 = VAENeeds(weights=1_410_000_000, widest=384, stride=16, itemsize=2)
WITH_PARTS = dataclasses.replace(A14B, text=TEXT, vae=VAE_21)
SMALL_PARTS = dataclasses.replace(SMALL, frames=31, text=TEXT, vae=VAE_22)


@pytest.mark.parametrize(
    ("gpus", "memory", "work", "shard", "place"),
    [
        (2, 80, WITH_PARTS, 1, TextPlace.FIRST),
        (2, 48, WITH_PARTS, 1, TextPlace.SHARED),  # 27.0 + 8.7 + 0.2, and 5.3 of 10.6, of 44.2
        (2, 40, WITH_PARTS, 2, TextPlace.FIRST),  # 14.6 + 8.7 + 0.2 + 10.6 of 36.8
        (4, 24, WITH_PARTS, 4, TextPlace.SHARED),
        (4, 18, WITH_PARTS, 4, TextPlace.IN_TURN),
        (2, 80, dataclasses.replace(WITH_PARTS, text=None), 1, None),
        (2, 24, SMALL_PARTS, 1, TextPlace.SHARED),  # 4.7 + 1.3 + 7.6 of the VAE at work, and 5.3, of 22.1
        (2, 32, SMALL_PARTS, 1, TextPlace.FIRST),
        (1, 32, dataclasses.replace(SMALL_PARTS, vae=None), 1, TextPlace.FIRST),
        (1, 18, dataclasses.replace(SMALL_PARTS, vae=None), 1, TextPlace.IN_TURN),
    ],
)  # fmt: skip
def test_text_encoder_and_vae_are_counted(
    gpus: int, memory: float, work: Workload, shard: int, place: TextPlace | None
) -> None:
    chosen = plan(Machine(gpus=gpus, memory_gib=memory), work)
    assert (chosen.dims.shard, chosen.text) == (shard, place), str(chosen)


def test_where_the_parts_go_is_told() -> None:
    text = str(plan(Machine(gpus=2, memory_gib=48), WITH_PARTS))
    assert "The text encoder of 10.6 GiB does not fit the first GPU beside them: each GPU holds 5.3 GiB of it." in text
    # four frames of half of 720x1280 pixels, 288 values each, four times; the video in bf16 four times
    working = (4 * (4 * 360 * 1280 * 288) + 4 * (3 * 81 * 720 * 1280)) * 2 / 2**30
    assert f"The VAE takes 0.2 GiB on each GPU, and {working:.1f} GiB or more while it runs." in text
    text = str(plan(Machine(gpus=2, memory_gib=40), WITH_PARTS))
    assert (
        "do not fit the 40 GiB of a GPU together with the text encoder and the VAE: weights are sharded over 2" in text
    )
    assert "fits the first GPU beside them" in text
    text = str(plan(Machine(gpus=4, memory_gib=18), WITH_PARTS))
    assert "for a new prompt it and a model change places" in text
    text = str(plan(Machine(gpus=2, memory_gib=12), dataclasses.replace(SMALL_PARTS, vae=None)))
    assert "The text encoder of 10.6 GiB does not fit beside them: each GPU holds 5.3 GiB of it, for a new" in text


def test_an_explicit_choice_that_cannot_fit_is_refused_before_it_is_tried() -> None:
    """Two experts may take turns; one alone must fit."""
    machine = Machine(gpus=2, memory_gib=32)
    for topology in (Topology(weights="replicate", experts=2), Topology(weights="replicate", experts=2, ulysses=2)):
        dims, _ = topology.plan(I2V_A14B, machine, 75_600, fp8=True, guidance=True)
        assert dims.shard == 1
        with pytest.raises(InputError, match=r"weights 'replicate' with cfg .* lacks \d+\.\d GiB .* one i2v model"):
            topology.plan(I2V_A14B, machine, 75_600, fp8=False, guidance=True)
    with pytest.raises(InputError, match=r"weights 'shard' .*: choose weights 'auto', an FP8 recipe"):
        Topology(weights="shard").plan(I2V_A14B, Machine(gpus=2, memory_gib=12), 75_600, fp8=False, guidance=True)


def test_the_choice_is_the_least_to_send() -> None:
    """Against every layout there is, not only those that the planner looks at."""
    for gpus in (2, 4, 6, 8, 12, 16):
        for work in (A14B, UNGUIDED, SMALL):
            chosen = plan(Machine(gpus=gpus, memory_gib=80), work).dims
            for cfg in (1, 2):
                for ulysses in (1, 2, 3, 4, 6, 8, 12, 16):
                    if gpus % (cfg * ulysses) or work.spec.num_heads % ulysses or (cfg == 2 and not work.guidance):
                        continue
                    other = ParallelDims(cfg=cfg, ulysses=ulysses, ring=gpus // cfg // ulysses)
                    assert sent_bytes(chosen, work) <= sent_bytes(other, work)


def test_what_is_sent_takes_the_link_s_time() -> None:
    nvlink, pcie = (plan(Machine(gpus=2, memory_gib=80, link=link), UNGUIDED) for link in ("nvlink", "pcie"))
    measured = plan(Machine(gpus=2, memory_gib=80, link="pcie", link_gbs=10), UNGUIDED)
    # by hand: q, k, v and the output, half of each rank's half, 40 blocks; the fp32 stream once
    by_hand = 40 * 4 * 37_800 * 5120 * 2 // 2 + 37_800 * 5120 * 4
    assert nvlink.sent_gib == pcie.sent_gib == by_hand / 2**30
    assert nvlink.exchange_seconds == pytest.approx(by_hand / 250e9)
    assert pcie.exchange_seconds == pytest.approx(by_hand / 20e9)
    assert measured.exchange_seconds == pytest.approx(by_hand / 10e9)
    assert plan(Machine(gpus=2, memory_gib=80), A14B).sent_gib == 0


@pytest.mark.parametrize("spec", [I2V_A14B, TI2V_5B, ANIMATE_14B, S2V_14B])
def test_weights_are_those_of_the_model(spec: ModelSpec) -> None:
    import torch

    with torch.device("meta"):
        model = build_model(spec)
    recipe = Recipe("rowwise")
    converted = sum(
        model.get_parameter(f"{name}.weight").numel() for name, _ in model.named_modules() if recipe.converts(name)
    )
    everything = sum(parameter.numel() for parameter in model.parameters())
    exact = 2 * everything - converted
    assert weight_bytes(Workload(spec=spec, tokens=1), 1) == pytest.approx(exact, rel=5e-3)
    blocks = 2 * sum(parameter.numel() for parameter in model.blocks.parameters()) - converted
    shared = exact - blocks + blocks / 4 + 2 * blocks / spec.num_layers
    assert weight_bytes(Workload(spec=spec, tokens=1), 4) == pytest.approx(shared, rel=1e-2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: plan(Machine(gpus=2, memory_gib=12), BF16), "take more GPUs, FP8 weights, or a smaller video"),
        (lambda: plan(Machine(gpus=1, memory_gib=12), SMALL_PARTS), "the VAE needs 14.. GiB a GPU for this video"),
        (
            lambda: plan(Machine(gpus=1, memory_gib=10), dataclasses.replace(SMALL_PARTS, vae=None)),
            "the text encoder needs 11.. GiB a GPU .* load it in fp8",
        ),
        (lambda: Machine(gpus=0, memory_gib=80), "at least one GPU"),
        (lambda: Machine(gpus=2, memory_gib=80, link="string"), "link is one of nvlink, pcie"),
        (lambda: Machine(gpus=6, memory_gib=80, gpus_per_host=4), "must divide the 6 GPUs"),
        (lambda: Workload(spec=I2V_A14B, tokens=0), "at least one token"),
        (lambda: ParallelDims(cfg=3), "cfg is 1 or 2"),
        (lambda: ParallelDims(ulysses=0), "ulysses counts ranks from 1"),
        (lambda: ParallelDims(ring=1.5), "ring counts ranks from 1"),  # type: ignore[arg-type]
        (lambda: ParallelDims(ulysses=4, shard=3), "shard must divide the 4 ranks"),
        (lambda: ParallelDims(ulysses=3).check(I2V_A14B), "does not divide the 40 heads"),
    ],
)
def test_refusals(make, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_there_has_to_be_a_process_group() -> None:
    import torch

    from wan_fp8.parallel import parallelize

    with torch.device("meta"):
        model = build_model(TI2V_5B)
    with pytest.raises(InputError, match="init_process_group"):
        parallelize(model, ParallelDims(ulysses=2))
    assert model.layout is None


def test_estimate_of_a_step() -> None:
    """Against the committed measurements of one GPU that the rates come from, and halved by a second GPU."""
    for name, file in (("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200")):
        path = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / f"dit_i2v-a14b_1280x720_{file}.json"
        rows = [row for row in json.loads(path.read_text())["rows"] if row["attention"] == "fa3"]
        if file == "h200":  # its FP8 row is the single GPU of the later of two runs
            several = json.loads(path.with_name("dit_i2v-a14b_1280x720_2x_h200.json").read_text())["rows"]
            rows += [row for row in several if row["world_size"] == 1 and row["run"] == 2]
        assert {row["recipe"] for row in rows} >= {"none", "DelayedScaling"}
        for row in (row for row in rows if row["recipe"] in ("none", "DelayedScaling")):
            work = dataclasses.replace(A14B, fp8=row["recipe"] != "none")
            tflops = measured_tflops(name, fp8=work.fp8)
            one = plan(Machine(gpus=1, memory_gib=140, tflops=tflops), work)
            assert one.step_seconds == pytest.approx(2 * 40 * row["layer_ms"] / 1000, rel=0.01)
            two = plan(Machine(gpus=2, memory_gib=140, tflops=tflops), work)
            assert two.step_seconds == pytest.approx(one.step_seconds / 2) and f"{two.step_seconds:.1f} s" in str(two)
    assert measured_tflops("another GPU", fp8=True) is None
    assert plan(Machine(gpus=2, memory_gib=80), A14B).step_seconds is None
    with pytest.raises(InputError, match="more than nothing"):
        Machine(gpus=2, memory_gib=80, tflops=0)


def test_the_worked_plan_of_the_docs_is_what_the_planner_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "multi_host.md").read_text(encoding="utf-8")
    code, said = re.findall(r"^```python\n(.+?)^```\n+^```\n(.+?)^```", page, re.MULTILINE | re.DOTALL)[0]
    exec(compile(code, "docs/multi_host.md", "exec"), {})  # noqa: S102 - our own page
    assert capsys.readouterr().out == said and len(said.splitlines()) == 5


def test_layouts_that_sparse_attention_cannot_take() -> None:
    assert ParallelDims(cfg=2).sparse_refusal is ParallelDims(cfg=2, ulysses=2).sparse_refusal is None
    assert "which a ring splits" in (ParallelDims(ulysses=2, ring=2).sparse_refusal or "")
