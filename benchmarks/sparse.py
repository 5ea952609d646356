"""Block-sparse attention by itself: time against kept blocks, what choosing and measuring cost, and what is lost.

    python benchmarks/sparse.py --json benchmarks/results/sparse_h200.json

Parts: ``time`` (Gaussian q, k and v at the shape of I2V-A14B, 1280x720, 81 frames: 75,600 tokens, 40 heads of 128),
``cost`` (token order, statistics, scores, choosing, measuring), ``heads`` (heads of known structure, in the same grid:
dropped mass and error of each policy against exact attention, and what the measuring says of them), ``bound`` (the
same heads under the guarantee until densities settle). The file is written after every row, so that what fails later
loses nothing. ``time`` ends with a verdict for each backend: whether its times lie on a straight line over the kept
blocks, to 5 %, from a fifth of them up.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import common
import torch
import typer
from rich.console import Console
from rich.table import Table
from structured_qkv import KINDS, structured_qkv
from torch import Tensor

from wan_fp8.attention import ATTENTION, AttentionCore
from wan_fp8.attention.core import Step, register_backends
from wan_fp8.attention.sparse import BLOCK, SPARSE, Selection, Sparsity, TokenOrder, presets, token_order
from wan_fp8.attention.sparse.guarantee import ROWS, HeadControl, Sample, measure, sample
from wan_fp8.attention.sparse.policies.window import distances
from wan_fp8.attention.sparse.registry import SparseRequest
from wan_fp8.attention.sparse.registry import register_backends as register_sparse_backends
from wan_fp8.attention.sparse.remainder import Remainder, add_
from wan_fp8.attention.sparse.run import SparseRun
from wan_fp8.attention.sparse.selection import BlockStatistics, choose, estimated_scores, use_fused
from wan_fp8.attention.sparse.share import HeadShare
from wan_fp8.errors import BackendUnavailableError
from wan_fp8.hardware import device_caps

PARTS = ("time", "cost", "heads", "bound")
SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
EXACT_BLOCKS = 8
"""Blocks of queries of a head whose exact attention is computed in ``heads``."""
LINE_FROM, LINE_WITHIN = 0.2, 0.05
"""Shares of the blocks that the straight line goes through, and how far from it a time may be."""
SETTLED_AFTER = 24
"""Calls under the guarantee: 12 steps of two conditionings."""
console = Console(width=150)


def random_qkv(tokens: int, padded: int, heads: int, width: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Gaussian operands; queries of padding behind the others, as a model has them."""
    made = []
    for seed in range(3):
        generator = torch.Generator(device).manual_seed(seed)
        made.append(torch.randn(1, padded, heads, width, device=device, dtype=dtype, generator=generator))
    return [made[0], made[1][:, :tokens], made[2][:, :tokens]]


def available(q: Tensor, k: Tensor) -> list[str]:
    """Sparse backends that run here, the others named with their reasons; the masked one on a CPU only."""
    register_sparse_backends()
    request = SparseRequest(device_caps(q.device), q.dtype, q.shape[3], q.shape[1], k.shape[1])
    found = []
    for name in SPARSE.names:
        if name == "auto" or (name == "masked" and q.is_cuda):
            continue
        reason = SPARSE.backend(name).refuse(request)
        if reason is None:
            found.append(name)
        else:
            console.print(f"sparse {name} left out: {reason}")
    return found


