"""Cases for block-sparse attention, selection and measuring: against dense attention in float64, run by pytest (the
eager paths), by Triton's interpreter and on a GPU (the kernels).
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from structured_qkv import structured_qkv

from wan_fp8.attention.sparse import BLOCK, SPARSE, BlockLayout, Selection, token_order
from wan_fp8.attention.sparse.guarantee import ROWS, kept_blocks, measure, query_rows_of, sample
from wan_fp8.attention.sparse.registry import register_backends
from wan_fp8.attention.sparse.remainder import Remainder, add_
from wan_fp8.attention.sparse.selection import BlockStatistics, always_kept, choose, estimated_scores
from wan_fp8.attention.sparse.share import HeadShare

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16 if INTERPRETED else torch.bfloat16)
"""The interpreter multiplies no bf16 matrices."""
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
"""Relative L2. bf16 and fp16: output and probabilities are rounded once each."""


def mend_interpreter() -> None:
    """Let Triton 3.6's interpreter loop up to a number that it loaded: NumPy from 2.4 on turns no array of one element
    into an integer."""
    from triton.runtime import interpreter

    scope = interpreter._LangPatchScope
    plain = scope.set_attr

    def set_attr(self, thing, name, value):
        plain(self, thing, name, (lambda x: x.handle.data.item()) if name == "__index__" else value)

    scope.set_attr = set_attr


def qkv(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype, device: torch.device, padding: int = 0):
    """Random operands with a mean in k and v; q has padding behind it."""
    generator = torch.Generator().manual_seed(tokens + heads)
    q, k, v = (torch.randn(batch, tokens + padding, heads, width, generator=generator) for _ in range(3))
    q, k, v = ((x + shift).to(dtype).to(device) for x, shift in ((q, 0.0), (k, 0.3), (v, 0.3)))
    return q, k[:, :tokens], v[:, :tokens]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """float64, with a mask [B, N, Mq, Mk] of blocks of 128; a query that sees nothing gets zeros."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if mask is not None:
        tokens = mask.repeat_interleave(BLOCK, 2)[:, :, : q.shape[2]].repeat_interleave(BLOCK, 3)[..., : k.shape[2]]
        scores = scores.masked_fill(~tokens, -math.inf)
    return (torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v).transpose(1, 2)


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double().cpu() - exact.cpu()).norm() / exact.cpu().norm())


