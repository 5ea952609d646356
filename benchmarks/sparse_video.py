"""Seconds of 40 steps with guidance from the times of a block: dense, with the window of a sparse preset, and with
MagCache beside it.

    python benchmarks/dit.py --attention fa3 --recipe rowwise --sparsity off,0.45 --json dit.json
    python benchmarks/sparse_video.py dit.json --json out.json

Nothing is run here: ``forward_s`` of a pass is what ``dit.py`` measured, with as many dense and sparse blocks as the
preset has, and a skipped pass costs what lies outside the blocks. Rows say so (``predicted``). The density is that of
the measured row: on random weights it is asked for, on a video the bound decides it.
"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import common
import typer
from dit import MODELS, STEPS, console
from rich.table import Table

from wan_fp8.attention.sparse import presets
from wan_fp8.caching import PRESETS, published_for, skipped_passes
from wan_fp8.sampling import DEFAULTS, high_noise_steps, timesteps


def seconds(dense: dict[str, Any], sparse: dict[str, Any] | None, preset: str, cache: str) -> tuple[float, int]:
    """Of all passes of a video, and how many of them are computed."""
    spec = MODELS[dense["model"]]
    setting = presets()[preset]
    inside = sum(setting.allows_block(block, spec.num_layers) for block in range(spec.num_layers))
    fixed = dense["fixed_ms"]
    whole = fixed + spec.num_layers * dense["layer_ms"]
    less = whole if sparse is None else whole - inside * (dense["layer_ms"] - sparse["layer_ms"])
    skipped = set() if cache == "none" else skipped_by(dense, cache)
    times = [
        fixed if 2 * step + kind in skipped else less if sparse and step in setting.steps(STEPS) else whole
        for step in range(STEPS)
        for kind in range(2)
    ]
    return sum(times) / 1000, len(times) - len(skipped)


def skipped_by(row: dict[str, Any], cache: str) -> set[int]:
    """Passes that a MagCache preset skips, as published."""
    spec = MODELS[row["model"]]
    threshold, max_skips, retention = PRESETS[cache]
    curve, defaults = published_for(spec), DEFAULTS[spec.task]
    if curve is None:
        raise typer.BadParameter(f"there is no published curve for {row['model']}")
    return set(
        skipped_passes(
            steps=STEPS,
            threshold=threshold,
            max_skips=max_skips,
            retention=retention,
            ratios=[ratio for pair in zip(curve.cond[1:], curve.uncond[1:], strict=True) for ratio in pair],
            mode=str(spec.task),
            high_noise_steps=high_noise_steps(timesteps(STEPS, defaults.shift, "unipc"), defaults.boundary),
        )
    )


def main(
    results: Annotated[str, typer.Argument(help="A results file of dit.py with rows of --sparsity off and a share.")],
    preset: Annotated[str, typer.Option(help="Whose window of steps and blocks is taken.")] = "balanced",
    caches: Annotated[str, typer.Option(help=f"none, or of {', '.join(PRESETS)}; with commas.")] = "none,E012K2R20",
    json: Annotated[str, typer.Option(help="Where to write the results file.")] = "",
) -> None:
    """Seconds of a video from measured blocks."""
    given = jsonlib.loads(Path(results).read_text(encoding="utf-8"))
    measured = given["rows"]
    dense = next((row for row in measured if row["sparsity"] is None), None)
    if dense is None:
        raise typer.BadParameter(f"{Path(results).name} has no dense row: measure with --sparsity off,0.45")
    same = ("model", "size", "frames", "recipe", "attention")
    rows = []
    for row in [None, *(r for r in measured if r["sparsity"] is not None and all(r[k] == dense[k] for k in same))]:
        for cache in caches.split(","):
            total, computed = seconds(dense, row, preset, cache)
            rows.append(
                {key: dense[key] for key in same}
                | {
                    "sparsity": None if row is None else row["sparsity"],
                    "window": None if row is None else preset,
                    "cache": cache,
                    "passes_computed": computed,
                    "seconds_40_steps": round(total, 1),
                    "predicted": True,
                    "measured_on": given["device"],
                }
            )
    table = Table(title=f"{dense['model']} {dense['size']} x {dense['frames']}, {dense['recipe']}, {given['device']}")
    for column in ("sparsity", "window", "cache", "passes_computed", "seconds_40_steps"):
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(str(row[c]) for c in ("sparsity", "window", "cache", "passes_computed", "seconds_40_steps")))
    console.print(table)
    if json:
        common.write_results(json, rows)


if __name__ == "__main__":
    typer.run(main)
