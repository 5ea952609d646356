"""Pages and plots of the documentation that are made of results: run it after new results came in.

    python benchmarks/pages.py

Writes ``docs/benchmarks.md``, the plots beside it (SVG, readable on light and dark pages) and the tables between
``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of ``choosing.md``, ``memory.md``, ``multi_gpu.md``, ``quality.md``
and ``sparse.md`` there. A test compares what is there with what this would write. The tables of memory need torch;
nothing else does.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
SHORT = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200"}
STEPS = {"i2v-A14B": 40, "ti2v-5B": 50}
"""Published ones; guidance makes two passes of each."""
COLOURS = {"this pack": "#2f9e68", "core ComfyUI": "#4c86c6", "diffusers": "#b58a2a"}


def load(name: str) -> dict[str, Any]:
    """A results file."""
    return dict(json.loads((RESULTS / name).read_text(encoding="utf-8")))


# ---- plots ---------------------------------------------------------------------------------------------------------


def bars(title: str, rows: list[tuple[str, float, str]], unit: str) -> str:
    """A horizontal bar chart; rows are (label, value, whose)."""
    left, width, step, top = 300, 420, 30, 64
    most = max(value for _, value, _ in rows)
    height = top + step * len(rows) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 {height}" width="840" height="{height}" role="img">',
        f"<title>{title}</title>",
        "<style>text{font:14px system-ui,sans-serif;fill:#1f2530}.t{font-weight:600;font-size:16px}",
        "@media(prefers-color-scheme:dark){text{fill:#e4e8ef}}</style>",
        f'<text class="t" x="16" y="28">{title}</text>',
    ]
    for index, (label, value, whose) in enumerate(rows):
        y = top + step * index
        length = max(2, round(width * value / most))
        parts.append(f'<text x="{left - 10}" y="{y + 15}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{length}" height="20" rx="3" fill="{COLOURS[whose]}"/>')
        parts.append(f'<text x="{left + length + 8}" y="{y + 15}">{value:.0f} {unit}</text>')
    x = 16
    for whose in dict.fromkeys(row[2] for row in rows):
        parts.append(f'<rect x="{x}" y="{height - 26}" width="14" height="14" rx="2" fill="{COLOURS[whose]}"/>')
        parts.append(f'<text x="{x + 20}" y="{height - 14}">{whose}</text>')
        x += 60 + 8 * len(whose)
    return "\n".join([*parts, "</svg>"]) + "\n"


def whose(peer: str) -> str:
    """The project that a row of ``peers`` belongs to."""
    if peer.startswith("ours"):
        return "this pack"
    return "diffusers" if peer.startswith("diffusers") else "core ComfyUI"


def plots() -> dict[str, str]:
    """SVG by file name."""
    made = {}
    for gpu in ("h100", "h200"):
        result = load(f"peers_{gpu}.json")
        rows = [(row["peer"], row["layer_ms"], whose(row["peer"])) for row in result["rows"]]
        title = f"One block of I2V-A14B, 1280x720, 81 frames, {SHORT[result['device']]}: less is better"
        made[f"peers_{gpu}.svg"] = bars(title, sorted(rows, key=lambda row: -row[1]), "ms")
    rows = [
        (f"{row['recipe']}, {row['backend']}", row["layer_ms"], "this pack")
        for row in load("dit_i2v-a14b_1280x720_h100.json")["rows"]
    ]
    made["recipes_h100.svg"] = bars(
        "FP8 recipes: one block of I2V-A14B at 1280x720, H100, FlashAttention 3", rows, "ms"
    )
    return made


# ---- tables --------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def transformer_rows() -> list[list[str]]:
    """Every row that ``benchmarks/summary.py`` keeps."""
    entries = json.loads((ROOT / "wan_fp8" / "measurements.json").read_text(encoding="utf-8"))
    return [
        [
            SHORT[entry["device"]],
            entry["model"],
            f"{entry['size']}, {entry['frames']} frames",
            entry["recipe"] + ("" if entry["recipe"] == "none" else f", {entry['backend']}"),
            entry["attention"],
            f"{entry['layer_ms']:.1f}",
            f"{entry['forward_s']:.2f}",
            f"{entry['working_gib']:.1f}",
            entry["file"],
        ]
        for entry in entries
    ]


def sparse_rows() -> list[list[str]]:
    """Blocks with block-sparse attention, and the dense one of the same run."""
    found = []
    for path in sorted(RESULTS.glob("dit_*_sparse_*.json")):
        result = load(path.name)
        for row in result["rows"]:
            kept = "all" if row["sparsity"] is None else f"{row['sparsity']:.0%}"
            who = row["attention"] if row["sparsity"] is None else row["sparse_backend"]
            times = [f"{row[name]:.1f}" for name in ("layer_ms", "floor_ms")]
            video = f"{row['model']}, {row['size']}, {row['frames']} frames"
            what = f"{row['recipe']}, {row['backend']}"
            found.append([SHORT[result["device"]], video, what, kept, who, *times, path.name])
    return found


def extended_rows() -> list[list[str]]:
    """Animate and S2V, whose segments have more than blocks."""
    found = []
    for path in sorted(RESULTS.glob("dit_animate-*.json")) + sorted(RESULTS.glob("dit_s2v-*.json")):
        result = load(path.name)
        for row in result["rows"]:
            if "layer_ms" not in row:
                continue  # core's class, which cannot be timed apart from what stands between its blocks
            blocks = f"{row['layer_ms']:.1f} ({row['floor_ratio']:.3f} of the floor)"
            segment = f"{row['segment_s']:.0f} ({row['forwards_a_segment']} passes)"
            found.append(
                [
                    SHORT[result["device"]],
                    f"{row['model']}, {row['size']}, {row['frames']} frames",
                    f"{row['recipe']}, {row['backend']}; {row['attention']}",
                    blocks,
                    f"{row['between_ms']:.1f} ({row['between']})",
                    f"{sum(row['encoders_ms'].values()):.0f}",
                    f"{row['forward_s']:.2f}",
                    segment,
                    path.name,
                ]
            )
    return found


def layouts_rows() -> list[list[str]]:
    """Layouts of two GPUs, each beside the single GPU of its own run."""
    result = load("dit_i2v-a14b_1280x720_2x_h200.json")
    found = []
    for row in result["rows"]:
        if row["world_size"] == 1:
            continue
        single = next(one for one in result["rows"] if one["world_size"] == 1 and one.get("run") == row.get("run"))
        alone = row["exchange_alone"].get("all_to_all_ms")
        found.append(
            [
                row["topology"]
                + (", no overlap" if row["overlap"] is False else "")
                + (f" (run {row['run']})" if "run" in row else ""),
                f"{row['layer_ms']:.1f}",
                f"{row['seconds_40_steps']:.0f} ({single['seconds_40_steps']:.0f})",
                f"{100 * row['efficiency']:.1f} %",
                "-" if alone is None else f"{alone:.1f}",
            ]
        )
    return found


def two_gpus() -> str:
    """What two GPUs were measured to do: layouts of the transformer, the pool around it, the VAE."""
    head = [
        "layout",
        "ms a block",
        "40 steps, s (one GPU)",
        "efficiency",
        "all-to-all alone, ms a block",
    ]
    result = load("dit_i2v-a14b_1280x720_2x_h200.json")
    gpu = f"two {SHORT[result['device']]}"
    pool, parts = load("pool_2x_h200.json"), load("pool_parts_2x_h200.json")
    first = pool["rows"][0]
    messages = sorted(row["messages_s"] for row in pool["rows"])
    spread = [row["speedup"] for row in pool["rows"]]
    loads = [row["load_s"] for row in pool["rows"]]
    named = [
        f"{row['part'].removeprefix('vae ')} {row['what']} {row['seconds']:.2f} s in place of {row['one_gpu_s']:.2f}"
        for row in parts["rows"]
        if row["dtype"] == "bfloat16"
    ]
    part = parts["rows"][0]
    faults = (RESULTS / "pool_faults_2x_h200.txt").read_text(encoding="utf-8")
    killed = [float(seconds) for seconds in re.findall(r"^ok   SIGKILL of rank \d: named after (\S+) s$", faults, re.M)]
    whole = [row["error"] for row in pool["rows"] if not row["topology"].startswith("cfg 2")]
    left = ("ok   no process is left" in faults) and ("GPU memory left behind: [0, 0] MiB" in faults)
    assert max(whole) == 0 and left, "the sentences below say so"
    return (
        f"I2V-A14B, 1280x720, 81 frames, `DelayedScaling`, FlashAttention 3, on {gpu} (torchrun, {result['date']}, "
        f"`benchmarks/results/dit_i2v-a14b_1280x720_2x_h200.json`):\n\n{table(head, layouts_rows())}\n"
        "The runs are two on one day, on two machines; in the second, heads change ranks in one Triton pass each "
        "way.\n\n"
        f"The pool itself ({first['layers']} blocks at {first['size']}, {first['frames']} frames, both conditionings, "
        f"`benchmarks/results/pool_2x_h200.json`): ready in {first['pool_start_s']:.1f} s, first weights in "
        f"{loads[0]:.1f} s, later ones in {min(loads[1:]):.1f} to {max(loads[1:]):.1f} s; messages of a forward "
        f"{1000 * messages[0]:.0f} to {1000 * messages[-1]:.0f} ms (median {1000 * messages[len(messages) // 2]:.1f}); "
        f"{min(spread):.2f} to {max(spread):.2f} times one GPU's speed, where messages weigh "
        f"{40 // first['layers']} times what they do with 40 blocks. Errors against one GPU are at most "
        f"{max(row['error'] for row in pool['rows']):.3f}, and 0 where guidance is not split. A killed worker was "
        f"named after {max(killed):.1f} s, no process and no GPU memory was left "
        f"(`benchmarks/results/pool_faults_2x_h200.txt`).\n\n"
        f"VAE in bf16, {part['size']}, {part['frames']} frames (`benchmarks/results/pool_parts_2x_h200.json`): "
        f"{'; '.join(named)}.\n"
    )


def sparse_kernel_rows() -> list[list[str]]:
    """The kernels by themselves against the share of blocks that they keep."""
    result = load("sparse_h200.json")
    found: dict[str, dict[float, str]] = {}
    for row in result["rows"]:
        if row["what"] == "sparse":
            found.setdefault(row["attention"], {})[row["sparsity"]] = f"{row['ms']:.1f}"
    verdicts = {row["attention"]: row for row in result["rows"] if row["what"] == "linear"}
    shares = sorted({share for times in found.values() for share in times}, reverse=True)
    return [
        ["blocks kept", *(f"{100 * share:.0f} %" for share in shares), "worst off a line, from 20 %"],
        *(
            [name, *(times[share] for share in shares), f"{100 * verdicts[name]['worst_off_line']:+.1f} %"]
            for name, times in found.items()
        ),
    ]


def sparse_kernels() -> str:
    """The same as a table of milliseconds, and what dense attention takes beside it."""
    dense = [row for row in load("sparse_h200.json")["rows"] if row["what"] == "dense"]
    head, *rows = sparse_kernel_rows()
    beside = ", ".join(f"{row['attention']} {row['ms']:.1f}" for row in dense)
    return table(head, rows) + f"\nDense in the same run: {beside} ms.\n"


def sparse_cost_rows() -> list[list[str]]:
    """What choosing and measuring take by themselves."""
    return [
        [SHORT[load(path.name)["device"]], row["part"], f"{row['ms']:.2f}", path.name]
        for path in sorted(RESULTS.glob("sparse_h*.json"))
        for row in load(path.name)["rows"]
        if row["what"] == "cost"
    ]


def minutes(entry: dict[str, Any]) -> str:
    """Of a published run with guidance, the transformer alone."""
    return f"{2 * STEPS[entry['model']] * entry['forward_s'] / 60:.1f} min"


def choosing() -> str:
    """GPU and goal: what was measured."""
    entries = json.loads((ROOT / "wan_fp8" / "measurements.json").read_text(encoding="utf-8"))
    goals = {
        ("none", "cudnn"): ("the exact video, nothing to install", "lossless"),
        ("none", "fa3"): ("the exact video", "lossless"),
        ("rowwise", "fa3"): ("half the memory, and faster", "balanced"),
        ("none", "fa3-fp8"): ("faster, 16-bit weights", "Wan2.2 Attention: fa3-fp8"),
        ("rowwise", "fa3-fp8"): ("the fastest that was measured", "fast, without its cache"),
    }
    rows = []
    for entry in entries:
        key = (entry["recipe"], entry["attention"])
        if key not in goals or entry["backend"] == "transformer_engine":
            continue
        goal, preset = goals[key]
        attention = {"fa3": "FlashAttention 3", "cudnn": "cuDNN", "fa3-fp8": "FlashAttention 3 in FP8"}[key[1]]
        what = f"{entry['model']}, {entry['size']}"
        rows.append([SHORT[entry["device"]], what, goal, preset, f"{entry['recipe']}, {attention}", minutes(entry)])
    made = table(["GPU", "video", "goal", "preset", "which is", "measured"], rows)
    sage = next(row for row in load("kernels_h200.json")["rows"] if row.get("attention") == "sage")
    return made + (
        f"\n`sage`, which *fast* takes on Ampere and Ada, has an error of {sage['error']:.3f} on Gaussian q, k and v "
        f"of {sage['tokens']:,} tokens (`benchmarks/results/kernels_h200.json`):\nabove the default bound, so that the "
        "guard refuses it on such data, and it has cost its first look only. Your own q and k decide.\n"
    )


def memory() -> str:
    """What fits which card, computed."""
    sys.path.insert(0, str(ROOT))
    import torch

    from wan_fp8.models.memory import forward_needs, weight_bytes
    from wan_fp8.models.specs import SPECS

    gib, rows = 2**30, []
    cases = (
        ("i2v-A14B", "832x480, 81 frames", (1, 16, 21, 60, 104)),
        ("i2v-A14B", "1280x720, 81 frames", (1, 16, 21, 90, 160)),
        ("ti2v-5B", "1280x704, 121 frames", (1, 48, 31, 44, 80)),
    )
    for model, video, shape in cases:
        for storage, width in (("bf16", 2), ("FP8", 1)):
            weights = weight_bytes(SPECS[model], width) / gib
            working = forward_needs(SPECS[model], shape, torch.bfloat16).total / gib
            cells = []
            for card in (12, 16, 24, 48, 80):
                room = 0.92 * card
                if weights + working <= room:
                    cells.append("fits")
                elif working <= room:
                    cells.append(f"{(room - working) / weights:.0%} resident")
                else:
                    cells.append("no")
            rows.append([model, video, storage, f"{weights:.1f}", f"{working:.1f}", *cells])
    head = ["model", "video", "weights in", "weights GiB", "working GiB", *(f"{n} GB" for n in (12, 16, 24, 48, 80))]
    return table(head, rows)


# ---- pages ---------------------------------------------------------------------------------------------------------


def benchmarks_page() -> str:
    """``docs/benchmarks.md``."""
    peers = []
    for gpu in ("h100", "h200"):
        result = load(f"peers_{gpu}.json")
        for row in result["rows"]:
            peers.append(
                [SHORT[result["device"]], row["peer"], row["recipe"], row["attention"], f"{row['layer_ms']:.1f}"]
            )
    dates = sorted({load(path.name)["date"] for path in RESULTS.glob("*.json")})
    beside = table(["GPU", "who", "recipe", "attention", "ms a block"], peers)
    head = ["GPU", "model", "video", "recipe", "attention", "ms a block", "s a pass", "working GiB", "file"]
    sparse_head = ["GPU", "video", "recipe", "blocks kept", "attention", "ms a block", "floor, ms", "file"]
    extended_head = ["GPU", "video", "settings", "ms a block", "ms between blocks, each"]
    extended_head += ["encoders, ms", "s a pass", "s a segment", "file"]
    return f"""# Benchmarks

