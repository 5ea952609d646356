"""The figures of docs/lora.md against the results file."""

from __future__ import annotations

import json
import re
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
PAGE = (PACK / "docs" / "lora.md").read_text(encoding="utf-8")
ROWS = json.loads((PACK / "benchmarks" / "results" / "lora.json").read_text())["rows"]
RANK = 64


def table(*columns: str) -> list[list[str]]:
    """The cells of the table with these headings."""
    head = re.escape("| " + " | ".join(columns) + " |")
    body = re.search(head + r"\n\|[-| ]+\|\n((?:\|.*\|\n)+)", PAGE)
    assert body is not None, columns
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in body[1].splitlines()]


def test_errors_are_those_of_the_script() -> None:
    linear = [row for row in ROWS if row["kind"] == "linear" and row["rank"] == RANK]
    keys = ("merged_from_source", "merged_from_fp8", "live")
    shown = table("scales", "merged, from the original", "merged, from FP8", "live")
    assert shown == [[row["scales"], *(f"{row[key]:.4f}" for key in keys)] for row in linear]
    keys = ("branch_fp8_input", "branch_fp8_input_and_a", "branch_bf16_input")
    shown = table("scales", "input in FP8, A in bf16", "both in FP8", "both in bf16")
    assert shown == [[row["scales"], *(f"{row[key]:.4f}" for key in keys)] for row in linear]
    latents = [row for row in ROWS if row["kind"] == "latents"]
    shown = table("recipe", "merged", "live")
    assert shown == [[row["recipe"], f"{row['merged']:.4f}", f"{row['live']:.4f}"] for row in latents]
    (steps,), (layers,) = {row["steps"] for row in latents}, {row["layers"] for row in latents}
    assert f"{layers} blocks, {steps} steps" in PAGE and {row["rank"] for row in latents} == {RANK}


def test_bytes_are_those_of_the_shapes() -> None:
    """Eight linears a step at 75,600 tokens, I2V-A14B; A and B of ten linears in 40 blocks."""
    tokens, dim, ffn = 75_600, 5120, 13_824
    first = tokens * (7 * dim + ffn)
    second = 4 * tokens * (7 * dim + ffn)
    assert f"{first / 1e9:.1f} GB" in PAGE and f"{second / 1e9:.1f} GB" in PAGE
    matrices = 40 * 2 * RANK * (8 * 2 * dim + 2 * (dim + ffn))
    assert f"{matrices / 1e9:.1f} GB for rank {RANK}" in PAGE


def test_time_is_that_of_the_benchmark() -> None:
    results = json.loads((PACK / "benchmarks" / "results" / "dit_i2v-a14b_1280x720_lora_h100.json").read_text())
    without, with_it = sorted(results["rows"], key=lambda row: row["lora_rank"])
    assert (without["lora_rank"], with_it["lora_rank"]) == (0, RANK)
    kernels = (with_it["kernels"]["add_kernel"] + with_it["kernels"]["project_kernel"]) / 2  # of two blocks
    assert f"{kernels:.1f} ms of a block, {100 * kernels / without['layer_ms']:.1f} % of the" in PAGE
    assert f"{without['layer_ms']:.1f} ms" in PAGE and f"{with_it['layer_ms'] - without['layer_ms']:.1f} ms" in PAGE