def random_selection(share: float, q: Tensor, k: Tensor) -> Selection:
    """The same number of blocks in each row, by chance."""
    rows, every = -(-q.shape[1] // BLOCK), -(-k.shape[1] // BLOCK)
    count = max(1, round(share * every))
    scores = torch.rand(1, q.shape[2], rows, every, device=q.device)
    blocks = scores.argsort(-1)[..., :count].sort(-1).values.int()
    full = torch.zeros(1, q.shape[2], rows, every, dtype=torch.int32, device=q.device)
    full[..., :count] = blocks
    counts = torch.full(blocks.shape[:3], count, dtype=torch.int32, device=q.device)
    return Selection(counts, full, q.shape[1], k.shape[1])


def time_rows(qkv: list[Tensor], device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Dense attention, then each backend over shares of the blocks, with its distance from a straight line."""
    q, k, v = qkv
    for name in ("fa3", "fa4", "cudnn") if q.is_cuda else ("sdpa",):
        try:
            backend = ATTENTION.resolve(name, AttentionCore.request(q, k)).backend
        except BackendUnavailableError as error:
            console.print(f"dense {name} left out: {error}")
            continue
        ms = common.median_ms(lambda run=backend.run: run(q, k, v), device, repeats=repeats)
        yield {"what": "dense", "attention": name, "sparsity": None, "ms": round(ms, 3)}
    for name in available(q, k):
        run, found = SPARSE.backend(name).run, []
        for share in SHARES:
            chosen = random_selection(share, q, k)
            ms = common.median_ms(lambda s=chosen, r=run: r(q, k, v, s), device, repeats=repeats)
            found.append((float(chosen.density().mean()), ms))
        line = straight_line([pair for pair in found if pair[0] >= LINE_FROM])
        off = {density: ms / line(density) - 1 for density, ms in found}
        for density, ms in found:
            yield {
                "what": "sparse",
                "attention": name,
                "sparsity": round(density, 4),
                "ms": round(ms, 3),
                "off_line": round(off[density], 4),
                "kept_against_whole": round(ms / found[0][1], 4),
            }
        worst = max((density for density in off if density >= LINE_FROM), key=lambda density: abs(off[density]))
        yield {
            "what": "linear",
            "attention": name,
            "from_share": LINE_FROM,
            "worst_off_line": round(off[worst], 4),
            "at_share": round(worst, 4),
            "within": LINE_WITHIN,
            "holds": abs(off[worst]) <= LINE_WITHIN,
        }


def straight_line(points: list[tuple[float, float]]) -> Callable[[float], float]:
    """Least squares of ms over density."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return lambda density: float(y.mean() + slope * (density - x.mean()))


def cost_rows(qkv: list[Tensor], order: TokenOrder, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """What comes on top of the kernel."""
    q, k, v = qkv
    heads, tokens, fused = q.shape[2], k.shape[1], use_fused(q)
    stream = torch.randn(1, tokens, heads * q.shape[3], device=device)
    both = [BlockStatistics.of(t, tokens, BLOCK, fused) for t in (q, k)]
    scores = estimated_scores(*both)
    amount = torch.full((heads,), 0.5, device=device)
    none = torch.zeros(heads, dtype=torch.int32, device=device)
    chosen = choose(scores, amount, none, "count", order.layout, q.shape[1], BLOCK, fused)
    control = HeadControl(heads, 0.05, 0.1, torch.device(device))
    at = sample(3, HeadShare.whole(heads), chosen.key_blocks, q.device)

    out, lse = torch.zeros_like(q), torch.zeros(q.shape[0], heads, q.shape[1], device=device)

    def whole(policy: str) -> None:
        sparsity = Sparsity(policy=policy, density=0.5, bound=None, skip_first=0.0, skip_last=0.0)
        SparseRun(sparsity, 1, 40).selected(q, k, v, None, order.layout)

    def look() -> None:
        control.learn(at, measure(q, k, v, v if q.shape == v.shape else q, chosen, at, fused))

    calls: dict[str, Callable[[], Any]] = {
        "order, there and back (once a forward)": lambda: order.undo(order.apply(stream)),
        "statistics of q and k": lambda: [BlockStatistics.of(t, tokens, BLOCK, fused) for t in (q, k)],
        "scores": lambda: estimated_scores(*both),
        "choose by number": lambda: choose(scores, amount, none, "count", order.layout, q.shape[1], BLOCK, fused),
        "choose by mass": lambda: choose(scores, amount, none, "mass", order.layout, q.shape[1], BLOCK, fused),
        "selection, coverage": lambda: whole("coverage"),
        "selection, density": lambda: whole("density"),
        "selection, window": lambda: whole("window"),
        "measuring and learning": look,
        "means of the dropped blocks": lambda: add_(out, lse, q, Remainder.of(k, v, fused), chosen, fused),
    }
    for name, call in calls.items():
        timed = {
            key: round(common.median_ms(call, device, repeats=max(repeats, 10), behind=behind), 4)
            for key, behind in (("ms", True), ("launched_alone_ms", False))
        }
        yield {"what": "cost", "part": name, **timed}


def exact_part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of one head and block of queries, written out: mass of the dropped blocks of each query, and the relative error
    of the output without them."""
    rows = q[0, block * BLOCK : (block + 1) * BLOCK, 0].double()
    weights = torch.softmax(rows @ k[0, :, 0].double().T / math.sqrt(q.shape[3]), -1)
    kept = weights * mask[block].repeat_interleave(BLOCK)[: k.shape[1]]
    values = v[0, :, 0].double()
    exact, ours = weights @ values, kept @ values / kept.sum(-1, keepdim=True)
    return 1 - kept.sum(-1), (ours - exact).norm() / exact.norm()


def head_rows(order: TokenOrder, width: int, device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Each kind of head under each policy and two controls, at several densities."""
    places, tokens = order.layout.places, order.layout.num_tokens
    assert places is not None
    q, k, v = structured_qkv(places, KINDS, width, dtype=dtype)
    fused, every = use_fused(q), order.layout.key_blocks
    scores = estimated_scores(*(BlockStatistics.of(t, tokens, BLOCK, fused) for t in (q, k)))
    generator = torch.Generator(device).manual_seed(7)
    chance = torch.rand(scores.shape, device=device, generator=generator)
    near = -distances(order.layout, every, BLOCK)[None, None]
    none = torch.zeros(len(KINDS), dtype=torch.int32, device=device)
    whole = tokens // BLOCK
    looked = sorted({min(round((i + 0.5) * whole / EXACT_BLOCKS), whole - 1) for i in range(EXACT_BLOCKS)})
    plans = [("coverage", scores, "mass", share) for share in (0.8, 0.9, 0.97)]
    plans += [
        (name, given, "count", share)
        for share in (0.15, 0.25, 0.5)
        for name, given in (("density", scores), ("window", near), ("chance", chance))
    ]
    for name, given, rule, share in plans:
        amount = torch.full((len(KINDS),), share, device=device)
        chosen = choose(given, amount, none, rule, order.layout, tokens, BLOCK, fused)
        mask = chosen.mask()[0]
        for head, kind in enumerate(KINDS):
            q1, k1, v1 = (t[:, :, head : head + 1] for t in (q, k, v))
            parts = [exact_part(q1, k1, v1, mask[head], block) for block in looked]
            exact = torch.stack([dropped[:: BLOCK // ROWS].mean() for dropped, _ in parts])  # of the queries measured
            found = measured_at(q, k, v, chosen, head, looked, fused)
            yield {
                "what": "head",
                "head": kind,
                "policy": name,
                "asked": share,
                "density": round(float(mask[head].float().mean()), 4),
                "dropped": float(f"{statistics.fmean(float(d.mean()) for d, _ in parts):.4g}"),
                "dropped_worst_query": float(f"{max(float(d.max()) for d, _ in parts):.4g}"),
                "error": float(f"{statistics.fmean(float(e) for _, e in parts):.4g}"),
                "measured_dropped": float(f"{float(found.mean()):.4g}"),
                "measured_off": float(f"{float((found.double() - exact).abs().max()):.2g}"),
            }


def measured_at(
    q: Tensor, k: Tensor, v: Tensor, chosen: Selection, head: int, blocks: list[int], fused: bool
) -> Tensor:
    """What the run-time measuring says of one head's dropped mass at these blocks of queries."""
    places = torch.tensor(blocks, device=q.device)
    return measure(q, k, v, None, chosen, Sample(torch.full_like(places, head), places), fused).dropped[0]


def bound_rows(order: TokenOrder, width: int, device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Densities that the guarantee settles for each kind of head, and whether the bound holds then."""
    places = order.layout.places
    assert places is not None
    q, k, v = structured_qkv(places, KINDS, width, dtype=dtype)
    for name, preset in presets().items():
        run = SparseRun(preset, 10, 40)
        for call in range(SETTLED_AFTER):
            run.sparse(q, k, v, Step(10 + call // 2, 40), order.layout)
        late = run.calls[SETTLED_AFTER // 2 :]
        for head, kind in enumerate(KINDS):
            errors = [
                float(c.found.error[0, i])
                for c in late
                if c.found is not None
                for i, h in enumerate(c.at.heads.tolist())
                if h == head
            ]
            yield {
                "what": "bound",
                "head": kind,
                "policy": name,
                "bound": preset.bound,
                "density_at_first": round(float(run.calls[0].density[head]), 4),
                "density": round(float(run.calls[-1].density[head]), 4),
                "worst_error": float(f"{max(errors):.4g}"),
                "dense": float(run.calls[-1].density[head]) == 1.0,
            }


def show(rows: list[dict[str, Any]]) -> None:
    """One table for each kind of row."""
    for what in dict.fromkeys(row["what"] for row in rows):
        chosen = [row for row in rows if row["what"] == what]
        table = Table(title=what)
        for column in chosen[0]:
            table.add_column(column)
        for row in chosen:
            table.add_row(*(str(value) for value in row.values()))
        console.print(table)


def main(
    grid: Annotated[str, typer.Option(help="Frames, rows and columns of tokens.")] = "21x45x80",
    heads: Annotated[int, typer.Option(help="Heads of parts time and cost.")] = 40,
    width: Annotated[int, typer.Option(help="Width of a head.")] = 128,
    parts: Annotated[str, typer.Option(help=f"With commas: {', '.join(PARTS)}.")] = ",".join(PARTS),
    repeats: Annotated[int, typer.Option(help="Runs of each kernel; the median counts.")] = 5,
    device: Annotated[str, typer.Option(help="cuda or cpu; empty picks.")] = "",
    json: Annotated[str, typer.Option(help="Where to write the results file.")] = "",
) -> None:
    """Time, cost and loss of block-sparse attention."""
    wanted = parts.split(",")
    if not set(wanted) <= set(PARTS):
        raise typer.BadParameter(f"parts are {', '.join(PARTS)}; got {parts}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    frames, rows_, columns = (int(n) for n in grid.split("x"))
    tokens = frames * rows_ * columns
    register_backends()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        order = token_order((frames, rows_, columns), 0, True, torch.device(device))
        plain = token_order((frames, rows_, columns), 0, False, torch.device(device))
        qkv = random_qkv(tokens, -(-tokens // BLOCK) * BLOCK, heads, width, device, dtype)
        made: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "time": lambda: time_rows(qkv, device, repeats),
            "cost": lambda: cost_rows(qkv, order, device, repeats),
            "heads": lambda: head_rows(plain, width, device, dtype),
            "bound": lambda: bound_rows(plain, width, device, dtype),
        }
        for part in wanted:
            for row in made[part]():
                rows.append(row)
                if json:
                    common.write_results(json, rows, device)
    show(rows)
    for row in (row for row in rows if row["what"] == "linear"):
        verdict = "holds" if row["holds"] else "does not hold"
        console.print(
            f"{row['attention']}: time is linear in the kept blocks within {row['within']:.0%}, from a share of "
            f"{row['from_share']}: {verdict} (worst {row['worst_off_line']:+.1%}, at {row['at_share']})"
        )


if __name__ == "__main__":
    typer.run(main)