Made by `benchmarks/pages.py` from `benchmarks/results/`, where every file says on what hardware, with which versions,
when and by which command it was measured ({dates[0]} to {dates[-1]}). Weights are random: time does not depend on
their values. Times are of the transformer, not of a whole graph.

## Beside other software

One block of I2V-A14B at 1280x720, 81 frames, every program in one process run after the other (`benchmarks/peers.py`).

![H100](images/peers_h100.svg)

![H200](images/peers_h200.svg)

{beside}
## The transformer

`benchmarks/dit.py`: a block by difference of two layer counts, a pass of all blocks, and the memory beside the weights.

![recipes](images/recipes_h100.svg)

{table(head, transformer_rows())}
## Animate and S2V

Blocks without what stands between them, that by itself, and a segment of the published steps and guidance without
its VAE (`benchmarks/dit.py --model animate-14B`, `s2v-14B`).

{table(extended_head, extended_rows())}
## Several GPUs

{two_gpus()}
[Scaling](scaling.md) has all-to-all and gathers apart, and what more GPUs are predicted to take.

## Block-sparse attention

The same with a share of the key blocks kept in every block of the transformer, choosing and measuring included
(`benchmarks/dit.py --sparsity`), and what the parts beside the kernel take by themselves (`benchmarks/sparse.py`).

