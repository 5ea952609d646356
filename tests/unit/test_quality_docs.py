"""Figures of quality in ``docs/magcache.md``, ``docs/sparse.md`` and the README against the results that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((PACK / "benchmarks" / "results" / name).read_text())["rows"]
    return found


def test_step_caching() -> None:
    page = (PACK / "docs" / "magcache.md").read_text(encoding="utf-8")
    tables = [rows(f"cache_quality_{task}-tiny_cpu.json") for task in ("t2v", "i2v")]
    assert all(f"all {len(found)} settings there" in page for found in tables)
    for cache, threshold, skips in (
        ("MagCache", 0.06, 2), ("MagCache", 0.12, 2), ("MagCache", 0.24, 2), ("MagCache", 0.48, 4),
        ("EasyCache", 0.12, 2), ("EasyCache", 0.24, 2), ("EasyCache", 0.48, 2), ("Taylor", 0.12, 1),
    ):  # fmt: skip
        cells = []
        for found in tables:
            by_reuse = {
                row["reuse"]: row
                for row in found
                if (row["cache"], row["threshold"], row["max_skips"], row["phase"] or "in_phase")
                == (cache, threshold, skips, "in_phase")
            }
            keep, linear = by_reuse["keep"], by_reuse["linear"]
            passes = dict.fromkeys(f"{row['passes_computed']:.0f}" for row in (keep, linear))
            cells += [" or ".join(passes), f"{keep['psnr_db']:.1f}", f"{linear['psnr_db']:.1f}"]
        name = f"`{cache.lower()}` {threshold}, {skips}" if cache != "Taylor" else f"`taylor`, {skips}"
        line = f"| {name} | {' | '.join(cells)} |"
        assert line in page, line


def test_sparse_attention() -> None:
    page = (PACK / "docs" / "sparse.md").read_text(encoding="utf-8")
    found = {row["setting"]: row for row in rows("sparse_quality_t2v-tiny_cpu.json")}
    assert f"all {len(found)} rows there" in page
    names = {
        "safe": "preset `safe`", "balanced": "preset `balanced`", "fast": "preset `fast`",
        "coverage 0.97": "`coverage` 0.97", "coverage 0.9": "`coverage` 0.9", "density 0.7": "`density` 0.7",
        "chance 0.7": "70% by chance", "density 0.45": "`density` 0.45", "chance 0.45": "45% by chance",
        "density 0.25": "`density` 0.25", "chance 0.25": "25% by chance",
        "window 0.45": "`window` 0.45",
    }  # fmt: skip
    for name, shown in names.items():
        row, with_means = found[name], found.get(f"{name} + means")
        line = f"| {shown} | {row['sparsity']:.0%} | {row['dropped']:.1%} | {row['psnr_db']['mean']:.1f} dB | "
        if with_means is not None:
            line += f"{with_means['psnr_db']['mean']:.1f} dB"
        assert line.replace("%", " %") in page, line


def test_the_readme() -> None:
    page = (PACK / "README.md").read_text(encoding="utf-8")
    tables = [{row["setting"]: row for row in rows(f"quality_{task}-tiny_cpu.json")} for task in ("t2v", "i2v")]

    def cell(row: dict[str, Any]) -> str:
        score, made = row["psnr_db"], f", {row['passes_computed']:.0f} of {row['passes']} passes"
        shown = f"{score['mean']:.0f} ({score['worst']:.0f})"
        return shown + (made if row["passes_computed"] != row["passes"] else "")

    for text, setting in {
        "bf16": "none",
        "`rowwise`": "rowwise:reference",
        "`DelayedScaling`": "DelayedScaling:reference",
        "FP8 attention in its window": "reference-fp8",
        "MagCache `E012K2R20`": "E012K2R20",
        "`rowwise`, FP8 attention and MagCache": "rowwise:reference+reference-fp8+E012K2R20",
    }.items():
        line = f"| {text} | {' | '.join(cell(table[setting]) for table in tables)} |"
        assert line in page, line
    sparse = {row["sparsity"]: row["layer_ms"] for row in rows("dit_i2v-a14b_1280x720_sparse_h200.json")}
    assert f"from {sparse[None]:.0f} to {sparse[0.5]:.0f} ms on one H200" in page
