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


def test_choice_on_hopper_is_the_measured_one() -> None:
    """Where FA3 is missing ``auto`` takes FA4, which is the faster of the two in one run."""
    dense = {row["attention"]: row["ms"] for row in rows("sparse_h200.json") if row["what"] == "dense"}
    assert f"`fa4` took {dense['fa4']:.1f} ms, `fa3` {dense['fa3']:.1f} and `cudnn` {dense['cudnn']:.1f}" in PAGE
    blocks = {name: row["layer_ms"] for name, file in (("fa4", "fa4_h200"), ("cudnn", "h200")) for row in rows(
        f"dit_i2v-a14b_1280x720_{file}.json"
    ) if row["attention"] == name}  # fmt: skip
    assert f"took {blocks['fa4']:.1f} ms with `fa4` and {blocks['cudnn']:.1f} with `cudnn`" in " ".join(PAGE.split())
    register_backends()
    by_speed = sorted(dense, key=dense.__getitem__)
    assert by_speed == sorted(dense, key=lambda name: -ATTENTION.backend(name).priority) == ["fa3", "fa4", "cudnn"]
    readme = (PACK / "README.md").read_text(encoding="utf-8")
    assert "| FlashAttention 3, else 4, whichever is installed, else cuDNN |" in readme


def test_figures_in_docstrings_are_those_of_the_scripts() -> None:
    from wan_fp8.attention.backends import flash3, flash4, sdpa

    measured = {row["attention"]: row for row in rows("kernels_h200.json") if "attention" in row and "ms" in row}
    for name, run in (("fa3", flash3.fa3), ("fa3-fp8", flash3.fa3_fp8), ("cudnn", sdpa.cudnn)):
        assert f"{measured[name]['tflop_per_s']} TFLOP/s on an H200" in (run.__doc__ or ""), name
    dense = {row["attention"]: row["ms"] for row in rows("sparse_h200.json") if row["what"] == "dense"}
    words = f"{dense['fa4']:.1f} ms against cuDNN's {dense['cudnn']:.1f} and FA3's {dense['fa3']:.1f}"
    assert words in " ".join((flash4.__doc__ or "").split())


def test_the_guard_on_gaussian_data_is_said_where_it_is_chosen() -> None:
    from wan_fp8.attention import Attention

    error = next(row["error"] for row in rows("kernels_h200.json") if row.get("attention") == "sage")
    assert error > (Attention().bound or 0)
    assert f"{error:.4f} is above the default *bound* of {Attention().bound}" in PAGE
    help_page = (PACK / "web" / "docs" / "WanFP8Attention.md").read_text(encoding="utf-8")
    for page in (help_page, (PACK / "nodes" / "settings.py").read_text(encoding="utf-8")):
        assert f"sage has {error:.3f} on Gaussian data of 75,600 tokens" in page


def test_what_the_guard_computes_again_is_said_alike_everywhere() -> None:
    from wan_fp8.attention.guard import sampled_share

    words = f"{sampled_share(75_600, 40):.2%}".replace("%", " %")
    assert words == "0.05 %"
    pages = (PAGE, *((PACK / path).read_text(encoding="utf-8") for path in (
        "web/docs/WanFP8Attention.md", "nodes/settings.py", "wan_fp8/attention/guard.py", "locales/zh/nodeDefs.json"
    )))  # fmt: skip
    for page in pages:
        assert words in page and "under 1 % of one step" not in page


def test_the_host_is_far_ahead_of_the_gpu_where_tokens_are_few() -> None:
    """What CUDA graphs could gain: nothing while the host queues a block in a fraction of its time."""
    page = " ".join(PAGE.split())
    for end, recipe, words in (
        (
            "h100",
            "none",
            "the host {} ms at 832x480 and {} ms in TI2V-5B, where the GPU computes for {} and {} ms",
        ),
        ("fp8_h200", "rowwise", "it is {} and {} ms of host against {} and {} "),
    ):
        names = (f"dit_i2v-a14b_832x480_{end}.json", f"dit_ti2v-5b_1280x704_{end}.json")
        small = [next(row for row in rows(name) if row["recipe"] == recipe) for name in names]
        figures = [f"{row[key]:.1f}" for key in ("host_ms_per_block", "layer_ms") for row in small]
        assert words.format(*figures) in page
        assert all(9 * row["host_ms_per_block"] < row["layer_ms"] for row in small)


def test_activations_at_the_peak_are_the_measured_ones() -> None:
    """``docs/memory.md``: beside the weights, in tensors [tokens, width] of bf16."""
    from wan_fp8.models.specs import SPECS

    page = " ".join((PACK / "docs" / "memory.md").read_text(encoding="utf-8").split())
    found: dict[tuple[str, ...], set[str]] = {}
    for path in sorted((PACK / "benchmarks" / "results").glob("dit_*_h?00.json")):
        for row in rows(path.name):
            if row.get("weights_gib") is None or row["world_size"] > 1:
                continue
            if row.get("lora_rank") or row["sparsity"] is not None or row.get("compile", "off") != "off":
                continue
            unit = row["tokens"] * SPECS[row["model"]].dim * 2 / 2**30
            held = (row["peak_gib"] - row["weights_gib"]) / unit
            key = (row["model"], row["size"], row["recipe"], row["backend"], row["attention"])
            found.setdefault(key, set()).add(f"{held:.1f}")
    large, engine = ("i2v-A14B", "1280x720"), "transformer_engine"
    assert found[*large, "none", "bfloat16", "fa3"] == {"6.2"} and "measures 6.2 in bf16" in page
    assert found[*large, "none", "bfloat16", "fa3-fp8"] == {"7.7"} and "FP8 attention makes that 7.7" in page
    casts = [found[*large, f"Float8{kind}Scaling", engine, "fa3"] for kind in ("Current", "Block")]
    assert max(map(max, casts)) == "9.1" and "up to 9.1" in page
    assert found[*large, "DelayedScaling", engine, "fa3"] == {"6.3"} and "its `DelayedScaling` 6.3" in page
    small = found["ti2v-5B", "1280x704", "none", "bfloat16", "fa3"]
    assert f"TI2V-5B measures {min(small)} to {max(small)} of its own" in page
    ratios = [SPECS[name].ffn_dim / SPECS[name].dim for name in ("ti2v-5B", "i2v-A14B")]
    assert f"{ratios[0]:.2f} times as wide as the model, A14B's {ratios[1]:.1f} times" in page


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
    full, half = (kernels[f"gated residual + LayerNorm + modulate, {s} stream"]["ms"] for s in ("float32", "bfloat16"))
    block = next(row for row in rows("dit_i2v-a14b_1280x720_compile_h200.json") if row["compile"] == "off")["layer_ms"]
    assert f"{3 * (full - half):.2f} ms of {block:.0f} in all" in PAGE


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
