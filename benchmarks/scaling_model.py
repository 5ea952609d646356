"""Time of a step against the number of GPUs: a small model fitted to result files, its figure and its table.

    python benchmarks/scaling_model.py benchmarks/results/dit_i2v-a14b_1280x720_2x_h200.json [more.json ...] \\
        --single benchmarks/results/dit_i2v-a14b_1280x720_h100.json \\
        --single benchmarks/results/dit_i2v-a14b_1280x720_fp8-attention_h100.json \\
        [--headline benchmarks/results/headline_2x_h200.json ...]

writes docs/images/scaling.svg and the tables of docs/scaling.md. A block takes

    layer_ms = work / ranks of a sequence + overhead + heads * GB + keys * GB + weights * GB

where GB is what a rank sends (``wan_fp8/parallel/plan.py`` counts it), a forward ``blocks * layer_ms + fixed + stream
* GB``, and a step two forwards, or one with cfg 2. The coefficients are the least squares of all rows of one setting
(``benchmarks/dit.py`` under torchrun), none below zero; ``overhead`` is what does not shrink with the tokens: launches,
tails of kernels. A block timed without its exchanges (``layer_ms_without_exchange``) is a row of the fit as well, which
is what tells overhead from exchange where only two sizes were measured. Rows of several runs (``run``) are brought to
one clock by the single GPU that each run measured.

Over NVLink exchanges hide behind compute as much as measured; ``nothing hidden`` is the time if every one of them took
as long as the all-to-all did by itself. What leaves a host takes at least that, none of it hidden, at the network's
rate times the share of its own rate that the measured link reached. A kind of exchange that no row has is never hidden.
The layout of each number of GPUs is the fastest by this model. A size without a measured row is a prediction, and is
drawn as one. Rows with keys passed around (``merge``) or without overlap are left out of the fit.

``--single`` are files of one GPU, of any kind: what four of that kind would take with the overhead and the exchange of
the fit, beside the goals for them. The work is then what the file measured, less the overhead.
"""

from __future__ import annotations

import itertools
import json as json_module
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import common
import ranks
import torch
import typer
from dit import MODELS

from wan_fp8.models.specs import ModelSpec
from wan_fp8.parallel import ParallelDims

SIZES = (1, 2, 4, 8, 16, 32, 64)
HOST = 8
"""GPUs that NVLink joins."""
GB = 1e9
PARTS = ("work", "overhead", "heads", "keys", "weights")
COLORS = {"work": "#4c78a8", "overhead": "#bab0ac", "exchange": "#f58518", "network": "#e45756", "fixed": "#72b7b2"}
DOCS = common.ROOT / "docs"
BEGIN, END = "<!-- written by benchmarks/scaling_model.py -->", "<!-- to here -->"