{table(sparse_head, sparse_rows())}
{table(["GPU", "part", "ms", "file"], sparse_cost_rows())}
The kernels alone, 75,600 tokens, 40 heads of 128, in ms by the share of blocks that they keep (`sparse_h200.json`):

{sparse_kernels()}
Errors of the recipes are in [FP8](fp8.md), of attention in [attention and precision](attention.md), of LoRAs in
[LoRA](lora.md). How long files take to load is in `benchmarks/results/load.json`, how long ComfyUI's start becomes in
`benchmarks/results/import_time.json`.

## What has not been measured

Other GPUs than those above, and more than two of them; what a setting does to a video of the released models. What a
results file is missing for says so where the feature is described.
"""


def quality(task: str) -> str:
    """What each setting does to the shipped checkpoint's videos: mean, and worst in brackets."""
    result = load(f"quality_{task}-tiny_cpu.json")

    def both(row: dict[str, Any], score: str, digits: int) -> str:
        return f"{row[score]['mean']:.{digits}f} ({row[score]['worst']:.{digits}f})"

    rows = [
        [
            f"`{row['setting']}`",
            both(row, "psnr_db", 1),
            both(row, "ssim", 3),
            both(row, "latent_psnr_db", 1),
            both(row, "worst_step_error", 2),
            f"{row['passes_computed']:.0f} of {row['passes']}",
        ]
        for row in result["rows"]
    ]
    head = ["setting", "PSNR, dB", "SSIM", "of latents, dB", "largest error of a step", "passes computed"]
    first = result["rows"][0]
    facts = (
        f"{first['model']}, {first['size']}, {first['frames']} frames, {first['steps']} steps with guidance, "
        f"{len(first['videos'])} seeds, against {first['reference']}; mean and, in brackets, worst. On a CPU with "
        f"PyTorch {result['versions']['torch']}, {result['date']}:\n\n```\n{result['command']}\n```\n\n"
    )
    return facts + table(head, rows)


def filled(page: str, blocks: dict[str, str]) -> str:
    """A page with the text between its marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        page, count = pattern.subn(lambda found, block=block: found[1] + block + found[2], page)
        if count != 1:
            raise ValueError(f"{count} places for {name}")
    return page


def pages() -> dict[Path, str]:
    """Every file that this script writes, with its content."""
    made = {DOCS / "images" / name: text for name, text in plots().items()}
    made[DOCS / "benchmarks.md"] = benchmarks_page()
    for page, blocks in (
        ("choosing", {"choosing": choosing}),
        ("memory", {"memory": memory}),
        ("multi_gpu", {"multi_gpu": two_gpus}),
        ("quality", {"quality": lambda: quality("t2v"), "quality_i2v": lambda: quality("i2v")}),
        ("sparse", {"sparse": sparse_kernels}),
    ):
        path = DOCS / f"{page}.md"
        made[path] = filled(path.read_text(encoding="utf-8"), {name: block() for name, block in blocks.items()})
    return made


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