def random_mask(batch: int, heads: int, queries: int, keys: int, share: float, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(queries * keys)
    return (torch.rand(batch, heads, queries, keys, generator=generator) < share).to(device)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(device: torch.device, dtype: torch.dtype, backend: str, width: int = 32) -> None:
    """Odd lengths, one block, batch 2, padded queries, empty rows, everything kept."""
    register_backends()
    run = SPARSE.backend(backend).run
    shapes = [(1, 300, 0, 0.5), (2, 257, 127, 0.4), (1, 77, 51, 1.0)]
    if not INTERPRETED:
        shapes += [(1, 128, 0, 1.0), (1, 640, 0, 0.3), (1, 384, 0, 1.0)]
    elif dtype == torch.float32:  # 16 keys at a time take the interpreter long
        del shapes[1]
    for batch, tokens, padding, share in shapes:
        q, k, v = qkv(batch, tokens, 2, width, dtype, device, padding)
        rows, keys = -(-q.shape[1] // BLOCK), -(-tokens // BLOCK)
        mask = random_mask(batch, 2, rows, keys, share, device)
        mask[:, :, -1] = True
        if rows > 1 and share < 1:
            mask[:, 0, 0] = False
        out = run(q, k, v, Selection.of_mask(mask, q.shape[1], tokens))
        exact = dense(q, k, v, mask)
        error = relative(out, exact)
        assert error <= TOLERANCE[dtype], f"{backend}: {error:.2e} at {batch} x {tokens} + {padding}"
        if rows > 1 and share < 1:
            assert not out[:, :BLOCK, 0].any(), "a query that sees nothing gets zeros"


def sparse_attention_triton(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    attention(device, dtype, "triton" if fused else "masked")


def what_was_dropped_counts_by_its_mean(
    device: torch.device, dtype: torch.dtype, fused: bool, backend: str = "", width: int = 32
) -> None:
    """Against dense attention in float64 in which every key and value of a dropped block is the block's mean; sums
    against float64; a query that keeps nothing, one that keeps everything, a last block that is short, blocks of 256
    queries; and a look at samples before anything is computed sees the same."""
    register_backends()
    name = backend or ("triton" if fused else "masked")
    shapes = [(1, 300, 40, 128)] if INTERPRETED else [(1, 300, 40, 128), (2, 700, 20, 256), (1, 77, 0, 128)]
    for batch, tokens, padding, query_rows in shapes:
        q, k, v = qkv(batch, tokens, 2, width, dtype, device, padding)
        rows, keys = -(-q.shape[1] // query_rows), -(-tokens // BLOCK)
        mask = random_mask(batch, 2, rows, keys, 0.5, device)
        mask[:, 0, 0], mask[:, 1, 0] = False, True
        selection = Selection.of_mask(mask, q.shape[1], tokens, query_rows)
        out, lse = SPARSE.backend(name).run(q, k, v, selection, sums=True)
        kept = mask.repeat_interleave(query_rows, 2)[:, :, : q.shape[1]].repeat_interleave(BLOCK, 3)[..., :tokens]
        places = torch.arange(tokens, device=device) // BLOCK
        mean = torch.zeros(tokens, tokens, dtype=torch.float64, device=device)
        mean[places[:, None] == places] = 1
        mean /= mean.sum(1, keepdim=True)
        exact = torch.empty(q.shape, dtype=torch.float64, device=device)
        for b, n in itertools.product(range(batch), range(2)):
            own_q, own_k, own_v = (t[b, :, n].double() for t in (q, k, v))
            real, pooled = (own_q @ keys_.T / math.sqrt(width) for keys_ in (own_k, mean @ own_k))
            sums = torch.logsumexp(real.masked_fill(~kept[b, n], -math.inf), 1)
            assert torch.allclose(lse[b, n].double(), sums, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 2e-2)
            weights = torch.softmax(torch.where(kept[b, n], real, pooled), 1)
            exact[b, :, n] = (weights * kept[b, n]) @ own_v + (weights * ~kept[b, n]) @ (mean @ own_v)
        rest = Remainder.of(k, v, fused)
        before = out.clone()
        assert add_(out, lse, q, rest, selection, fused) is out
        error = relative(out, exact)
        limit = 2 * TOLERANCE[dtype]
        assert error <= limit, f"{error:.2e} at {batch} x {tokens} + {padding}, {query_rows} queries"
        assert torch.equal(out[:, :query_rows, 1], before[:, :query_rows, 1]) or dtype != torch.float32
        assert relative(before, exact) > 10 * limit, "what is left out matters here"
        if query_rows == BLOCK:
            at = sample(1, HeadShare.whole(2), keys, device, every_head=True)
            trial = measure(q, k, v, None, selection, at, fused, rest)
            given = measure(q, k, v, out, selection, at, fused)
            assert torch.allclose(trial.error, given.error, rtol=2e-2, atol=1e-4 if dtype == torch.float32 else 1e-2)


# ---- selection -------------------------------------------------------------------------------------------------------


def block_statistics(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """Means and variances, a short last block, blocks of padding alone, 256 rows."""
    for rows, tokens, padding in ((128, 300, 0), (128, 300, 300), (256, 300, 20), (128, 100, 0)):
        q, _, _ = qkv(2, tokens, 2, 32, dtype, device, padding)
        found = BlockStatistics.of(q, tokens, rows, fused)
        for block in range(-(-q.shape[1] // rows)):
            part = q[:, block * rows : min((block + 1) * rows, tokens)].double()
            if part.shape[1] == 0:
                assert not found.mean[:, :, block].any() and not found.variance[:, :, block].any()
                continue
            mean = part.mean(1)
            assert relative(found.mean[:, :, block], mean) < 1e-6
            assert relative(found.variance[:, :, block], (part - mean[:, None]).square().mean(1)) < 1e-6
        assert found.sizes.sum() == tokens


def scores_of_gaussian_blocks(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """In blocks that are Gaussian around their means the estimated mass is the real one."""
    generator = torch.Generator().manual_seed(3)
    blocks, width = 6, 32
    middles = torch.randn(2, 1, blocks, 1, 1, width, generator=generator)
    spread = 0.2 + 0.4 * torch.rand(2, 1, blocks, 1, 1, width, generator=generator)
    spread[1, :, 2] *= 4  # one block of keys varies more, and holds more mass than its mean key does
    x = middles + spread * torch.randn(2, 1, blocks, BLOCK, 1, width, generator=generator)
    q, k = (t.flatten(1, 2).to(dtype).to(device) for t in x)
    tokens = blocks * BLOCK
    of_q, of_k = (BlockStatistics.of(t, tokens, BLOCK, fused) for t in (q, k))
    estimated = torch.softmax(estimated_scores(of_q, of_k), dim=-1)
    exact = torch.softmax(q[:, :, 0].double() @ k[:, :, 0].double().transpose(1, 2) / math.sqrt(width), -1)
    exact = exact.view(1, blocks, BLOCK, blocks, BLOCK).sum(4).mean(2)
    assert float((estimated[:, 0].double() - exact).abs().sum(-1).max()) < 0.5, (
        f"total variation {(estimated[:, 0].double() - exact).abs().sum(-1)}"
    )
    plain = torch.softmax(of_q.mean @ of_k.mean.transpose(2, 3) / math.sqrt(width), -1)
    distance = [float((p[:, 0].double() - exact).abs().sum()) for p in (estimated, plain)]
    assert distance[0] < 0.7 * distance[1], f"the correction for blocks that vary inside is worth having: {distance}"


def chosen_blocks(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """By mass the fewest blocks that hold the share, by number the best ones; own blocks and ranges always."""
    del dtype
    every, batch = (8, 1) if INTERPRETED else (37, 2)
    tokens = every * BLOCK - 50
    layout = BlockLayout(tokens, ((0, 1), (every - 1, every)))
    generator = torch.Generator().manual_seed(5)
    scores = 3 * torch.randn(batch, 3, every + 1, every, generator=generator).to(device)
    amount, none = torch.tensor([0.8, 0.5, 0.4], device=device), torch.zeros(3, dtype=torch.int32, device=device)
    kept = always_kept(layout, every + 1, BLOCK, device)
    assert kept[5].nonzero().flatten().tolist() == [0, 5, every - 1] and kept[every, every - 1]
    mass = torch.softmax(scores.double(), -1)
    for rule in ("mass", "count"):
        found = choose(scores, amount, none, rule, layout, (every + 1) * BLOCK, BLOCK, fused)
        mask = found.mask()
        assert torch.equal(mask.sum(-1), found.counts)
        rows = mask[:, :, :every]  # the last row is padding
        assert bool((mask | ~kept).all())
        if rule == "count":
            want = torch.ceil(amount * every).int().view(1, 3, 1)
            assert torch.equal(rows.sum(-1), want.expand(batch, 3, every))
            least = scores[:, :, :every].masked_fill(~rows | kept[:every], math.inf).amin(-1)
            assert bool((scores[:, :, :every].masked_fill(rows, -math.inf).amax(-1) <= least).all())
            continue
        held = (mass[:, :, :every] * rows).sum(-1)
        assert bool((held >= amount.view(1, 3, 1) - 1e-5).all())
        removable = mass[:, :, :every].masked_fill(~rows | kept[:every], math.inf).amin(-1)
        spare = held - removable >= amount.view(1, 3, 1) + 1e-5
        assert not bool((spare & removable.isfinite()).any()), "no block could be left out"
    assert torch.equal(mask[:, :, every], kept[every].expand(batch, 3, every)), "padding asks for nothing"


def heads_that_keep_everything(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """Flat scores, heads marked dense, and equal scores by number."""
    del dtype
    every = 6 if INTERPRETED else 12
    layout = BlockLayout(every * BLOCK)
    flat = torch.zeros(1, 1, every, every, device=device)
    none = torch.zeros(2, dtype=torch.int32, device=device)
    amount = torch.tensor([0.95, 0.5], device=device)
    found = choose(flat, amount, none, "mass", layout, every * BLOCK, BLOCK, fused)
    assert bool((found.counts[:, 0] == every).all()), "a head that looks everywhere keeps everything"
    found = choose(flat, amount, none, "count", layout, every * BLOCK, BLOCK, fused)
    assert bool((found.counts[:, 1] == every // 2).all()), "of equal scores as many as are wanted"
    sharp = torch.arange(every, device=device).float().expand(1, 2, every, every).contiguous()
    found = choose(sharp, amount, torch.tensor([0, 1], dtype=torch.int32, device=device), "mass", layout, every * BLOCK,
                   BLOCK, fused)  # fmt: skip
    assert bool((found.counts[:, 0] < 6).all()) and bool((found.counts[:, 1] == every).all())
    wide = choose(sharp[:, :, : every // 2], amount, none, "count", layout, every * BLOCK, 2 * BLOCK, fused)
    mask = wide.mask()[0, 1]
    assert all(bool(mask[row, [2 * row, 2 * row + 1]].all()) for row in range(every // 2)), "own blocks of 256 rows"


# ---- measuring -------------------------------------------------------------------------------------------------------


def measured_is_exact(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """Dropped mass and error of the samples against float64 over all keys."""
    for batch, tokens, padding in ((1, 300 if INTERPRETED else 600, 40), (2, 257, 0)):
        q, k, v = qkv(batch, tokens, 4, 32, dtype, device, padding)
        rows, keys = -(-q.shape[1] // BLOCK), -(-tokens // BLOCK)
        mask = random_mask(batch, 4, rows, keys, 0.6, device)
        mask[..., 0] = True
        selection = Selection.of_mask(mask, q.shape[1], tokens)
        exact, sparse = dense(q, k, v), dense(q, k, v, mask)
        scores = torch.einsum("bsne,blne->bnsl", q.double(), k.double()) / math.sqrt(32)
        weights = torch.softmax(scores, -1)
        lost = ~mask.repeat_interleave(BLOCK, 2)[:, :, : q.shape[1]].repeat_interleave(BLOCK, 3)[..., :tokens]
        dropped = (weights * lost).sum(-1)  # [B, N, S]
        for call in range(2 if INTERPRETED else 3):
            at = sample(call, HeadShare.whole(4), keys, device, every_head=call == 0)
            assert torch.equal(kept_blocks(selection, at), mask[:, at.heads, at.query_block])
            own = measure(q, k, v, None, selection, at, fused)
            given = measure(q, k, v, sparse.to(dtype), selection, at, fused)
            where = query_rows_of(at, selection)
            assert where.shape[1] == ROWS and int(where.max()) < tokens
            for n, head in enumerate(at.heads.tolist()):
                place = where[n]
                want = dropped[:, head, place]
                limit = 2e-5 if dtype == torch.float32 else 2e-2
                assert torch.allclose(own.dropped[:, n].double(), want.mean(1), rtol=limit, atol=limit)
                assert torch.allclose(own.worst[:, n].double(), want.amax(1), rtol=limit, atol=limit)
                a, b = sparse[:, place, head], exact[:, place, head]
                error = (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
                for found in (own, given):
                    assert torch.allclose(found.error[:, n].double(), error, rtol=3 * limit, atol=3 * limit)


def structured_heads(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """Heads of known structure: a share of the mass is kept with few blocks where there is structure, all where there
    is none; at the same number of blocks chance and a fixed neighbourhood lose more."""
    from wan_fp8.attention.sparse.policies.window import distances

    grid, width = (16, 12, 16), 128
    order = token_order(grid, device=device)
    places, tokens = order.layout.places, order.layout.num_tokens
    q, k, _ = structured_qkv(places, ("local", "strided", "sink", "diffuse"), width, dtype=dtype)
    keys = order.layout.key_blocks
    statistics = (BlockStatistics.of(t, tokens, BLOCK, fused) for t in (q, k))
    none = torch.zeros(4, dtype=torch.int32, device=device)
    scores = estimated_scores(*statistics)
    found = choose(scores, torch.full((4,), 0.9, device=device), none, "mass", order.layout, tokens, BLOCK, fused)
    density = found.density().tolist()
    assert density[3] == 1.0, "diffuse heads go dense by themselves"
    assert max(density[:3]) < 0.75, density
    weights = torch.softmax(torch.einsum("bsne,blne->bnsl", q.float(), k.float()) / math.sqrt(width), -1)
    pad = keys * BLOCK - tokens
    weights = torch.nn.functional.pad(weights, (0, pad, 0, pad)).unflatten(3, (keys, BLOCK)).sum(4)
    weights = weights.unflatten(2, (keys, BLOCK)).sum(3) / tokens  # [B, N, Mq, Mk]

    def lost(selection: Selection) -> Tensor:
        return (weights * ~selection.mask()).sum((0, 2, 3))

    assert bool((lost(found)[:3] < 0.2).all()), lost(found)
    half = torch.full((4,), 0.4, device=device)
    generator = torch.Generator().manual_seed(9)
    others = {
        "estimated": scores,
        "chance": torch.rand(scores.shape, generator=generator).to(device),
        "window": -distances(order.layout, keys, BLOCK)[None, None],
    }
    by = {n: lost(choose(s, half, none, "count", order.layout, tokens, BLOCK, fused)) for n, s in others.items()}
    assert bool((by["estimated"][:3] < 0.5 * by["chance"][:3]).all()), by
    assert float(by["estimated"][1:3].sum()) < float(by["window"][1:3].sum()), by


CASES = [
    sparse_attention_triton,
    block_statistics,
    scores_of_gaussian_blocks,
    chosen_blocks,
    heads_that_keep_everything,
    what_was_dropped_counts_by_its_mean,
    measured_is_exact,
    structured_heads,
]


def runs() -> list[tuple]:
    """Cases and types; the interpreter takes minutes for some, and tries others in one type only."""
    every = list(itertools.product(CASES, DTYPES))
    if not INTERPRETED:
        return every
    once = (chosen_blocks, heads_that_keep_everything, what_was_dropped_counts_by_its_mean, measured_is_exact)
    return [(c, t) for c, t in every if c is not structured_heads and not (c in once and t != torch.float32)]


if __name__ == "__main__":
    if INTERPRETED:
        mend_interpreter()
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for one_case, one_dtype in runs():
        one_case(where, one_dtype, fused=True)
        print("ok", one_case.__name__, one_dtype)
