"""What the pack itself says about speed, drawn from ``benchmarks/results``: ``wan_fp8/measurements.json``.

    python benchmarks/summary.py            write it again, after new results came in

One entry for each GPU, model, size, recipe, backend and attention that ``benchmarks/dit.py`` measured on one GPU with
nothing else switched on. Standard library only; a test compares the file with the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "wan_fp8" / "measurements.json"
PLAIN = {
    "sparsity": (None,),
    "cache": (None,),
    "world_size": (None, 1),
    "lora_rank": (None, 0),
    "compile": (None, "off"),
    "stream": (None, "float32"),
    "fused_kernels": (None, "auto"),
}
"""Values that a row has to have, where it says anything of them."""
NEEDED = {"forward_s", "peak_gib", "weights_gib"}
"""What an entry is made of; rows of Animate and S2V tell of segments and have no such thing."""


def entries() -> list[dict[str, Any]]:
    """Sorted, one of each kind: of several the latest, of those of one day the one with most rows beside it."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    results = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("dit_*.json"))}
    for path, result in sorted(results.items(), key=lambda item: (item[1]["date"], len(item[1]["rows"]))):
        for row in result["rows"]:
            if not row.keys() >= NEEDED or any(row.get(name) not in allowed for name, allowed in PLAIN.items()):
                continue
            entry = {
                "device": result["device"],
                "model": row["model"],
                "size": row["size"],
                "frames": row["frames"],
                "recipe": row["recipe"],
                "backend": row["backend"],
                "attention": row["attention"],
                "layer_ms": row["layer_ms"],
                "forward_s": row["forward_s"],
                "working_gib": round(row["peak_gib"] - row["weights_gib"], 2),
                "date": result["date"],
                "file": path.name,
            }
            key = tuple(str(entry[name]) for name in list(entry)[:7])
            if key not in found or found[key]["date"] <= entry["date"]:
                found[key] = entry
    return [found[key] for key in sorted(found)]


def text() -> str:
    """The file, one entry a line."""
    return "[\n" + ",\n".join(" " + json.dumps(entry) for entry in entries()) + "\n]\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {len(entries())} entries")
