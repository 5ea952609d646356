"""``benchmarks/scaling_model.py`` on rows made from known coefficients: it finds them, and what follows from them."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import ranks
import scaling_model
import typer
from typer.testing import CliRunner

BLOCK = {"work": 200.0, "overhead": 0.4, "heads": 2.5, "keys": 4.0, "weights": 0.7}
FIXED, STREAM = 8.0, 3.0
TOPOLOGIES = ("one", "cfg2", "ulysses2", "ring2", "ulysses4", "cfg2+ulysses2", "ulysses2+fsdp")


def rows(topologies: tuple[str, ...] = TOPOLOGIES) -> list[dict]:
    spec, tokens = scaling_model.MODELS["i2v-A14B"], 75_600
    made = []
    for name in topologies:
        dims = ranks.topology(name)
        share = scaling_model.features(spec, tokens, dims, True)
        layer = sum(BLOCK[part] * share[part] for part in BLOCK)
        fixed = FIXED + STREAM * scaling_model.stream_gb(spec, tokens, dims)
        made.append(
            {
                "model": "i2v-A14B", "size": "1280x720", "frames": 81, "tokens": tokens, "recipe": "DelayedScaling",
                "attention": "fa3", "topology": None if name == "one" else name, "layer_ms": layer, "fixed_ms": fixed,
                "seconds_40_steps": 40 * (2 // dims.cfg) * (40 * layer + fixed) / 1000,
            }
        )  # fmt: skip
    return made


def test_known_coefficients_are_found() -> None:
    model = scaling_model.fit(rows())
    assert model.block == pytest.approx(BLOCK, rel=1e-6)
    assert (model.fixed, model.stream) == pytest.approx((FIXED, STREAM), rel=1e-6)
    assert model.worst < 1e-9
    # by hand: 4 ranks hold 18,900 tokens of 5120 channels each and send three quarters of q, k, v and the output
    sent = 4 * 18_900 * 5120 * 2 * 3 / 4 / 1e9
    parts = model.step(ranks.topology("ulysses4"), 8, 9.0)
    assert parts["work"] == pytest.approx(2 * 40 * 200 / 4 / 1000)
    assert parts["network"] == 0
    stream = STREAM * 18_900 * 5120 * 4 * 3 / 1e9
    assert parts["exchange"] == pytest.approx(2 * (40 * 2.5 * sent + stream) / 1000)
    assert sum(model.best(4, 8, 9.0)[1].values()) == pytest.approx(model.measured[4])


def test_what_leaves_a_host_is_slower() -> None:
    model = scaling_model.fit(rows())
    inside = model.step(ranks.topology("cfg2+ulysses8"), 8, 9.0)
    across = model.step(ranks.topology("ulysses10"), 8, 9.0)
    assert inside["network"] == 0
    assert across["network"] > across["exchange"] > 0  # 2 of 9 others, 9 times slower
    assert scaling_model.outside_share(range(10), 8) == pytest.approx(2 / 9)
    for gpus in scaling_model.SIZES:
        dims, _ = model.best(gpus, 8, 9.0)
        assert dims.world == gpus and 40 % dims.ulysses == 0


def test_page_and_figure(tmp_path: Path) -> None:
    results, page, svg = tmp_path / "dit.json", tmp_path / "scaling.md", tmp_path / "scaling.svg"
    results.write_text(json.dumps({"device": "a GPU", "date": "2026-01-01", "rows": rows()}))
    videos = []
    for gpus in (1, 2):
        one = {"t5_s": 0.1, "vae_encode_s": 8 / gpus, "dit_s": 600 / gpus + 2, "vae_decode_s": 8 / gpus + 1}
        videos.append({"row": "fp8", "world_size": gpus, "published_s_8_h100": 146.55} | one)
    headline = tmp_path / "headline.json"
    headline.write_text(json.dumps({"rows": videos}))
    page.write_text(f"before\n{scaling_model.BEGIN}\nold\n{scaling_model.END}\nafter\n")
    app = typer.Typer()
    app.command()(scaling_model.main)
    given = [str(results), "--page", str(page), "--svg", str(svg), "--headline", str(headline)]
    for _ in range(2):
        outcome = CliRunner().invoke(app, given)
        assert outcome.exit_code == 0, outcome.output
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert text.count(scaling_model.BEGIN) == 1 and "| 64 |" in text
    assert "| 80.10 | 146.55 |" in text  # 0.1 + 1 + 77 + 2
    drawn = ElementTree.fromstring(svg.read_text())
    assert drawn.tag.endswith("svg") and "64 GPU" in svg.read_text()


def test_rows_of_one_gpu_alone_are_refused(tmp_path: Path) -> None:
    results = tmp_path / "dit.json"
    results.write_text(json.dumps({"device": "a GPU", "date": "2026-01-01", "rows": rows(("one", "cfg2"))}))
    app = typer.Typer()
    app.command()(scaling_model.main)
    outcome = CliRunner().invoke(
        app, [str(results), "--page", str(tmp_path / "p.md"), "--svg", str(tmp_path / "f.svg")]
    )
    assert outcome.exit_code != 0 and not (tmp_path / "f.svg").exists()
    with pytest.raises(ValueError, match="one whose ranks share a sequence"):
        scaling_model.fit(rows(("one", "cfg2")))


def test_runs_are_brought_to_one_clock_and_a_block_without_exchange_is_fitted() -> None:
    """Only one and two GPUs, the second run on a GPU that is 3 % slower: overhead and exchange are told apart by the
    block that was timed without the exchange, and a kind that no row has costs what the link takes by itself."""
    first, second = rows(("one", "ulysses2")), rows(("one", "ulysses2"))
    for run, made, slow in ((1, first, 1.0), (2, second, 1.03)):
        share = scaling_model.features(scaling_model.MODELS["i2v-A14B"], 75_600, ranks.topology("ulysses2"), True)
        made[1]["layer_ms_without_exchange"] = slow * (made[1]["layer_ms"] - BLOCK["heads"] * share["heads"])
        made[1]["exchange_alone"] = {"all_to_all_gbs": 250.0}
        for row in made:
            row["layer_ms"], row["run"] = slow * row["layer_ms"], run
    model = scaling_model.fit(first + second)
    for part in ("work", "overhead", "heads"):
        assert model.block[part] == pytest.approx(1.015 * BLOCK[part], rel=1e-6), part
    assert model.worst < 1e-9
    assert model.unknown == ("keys", "weights") and model.block["keys"] == 4.0  # ms a GB at 250 GB/s
    dims = ranks.topology("cfg2+ulysses2")
    sent = 4 * 37_800 * 5120 * 2 / 2 / 1e9
    hidden, open_s = (sum(model.step(dims, 8, 9.0, hidden=value).values()) for value in (True, False))
    assert open_s - hidden == pytest.approx(40 * (4.0 - 1.015 * 2.5) * sent / 1000)


def test_four_of_another_gpu_beside_the_goal() -> None:
    model = scaling_model.fit(rows())
    one = {"recipe": "rowwise", "backend": "torch", "world_size": 1}
    file = {
        "device": "NVIDIA H100 80GB HBM3",
        "rows": [one | {"attention": "fa3", "layer_ms": 217.0}, one | {"attention": "fa3-fp8", "layer_ms": 175.0}],
    }
    lines = [[cell.strip() for cell in line.split("|")] for line in scaling_model.goals_table(model, [file], 8, 9.0)]
    assert [(line[2], line[3], line[9]) for line in lines[2:]] == [
        ("rowwise, fa3", "217.0", "176"),
        ("rowwise, fa3-fp8 in its window", "181.1", "142"),  # 0.9 * 0.95 of the way
    ]
    # the work of a sequence on two GPUs, the overhead, and what two GPUs exchange, once a step: both halves at a time
    share = scaling_model.features(model.spec, 75_600, ranks.topology("ulysses2"), True)
    block = (217.0 - BLOCK["overhead"]) / 2 + BLOCK["overhead"] + BLOCK["heads"] * share["heads"]
    fixed = FIXED + STREAM * scaling_model.stream_gb(model.spec, 75_600, ranks.topology("ulysses2"))
    assert float(lines[2][6]) == pytest.approx(40 * (40 * block + fixed) / 1000, abs=0.51)


PACK = Path(__file__).resolve().parents[2]
RESULTS = PACK / "benchmarks" / "results"


def test_the_page_is_what_the_results_make(tmp_path: Path) -> None:
    """By the command that the page gives; and its sentences."""
    committed = (PACK / "docs" / "scaling.md").read_text()
    page, svg = tmp_path / "scaling.md", tmp_path / "scaling.svg"
    page.write_text(committed)
    command = committed.replace("\\\n", " ").split("python benchmarks/scaling_model.py ")[1].splitlines()[0].split()
    app = typer.Typer()
    app.command()(scaling_model.main)
    given = [str(PACK / part) if part.startswith("benchmarks") else part for part in command]
    outcome = CliRunner().invoke(app, [*given, "--page", str(page), "--svg", str(svg)])
    assert outcome.exit_code == 0, outcome.output
    assert page.read_text() == committed and svg.read_text() == (PACK / "docs" / "images" / "scaling.svg").read_text()
    measured = json.loads((RESULTS / "dit_i2v-a14b_1280x720_2x_h200.json").read_text())["rows"]
    model = scaling_model.fit([row for row in measured if row["overlap"] is not False])
    steps = {size: model.best(size, 8, 9.0) for size in scaling_model.SIZES}
    assert set(model.measured) == {1, 2}
    dims, parts = steps[4]
    longer = sum(model.step(dims, 8, 9.0, hidden=False).values()) / sum(parts.values()) - 1
    assert f"a step took {100 * longer:.0f} % longer" in committed
    shares = [100 * steps[size][1]["overhead"] / sum(steps[size][1].values()) for size in (8, 16)]
    assert "which is then {:.0f} to {:.0f} % of a step".format(*shares) in committed
    assert f"is 1 ms of its {model.block['overhead']:.0f}" in committed
    single = [row["layer_ms"] for row in measured if row["world_size"] == 1]
    lost = sorted(100 - 100 * row["efficiency"] for row in measured if row["world_size"] == 2)
    difference = 100 * (max(single) / min(single) - 1)
    assert f"differ by {difference:.0f} %, and the layouts lose {lost[0]:.0f} to {lost[-1]:.0f} %" in committed
