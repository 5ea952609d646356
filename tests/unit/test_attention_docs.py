"""The figures and reasons of docs/attention.md against the result files and the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from test_docs import _texts

from wan_fp8.attention import ATTENTION
from wan_fp8.attention.core import register_backends

PACK = Path(__file__).resolve().parents[2]
PAGE = (PACK / "docs" / "attention.md").read_text(encoding="utf-8")


def rows(name: str) -> list[dict[str, Any]]:
    return list(json.loads((PACK / "benchmarks" / "results" / name).read_text())["rows"])


def table(*columns: str) -> list[list[str]]:
    """The cells of the table with these headings, without marks."""
    head = re.escape("| " + " | ".join(columns) + " |")
    body = re.search(head + r"\n\|[-| ]+\|\n((?:\|.*\|\n)+)", PAGE)
    assert body is not None, columns
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in body[1].splitlines()]


def test_kernel_figures_are_those_of_the_script() -> None:
    shown = {cells[0]: cells[1:] for cells in table("backend", "ms", "TFLOP/s", "error", "error, v + 0.5")}
    measured = {row["attention"]: row for row in rows("kernels_h200.json") if "attention" in row and "ms" in row}
    assert shown.keys() == measured.keys()
    for name, row in measured.items():
        errors = [f"{row[key]:.4f}" for key in ("error", "error_v_mean_half")]
        assert shown[name] == [f"{row['ms']:.1f}", f"{row['tflop_per_s']:.0f}", *errors], name


def test_block_figures_are_those_of_the_scripts() -> None:
    exact = {row["recipe"]: row for row in rows("dit_i2v-a14b_1280x720_h100.json")}
    fp8 = {row["recipe"]: row for row in rows("dit_i2v-a14b_1280x720_fp8-attention_h100.json")}
    for row in (exact["none"], fp8["none"], fp8["rowwise"]):
        assert f"{row['layer_ms']:.1f} ms" in PAGE, row["layer_ms"]
    for row in fp8.values():  # two blocks
        passes = sum(row["kernels"][name] for name in ("_cast_kernel", "_statistics_kernel", "_add_rows_kernel")) / 2
        assert f"{passes:.1f} ms of that" in PAGE, passes
    peers = {row["peer"]: row["layer_ms"] for row in rows("peers_h100.json")}
    for peer in ("ours, FA3", "diffusers, compiled, FA3"):
        assert f"{peers[peer]:.1f} ms" in PAGE, peer


def test_figures_of_the_readme_are_those_of_the_script() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    peers = {row["peer"]: f"{row['layer_ms']:.0f} ms" for row in rows("peers_h100.json")}
    lines = {line.split("|")[1].strip(): line for line in readme.splitlines() if line.startswith("| ")}
    wanted = {
        "bf16, attention as shipped": ("ours, cuDNN", "core ComfyUI, as shipped", "diffusers, compiled, as shipped"),
        "bf16, FlashAttention 3": ("ours, FA3", "core ComfyUI, FA3", "diffusers, compiled, FA3"),
        "FP8 linears ([recipes](docs/fp8.md)), FlashAttention 3": (
            "ours, FP8 DelayedScaling, FA3", "ours, FP8 rowwise, FA3", "core ComfyUI, FP8, FA3"
        ),
        "the same and FP8 attention, in the steps and blocks that allow it": ("ours, FP8 rowwise, FP8 attention",),
    }  # fmt: skip
    for heading, names in wanted.items():
        assert re.findall(r"\d+ ms", lines[heading]) == [peers[name] for name in names], heading


def test_residual_stream_figures_are_those_of_the_script() -> None:
    shown = table("blocks", "stream", "velocity, first step", "latents after 20 steps", "latents, worst of the runs")
    keys = ("velocity_error_first_step", "latent_error", "latent_error_worst")
    measured = [
        [str(row["layers"]), row["stream"], *(f"{row[key]:.4f}" for key in keys)]
        for row in rows("residual_stream.json")
    ]
    assert shown == measured
    kernels = {row.get("kernel"): row for row in rows("kernels_h200.json")}
    for stream in ("float32", "bfloat16"):
        assert f"{kernels[f'gated residual + LayerNorm + modulate, {stream} stream']['ms']:.3f} ms" in PAGE


def test_every_backend_is_described() -> None:
    register_backends()
    described = {name.strip() for cells in table("backend", "needs", "exact") for name in cells[0].split(",")}
    assert described == set(ATTENTION.names) - {"auto"}
    exact = {name.strip(): cells[2] for cells in table("backend", "needs", "exact") for name in cells[0].split(",")}
    for name in described - {"reference", "reference-fp8"}:
        assert exact[name].startswith("yes") == ATTENTION.backend(name).exact, name


def test_reasons_are_those_that_the_code_gives() -> None:
    for reason, _ in table("reason", "what to do"):
        parts = [re.escape(part.strip(" ()")) for part in reason.split("…") if part.strip(" ()")]
        pattern = re.compile(r"[\s\S]*".join(parts).replace(r"\ ", r"[ \0]+"))
        assert any(pattern.search(text) for text in _texts()), reason


def test_quoted_lines_are_those_that_a_run_says() -> None:
    from collections import Counter

    from wan_fp8.attention import Attention, AttentionReport
    from wan_fp8.attention.guard import Verdict

    verdicts = {block: Verdict(0.131 if block == 17 else 0.03, 0.08) for block in range(1, 39)}
    report = AttentionReport(Attention("fa3-fp8"), Counter({"fa3-fp8": 1332, "fa3": 268}), verdicts)
    assert not report.as_asked
    for line in report.lines():
        assert f"> `{line}`" in PAGE, line


def test_sparse_blocks_are_the_measured_ones() -> None:
    """``docs/sparse.md`` and the rows that it names."""
    page = (PACK / "docs" / "sparse.md").read_text(encoding="utf-8")
    blocks = {row["sparsity"]: row for row in rows("dit_i2v-a14b_1280x720_sparse_h200.json")}
    dense = blocks[None]["layer_ms"]
    assert f"| all | {dense:.1f} | |" in page
    for name, share in (("half", 0.5), ("45 %", 0.45), ("a quarter", 0.25)):
        took = blocks[share]["layer_ms"]
        assert blocks[share]["sparse_backend"] == "fa4"
        assert f"| {name} | {took:.1f} | {100 * took / dense:.0f} % |" in page
    costs = {row["part"]: row["ms"] for row in rows("sparse_h200.json") if row["what"] == "cost"}
    parts = ("selection, coverage", "measuring and learning", "order, there and back (once a forward)")
    choosing, measuring, order = (f"{costs[part]:.1f} ms" for part in parts)
    assert f"Choosing takes {choosing} an attention (`coverage`), measuring and learning {measuring}" in page
    assert f"the order of the tokens {order} a forward" in page