def padded(tokens: int, dims: ParallelDims) -> int:
    """Tokens of one rank."""
    return -(-tokens // dims.sequence)


def features(spec: ModelSpec, tokens: int, dims: ParallelDims, fp8: bool) -> dict[str, float]:
    """What a block costs a coefficient each: shares of work, and GB that a rank sends for one sample."""
    share, width = padded(tokens, dims), spec.dim * 2
    parameters = 8 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim
    return {
        "work": 1 / dims.sequence,
        "overhead": 1.0,
        "heads": 4 * share * width * (dims.ulysses - 1) / dims.ulysses / GB,
        "keys": 2 * share * width * (dims.ring - 1) / GB,
        "weights": parameters * (1 if fp8 else 2) * (dims.shard - 1) / dims.shard / GB,
    }


def stream_gb(spec: ModelSpec, tokens: int, dims: ParallelDims) -> float:
    """GB of the residual stream that a rank sends in a forward."""
    return padded(tokens, dims) * spec.dim * 4 * (dims.sequence - 1) / GB


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float], *, relative: bool = True) -> list[float]:
    """The coefficients, none below zero, whose relative (or absolute) errors are least; 0 for one that no row has."""
    matrix, target = torch.tensor(rows, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    if relative:
        matrix, target = matrix / target[:, None], torch.ones_like(target)
    usable = [column for column in range(matrix.shape[1]) if matrix[:, column].any()]
    best, least = [0.0] * matrix.shape[1], float("inf")
    for count in range(1, len(usable) + 1):
        for chosen in itertools.combinations(usable, count):
            part = matrix[:, list(chosen)]
            if torch.linalg.matrix_rank(part) < count:
                continue
            found = torch.linalg.lstsq(part, target[:, None]).solution[:, 0]
            error = float((part @ found - target).square().sum())
            if (found >= 0).all() and error < least - 1e-12:
                least = error
                best = [0.0] * matrix.shape[1]
                for column, value in zip(chosen, found.tolist(), strict=True):
                    best[column] = value
    return best


@dataclass(frozen=True)
class Model:
    """Coefficients of one setting: ms, and ms a GB."""

    name: str
    spec: ModelSpec
    tokens: int
    fp8: bool
    block: dict[str, float]
    fixed: float
    stream: float
    link_gbs: float
    """That the all-to-all reached by itself."""
    worst: float
    """Largest relative error of a fitted row."""
    measured: dict[int, float]
    """Seconds a step by number of GPUs: the best measured row with replicated weights."""
    unknown: tuple[str, ...] = ()
    """Exchanges of a block that no row has: as slow as the all-to-all by itself."""

    @property
    def alone(self) -> float:
        """ms a GB of an exchange with nothing beside it; 0 where none was measured so."""
        return 1000 / self.link_gbs if self.link_gbs else 0.0

    def step(self, dims: ParallelDims, host: int, slower: float, *, hidden: bool = True) -> dict[str, float]:
        """Seconds of one step (both conditionings) by what they are spent on.

        Args:
            host: GPUs that NVLink joins; ranks beyond it are reached over the network.
            slower: how many times longer a byte takes there.
            hidden: exchanges over NVLink hide behind compute as much as measured; else they take what they do alone.
        """
        share = features(self.spec, self.tokens, dims, self.fp8)
        group = ranks_of(dims)
        parts = dict.fromkeys(("work", "overhead", "exchange", "network", "fixed"), 0.0)
        blocks = self.spec.num_layers
        for name in PARTS:
            ms, sent = blocks * self.block[name] * share[name], blocks * share[name]
            if name in ("work", "overhead"):
                parts[name] += ms
                continue
            outside, open_ms = outside_share(group[name], host), max(ms, self.alone * sent)
            parts["exchange"] += (ms if hidden else open_ms) * (1 - outside)
            parts["network"] += open_ms * outside * slower
        parts["fixed"] += self.fixed
        outside, gathered = outside_share(group["stream"], host), self.stream * stream_gb(self.spec, self.tokens, dims)
        parts["exchange"] += gathered * (1 - outside)
        parts["network"] += gathered * outside * slower
        return {name: (2 // dims.cfg) * ms / 1000 for name, ms in parts.items()}

    def best(self, gpus: int, host: int, slower: float) -> tuple[ParallelDims, dict[str, float]]:
        """The fastest layout with replicated weights."""
        found = [(dims, self.step(dims, host, slower)) for dims in layouts(gpus, self.spec.num_heads)]
        return min(found, key=lambda pair: sum(pair[1].values()))


def ranks_of(dims: ParallelDims) -> dict[str, list[int]]:
    """The ranks that rank 0 sends to, itself included, by what is sent."""
    return {
        "heads": list(range(dims.ulysses)),
        "keys": list(range(0, dims.sequence, dims.ulysses)),
        "stream": list(range(dims.sequence)),
        "weights": list(range(dims.shard)),
    }


def outside_share(group: Sequence[int], host: int) -> float:
    """What share of the bytes for the others of a group leaves the host of rank 0."""
    others = [rank for rank in group if rank]
    return sum(rank >= host for rank in others) / len(others) if others else 0.0


def layouts(gpus: int, heads: int) -> list[ParallelDims]:
    """All of them, weights replicated."""
    found = []
    for cfg in (1, 2) if gpus % 2 == 0 else (1,):
        each = gpus // cfg
        for ulysses in range(1, each + 1):
            if each % ulysses == 0 and heads % ulysses == 0:
                found.append(ParallelDims(cfg=cfg, ulysses=ulysses, ring=each // ulysses))
    return found


def fit(rows: Sequence[dict]) -> Model:
    """The model of rows of ``benchmarks/dit.py`` that differ in nothing but the number of GPUs and the layout.

    Raises:
        ValueError: rows that say too little.
    """
    first = rows[0]
    spec, tokens, fp8 = MODELS[first["model"]], first["tokens"], first["recipe"] != "none"
    layouts_of = [ranks.topology(row["topology"] or "one") for row in rows]
    if max(dims.sequence for dims in layouts_of) == 1 or min(dims.world for dims in layouts_of) > 1:
        raise ValueError(
            f"{label(first)}: a fit needs a row of one GPU and one whose ranks share a sequence; the files have "
            f"{', '.join(str(row['topology']) for row in rows)}"
        )
    shares = [features(spec, tokens, dims, fp8) for dims in layouts_of]
    speed = clocks(rows)
    times = [row["layer_ms"] * speed[row.get("run")] for row in rows]
    for row, dims, share in list(zip(rows, layouts_of, shares, strict=True)):
        free_ms = row.get("layer_ms_without_exchange")
        if free_ms is not None and dims.sequence > 1 and dims.shard == 1:  # weights are gathered all the same
            shares.append(share | {"heads": 0.0, "keys": 0.0})
            times.append(free_ms * speed[row.get("run")])
    found = least_squares([[share[name] for name in PARTS] for share in shares], times)
    block = dict(zip(PARTS, found, strict=True))
    streams = [[1.0, stream_gb(spec, tokens, dims)] for dims in layouts_of]
    # a difference of large times: its noise is as many ms however small it is itself
    fixed, stream = least_squares(streams, [row["fixed_ms"] for row in rows], relative=False)
    rates = [row["exchange_alone"].get("all_to_all_gbs") for row in rows if row.get("exchange_alone")]
    link_gbs = max((rate for rate in rates if rate), default=0.0)
    unknown = tuple(name for name in ("heads", "keys", "weights") if link_gbs and not any(s[name] for s in shares))
    block |= {name: 1000 / link_gbs for name in unknown}
    measured: dict[int, float] = {}
    for row, dims in zip(rows, layouts_of, strict=True):
        if dims.shard == 1:
            seconds = row["seconds_40_steps"] / 40
            measured[dims.world] = min(seconds, measured.get(dims.world, seconds))
    modelled = [sum(block[name] * share[name] for name in PARTS) for share in shares]
    worst = max(abs(ours / theirs - 1) for ours, theirs in zip(modelled, times, strict=True))
    return Model(
        name=label(first),
        spec=spec,
        tokens=tokens,
        fp8=fp8,
        block=block,
        fixed=fixed,
        stream=stream,
        link_gbs=link_gbs,
        unknown=unknown,
        worst=worst,
        measured=measured,
    )


def clocks(rows: Sequence[dict]) -> dict[int | None, float]:
    """By run: what its times are multiplied by so that its single GPU takes the mean of all runs' single GPUs. A run
    without one keeps its times."""
    single: dict[int | None, list[float]] = {row.get("run"): [] for row in rows}
    for row in rows:
        if ranks.topology(row["topology"] or "one").world == 1:
            single[row.get("run")].append(row["layer_ms"])
    means = {run: sum(found) / len(found) for run, found in single.items() if found}
    common_ms = sum(means.values()) / len(means)
    return {run: common_ms / means[run] if run in means else 1.0 for run in single}


def label(row: dict) -> str:
    """What rows of one fit share."""
    return f"{row['model']} {row['size']}x{row['frames']}, {row['recipe']}, {row['attention']}"


# ---- what is written -------------------------------------------------------------------------------------------------


def measured_table(rows: Sequence[dict]) -> list[str]:
    """Markdown: every row as it was measured, its efficiency against the single GPU of its own run, and collectives of
    40 steps by themselves, as long as they would take if nothing ran beside them."""
    lines = [
        f"**{label(rows[0])}**, measured",
        "",
        "| GPUs | layout | run | ms a block | 40 steps, s | efficiency | weights GiB a GPU | all-to-all alone, s | "
        "gathers alone, s | exchange adds, ms a block |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        dims, alone = ranks.topology(row["topology"] or "one"), row.get("exchange_alone") or {}
        forwards, blocks = 40 * (2 // dims.cfg), MODELS[row["model"]].num_layers
        heads = forwards * blocks * alone.get("all_to_all_ms", 0.0) / 1000
        gathers = sum(alone.get(name, 0.0) for name in ("weights_gather_fp8_ms", "keys_gather_ms"))
        gathered = forwards * (blocks * gathers + alone.get("stream_gather_per_forward_ms", 0.0)) / 1000
        name = (row["topology"] or "one") + ("" if row.get("overlap") is not False else ", no overlap")
        adds = row.get("exchange_ms") if dims.sequence > 1 and dims.shard == 1 else None
        cells = [
            str(dims.world),
            name,
            str(row.get("run", "-")),
            f"{row['layer_ms']:.1f}",
            f"{row['seconds_40_steps']:.1f}",
            f"{row['efficiency']:.1%}".replace("%", " %") if "efficiency" in row else "-",
            f"{row['weights_gib']:.2f}" if "weights_gib" in row else "-",
            f"{heads:.1f}" if heads else "-",
            f"{gathered:.1f}" if gathered else "-",
            "-" if adds is None else f"{adds:+.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


GOALS = {"fa3": 176, "fa3-fp8": 142}
"""Seconds of 40 steps with guidance on four H100 by attention, FP8 linears: what the multi-GPU pool is to reach."""
WINDOW = (40 - 4) / 40 * (40 - 2) / 40
"""Share of attentions that are in FP8 where the first and last two steps and the first and last block stay exact."""


def with_block(model: Model, layer_ms: float, name: str) -> Model:
    """The same overhead, exchange and fixed time around another GPU's or setting's work, as one GPU measured it."""
    return replace(model, name=name, block={**model.block, "work": layer_ms - model.block["overhead"]}, measured={})


def goals_table(model: Model, files: Sequence[dict], host: int, slower: float) -> list[str]:
    """Markdown: single GPUs that were measured, and four of them by the model, beside the goal."""
    singles: list[tuple[str, str, float, float | None]] = []
    exact: dict[tuple[str, str], float] = {}
    for file in files:
        gpu = file["device"].removeprefix("NVIDIA ").split()[0]
        for row in file["rows"]:
            if row["recipe"] == "none" or row["backend"] != "torch" or row["world_size"] not in (None, 1):
                continue
            layer_ms, goal, what = row["layer_ms"], GOALS.get(row["attention"]), f"{row['recipe']}, {row['attention']}"
            if row["attention"] == "fa3":
                exact[gpu, row["recipe"]] = layer_ms
            else:  # files are given in an order in which the exact row comes first
                layer_ms = WINDOW * layer_ms + (1 - WINDOW) * exact[gpu, row["recipe"]]
                what += " in its window"
            singles.append((gpu, what, layer_ms, goal if gpu == "H100" else None))
    lines = [
        "| GPU | setting | one, ms a block | one, 40 steps, s | two, s | four, s | 1 to 4 | "
        "nothing hidden, s | goal for four, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for gpu, what, layer_ms, goal in singles:
        moved = with_block(model, layer_ms, what)
        one, two, four = (40 * sum(moved.best(gpus, host, slower)[1].values()) for gpus in (1, 2, 4))
        open_s = 40 * sum(moved.step(moved.best(4, host, slower)[0], host, slower, hidden=False).values())
        lines.append(
            f"| {gpu} | {what} | {layer_ms:.1f} | {one:.0f} | {two:.0f} | {four:.0f} | {100 * one / 4 / four:.1f} % | "
            f"{open_s:.0f} | {'-' if goal is None else goal} |"
        )
    return lines


def limit(parts: dict[str, float]) -> str:
    """What costs most beside the work."""
    name, seconds = max(((name, value) for name, value in parts.items() if name != "work"), key=lambda pair: pair[1])
    return f"{name}, {100 * seconds / sum(parts.values()):.1f} %"


def table(model: Model, host: int, slower: float, title: str) -> list[str]:
    """Markdown: one line a size, and what its time is spent on."""
    lines = [
        f"**{model.name}**, {title}",
        "",
        "| GPUs | layout | s a step | measured | efficiency | work | overhead | exchange | network | fixed | "
        "limited by | nothing hidden, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    alone = sum(model.best(1, host, slower)[1].values())
    for gpus in SIZES:
        dims, parts = model.best(gpus, host, slower)
        total = sum(parts.values())
        measured = f"{model.measured[gpus]:.2f}" if gpus in model.measured else "-"
        shares = " | ".join(f"{100 * seconds / total:.1f} %" for seconds in parts.values())
        name = ranks.name_of(dims) or "one"
        lines.append(
            f"| {gpus} | {name} | {total:.2f} | {measured} | {100 * alone / gpus / total:.1f} % | {shares} | "
            f"{limit(parts)} | {sum(model.step(dims, host, slower, hidden=False).values()):.2f} |"
        )
    return lines


def figure(model: Model, host: int, slower: float) -> str:
    """SVG: bars of a step's seconds times the number of GPUs, stacked by what they are spent on; perfect scaling is a
    bar as high as the first. Full colour where measured, pale where predicted."""
    width, height, left, bottom, top = 760, 360, 60, 300, 30
    found = [(gpus, *model.best(gpus, host, slower)) for gpus in SIZES]
    most = max(gpus * sum(parts.values()) for gpus, _, parts in found) * 1.05
    step = (width - left - 20) / len(found)
    scale = (bottom - top) / most
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="18">{model.name}: GPU seconds of one step</text>',
    ]
    first = sum(found[0][2].values()) * scale
    out.append(
        f'<line x1="{left}" x2="{width - 20}" y1="{bottom - first:.1f}" y2="{bottom - first:.1f}" stroke="#333" '
        'stroke-dasharray="4 3"/>'
    )
    for index, (gpus, dims, parts) in enumerate(found):
        x, y = left + index * step + 8, float(bottom)
        opacity = 1.0 if gpus in model.measured else 0.55
        for name, seconds in parts.items():
            tall = gpus * seconds * scale
            y -= tall
            out.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{step - 16:.1f}" height="{tall:.1f}" fill="{COLORS[name]}" '
                f'opacity="{opacity}"/>'
            )
        middle, total = x + step / 2 - 8, sum(parts.values())
        name = (ranks.name_of(dims) or "one").replace("ulysses", "u").replace("cfg", "c").replace("ring", "r")
        for offset, text in ((16, f"{gpus} GPU"), (30, name)):
            out.append(f'<text x="{middle:.1f}" y="{bottom + offset}" text-anchor="middle">{text}</text>')
        out.append(f'<text x="{middle:.1f}" y="{y - 4:.1f}" text-anchor="middle">{total:.2f} s</text>')
        if gpus in model.measured:
            dot = bottom - gpus * model.measured[gpus] * scale
            out.append(f'<circle cx="{middle:.1f}" cy="{dot:.1f}" r="4" fill="white" stroke="black"/>')
    for index, (name, color) in enumerate(COLORS.items()):
        x = left + index * 110
        out.append(f'<rect x="{x}" y="{height - 18}" width="10" height="10" fill="{color}"/>')
        out.append(f'<text x="{x + 14}" y="{height - 9}">{name}</text>')
    out.append(f'<text x="{left + 5 * 110}" y="{height - 9}">o measured; pale: predicted</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


HEADLINE_PARTS = ("t5_s", "vae_encode_s", "dit_s", "vae_decode_s")


def headline_table(files: Sequence[Path]) -> list[str]:
    """Rows of ``benchmarks/headline.py``: each part as ``shared / GPUs + rest``, and what that says for 8 GPUs."""
    by_row: dict[str, list[dict]] = {}
    for path in files:
        for row in json_module.loads(path.read_text())["rows"]:
            by_row.setdefault(row["row"], []).append(row)
    lines = [
        "| row | measured: s (GPUs) | T5, VAE encode, DiT loop, VAE decode on 8 | total on 8 | published, 8 H100 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, rows in by_row.items():
        sizes = sorted({row["world_size"] for row in rows})
        if len(sizes) < 2:
            raise ValueError(f"row {name} was measured on {sizes[0]} GPUs only: a prediction needs two numbers of GPUs")
        features_of = [[1 / row["world_size"], 1.0] for row in rows]
        parts = []
        for part in HEADLINE_PARTS:
            shared, rest = least_squares(features_of, [max(row[part], 1e-3) for row in rows])
            parts.append(shared / 8 + rest)
        known = [f"{sum(row[part] for part in HEADLINE_PARTS):.2f} ({row['world_size']})" for row in rows]
        published = rows[0]["published_s_8_h100"]
        lines.append(
            f"| {name} | {', '.join(known)} | {', '.join(f'{value:.2f}' for value in parts)} | {sum(parts):.2f} | "
            f"{published or '-'} |"
        )
    return lines


def write_between(path: Path, lines: Sequence[str]) -> None:
    """Put lines where the page keeps a place for them."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text("\n".join([f"{before}{BEGIN}", "", *lines, "", END]) + after)


def main(
    results: Annotated[list[Path], typer.Argument(help="Files of benchmarks/dit.py, of one kind of GPU.")],
    headline: Annotated[list[Path] | None, typer.Option(help="Files of benchmarks/headline.py.")] = None,
    single: Annotated[
        list[Path] | None, typer.Option(help="Files of benchmarks/dit.py on one GPU of any kind.")
    ] = None,
    network_gbs: Annotated[
        float, typer.Option(help="GB/s of a GPU's own link to other hosts: 400 Gb/s are 50.")
    ] = 50.0,
    nvlink_gbs: Annotated[float, typer.Option(help="GB/s that NVLink has each way on paper.")] = 450.0,
    page: Annotated[Path, typer.Option(help="The page whose tables are written.")] = DOCS / "scaling.md",
    svg: Annotated[Path, typer.Option(help="The figure.")] = DOCS / "images" / "scaling.svg",
) -> None:
    """Fit the model and write its tables and its figure."""
    files = [json_module.loads(path.read_text()) for path in results]
    devices = sorted({file["device"] for file in files})
    if len(devices) > 1:
        raise typer.BadParameter(f"the files are of different GPUs: {', '.join(devices)}")
    settings: dict[str, list[dict]] = {}
    every: dict[str, list[dict]] = {}
    for row in itertools.chain.from_iterable(file["rows"] for file in files):
        every.setdefault(label(row), []).append(row)
        if row.get("overlap") is not False and "merge" not in (row["topology"] or ""):
            settings.setdefault(label(row), []).append(row)
    runs = len({(number, row.get("run")) for number, file in enumerate(files) for row in file["rows"]})
    lines = [f"Measured on {devices[0]}, {max(file['date'] for file in files)}, in {runs} run{'s' * (runs != 1)}."]
    slower = nvlink_gbs / network_gbs
    drawn = None
    for rows in settings.values():
        try:
            model = fit(rows)
        except ValueError as error:
            print(f"left out: {error}")
            continue
        lines += ["", *measured_table(every[model.name])]
        lines += ["", *table(model, HOST, slower, f"hosts of {HOST} GPUs, {8 * network_gbs:g} Gb/s a GPU between them")]
        lines += ["", *table(model, max(SIZES), 1.0, "all GPUs joined by NVLink")]
        terms = ", ".join(
            f"{name} {value:.3f}" + (" (not measured: as the all-to-all alone)" if name in model.unknown else "")
            for name, value in model.block.items()
        )
        lines += [
            "",
            f"Coefficients of a block (ms, ms a GB): {terms}; of a forward: fixed {model.fixed:.2f}, stream "
            f"{model.stream:.3f}. Largest error of a fitted row {100 * model.worst:.1f} %. The all-to-all alone: "
            f"{model.link_gbs:.0f} GB/s.",
        ]
        if drawn is None:
            drawn = figure(model, HOST, slower)
            if single:
                alone = [json_module.loads(path.read_text()) for path in single]
                lines += ["", "Four GPUs by the model, from one that was measured:", ""]
                lines += goals_table(model, alone, HOST, slower)
    if drawn is None:
        raise typer.BadParameter("no setting has rows of one GPU and of several: run benchmarks/dit.py under torchrun")
    if headline:
        lines += ["", "Whole videos, predicted for 8 GPUs from fewer:", "", *headline_table(headline)]
    svg.parent.mkdir(parents=True, exist_ok=True)
    svg.write_text(drawn)
    write_between(page, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
