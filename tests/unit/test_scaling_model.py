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
        one = {"t5_s": 0.1, "vae_encode_s": 8 / gpus, "dit_s": 600 / gpus + 2, "vae_decode_s": 9 / gpus + 1}
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
    assert "| 80.22 | 146.55 |" in text  # 0.1 + 1 + 77 + 2.125
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
