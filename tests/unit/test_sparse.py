"""Block-sparse attention by itself: the eager paths on the CPU, the kernels in Triton's interpreter, settings, the
guarantee and its table. On a GPU the same cases run natively in tests/gpu/test_sparse_gpu.py."""

from __future__ import annotations

import collections
import itertools
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import sparse_cases
import torch
from sparse_cases import structured_qkv

from wan_fp8 import Attention
from wan_fp8.attention import AttentionCore, Step
from wan_fp8.attention.sparse import BLOCK, SPARSE, BlockLayout, Calibration, Sparsity, presets, token_order
from wan_fp8.attention.sparse.guarantee import STRIKES, HeadControl, Measured, Sample, sample
from wan_fp8.attention.sparse.policies.window import distances
from wan_fp8.attention.sparse.run import SparseRun
from wan_fp8.attention.sparse.selection import choose
from wan_fp8.attention.sparse.share import HeadShare
from wan_fp8.errors import BackendUnavailableError, InputError
from wan_fp8.models.over_frames import frames_here

HERE = Path(__file__).resolve().parent
TRITON = Path(os.environ.get("WAN_FP8_HOST_DIR") or HERE.parents[1] / ".host") / "triton"
EVERYWHERE = {"skip_first": 0.0, "skip_last": 0.0, "skip_first_blocks": 0, "skip_last_blocks": 0}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("case", sparse_cases.CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_paths(case, dtype: str) -> None:
    case(CPU, getattr(torch, dtype), fused=False)


@pytest.mark.skipif(not TRITON.is_dir(), reason="no Triton beside the host ('make triton'): its interpreter cannot run")
def test_triton_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TRITON.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "sparse_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 10


# ---- FlashAttention 4 -----------------------------------------------------------------------------------------------


class BlockSparseTensorsTorch(NamedTuple):
    """As 4.0.0b36 has it, in its order."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None
    dq_write_order_full: torch.Tensor | None = None
    spt: bool | None = None


def walk_lists(q, k, v, block_sparse_tensors=None, return_lse=False):
    """What the published kernel requires of its lists, and does with them: from the end, keys behind the sequence left
    out in the first block only. What it would read there is made visible as large keys."""
    given = block_sparse_tensors
    rows, width = given.block_size
    batch, heads, tokens = q.shape[0], q.shape[2], k.shape[1]
    queries, every = -(-q.shape[1] // rows), -(-tokens // width)
    assert rows in (128, 256) and width == 128
    for counts, blocks in ((given.mask_block_cnt, given.mask_block_idx), (given.full_block_cnt, given.full_block_idx)):
        assert counts.dtype == blocks.dtype == torch.int32 and blocks.stride(3) == 1
        assert counts.shape == (batch, heads, queries) == blocks.shape[:3] and 1 <= blocks.shape[3] <= every
    assert not given.mask_block_cnt.any()
    k, v = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, every * width - tokens), value=9.0) for t in (k, v))
    out = torch.zeros_like(q)
    sums = torch.full((batch, heads, q.shape[1]), -math.inf, dtype=torch.float32)
    for b, n, row in itertools.product(range(batch), range(heads), range(queries)):
        listed = given.full_block_idx[b, n, row, : given.full_block_cnt[b, n, row]].tolist()[::-1]
        keys = [key for block in listed for key in range(block * width, (block + 1) * width)]
        keys = [key for place, key in enumerate(keys) if place >= width or key < tokens]
        if keys:
            part = slice(row * rows, (row + 1) * rows)
            scores = q[b, part, n] @ k[b, keys, n].T / math.sqrt(q.shape[3])
            out[b, part, n] = torch.softmax(scores, -1) @ v[b, keys, n]
            sums[b, n, part] = torch.logsumexp(scores, -1).float()
    return out, sums if return_lse else None


@pytest.mark.parametrize("rows", [128, 256])
def test_flash_attention_4_is_called_as_it_wants_to_be(monkeypatch, rows: int) -> None:
    from wan_fp8.attention.sparse.backends import flash4

    cute = types.SimpleNamespace(flash_attn_func=walk_lists, __spec__=None)
    sparsity = types.SimpleNamespace(BlockSparseTensorsTorch=BlockSparseTensorsTorch)
    monkeypatch.setattr(flash4.dense, "_load", lambda: (cute.flash_attn_func, "flash_attn.cute"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.block_sparsity", sparsity)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(cute=cute))
    flash4._load.cache_clear()
    try:
        q, k, v = sparse_cases.qkv(2, 700, 2, 32, torch.float64, CPU, 20)
        layout = BlockLayout(700, ((5, 6),))
        scores = torch.randn(2, 2, -(-720 // rows), 6, generator=torch.Generator().manual_seed(1))
        amount, none = torch.full((2,), 0.6), torch.zeros(2, dtype=torch.int32)
        selection = choose(scores, amount, none, "mass", layout, 720, rows, fused=False)
        selection.counts[0, 0, 0] = 0
        ours = SPARSE.backend("fa4").run(q, k, v, selection)
        assert torch.allclose(ours, SPARSE.backend("masked").run(q, k, v, selection), rtol=1e-9, atol=1e-12)
        assert not ours[0, :rows, 0].any()
        both = [SPARSE.backend(name).run(q, k, v, selection, sums=True) for name in ("fa4", "masked")]
        assert all(torch.allclose(a, b) for a, b in zip(*both, strict=True))
        sparsity.BlockSparseTensorsTorch = collections.namedtuple("Older", "mask_block_cnt mask_block_idx")
        flash4._load.cache_clear()
        assert "knows no block_size, full_block_cnt, full_block_idx of" in flash4._load()[1]
    finally:
        flash4._load.cache_clear()
        flash4._nothing.clear()


# ---- order ----------------------------------------------------------------------------------------------------------


def spread(places: torch.Tensor) -> float:
    """Mean squared distance of a token from the middle of its block."""
    blocks = places[: len(places) // BLOCK * BLOCK].view(-1, BLOCK, 3)
    return float((blocks - blocks.mean(1, keepdim=True)).square().sum(-1).mean())


def hilbert(grid: tuple[int, int, int], bits: int) -> torch.Tensor:
    """The tokens of a grid along a Hilbert curve of 2^bits cells a side (J. Skilling, 2004), those outside left out."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    x = list(places.T.clone())
    half = 1 << (bits - 1)
    step = half
    while step > 1:
        rest = step - 1
        for i in range(3):
            inside, t = (x[i] & step) != 0, (x[0] ^ x[i]) & rest
            first = torch.where(inside, x[0] ^ rest, x[0] ^ t)
            if i:
                x[i] = torch.where(inside, x[i], x[i] ^ t)
            x[0] = first
        step >>= 1
    x[1] = x[1] ^ x[0]
    x[2] = x[2] ^ x[1]
    t, step = torch.zeros_like(x[0]), half
    while step > 1:
        t = torch.where((x[2] & step) != 0, t ^ (step - 1), t)
        step >>= 1
    key = torch.zeros_like(t)
    for bit in reversed(range(bits)):
        for i in range(3):
            key = (key << 1) | (((x[i] ^ t) >> bit) & 1)
    return places[key.argsort()].float()


def test_blocks_are_closer_together_than_along_a_hilbert_curve() -> None:
    curve = hilbert((4, 4, 4), 2)
    assert int((curve[1:] - curve[:-1]).abs().sum(1).max()) == 1, "the yardstick is a curve"
    grid = (21, 45, 80)
    frames = torch.cartesian_prod(*(torch.arange(n) for n in grid)).float()
    ours = spread(frames[token_order(grid).there])
    assert ours == pytest.approx(6.90, abs=0.01)
    assert spread(hilbert(grid, 7)) == pytest.approx(9.42, abs=0.01)
    assert spread(frames) == pytest.approx(528.7, abs=0.1)


@pytest.mark.parametrize("grid", [(21, 45, 80), (1, 45, 80), (5, 3, 7), (1, 1, 1), (3, 16, 8)])
@pytest.mark.parametrize("first_frame", [False, True])
@pytest.mark.parametrize("behind", [0, 50])
def test_orders_are_permutations(grid: tuple[int, int, int], first_frame: bool, behind: int) -> None:
    order = token_order(grid, behind, first_frame)
    video, frame = math.prod(grid), grid[1] * grid[2]
    tokens = torch.arange(video + behind)
    assert order.layout.num_tokens == len(tokens) and torch.equal(order.there.sort().values, tokens)
    assert torch.equal(order.there[video:], tokens[video:]), "what stands behind the video stays"
    x = torch.randn(2, video + behind + 5, 3)
    assert torch.equal(order.undo(order.apply(x)), x)
    assert torch.equal(order.video_in_frames(order.apply(x)), x[:, :video])
    kept = torch.zeros(order.layout.key_blocks, dtype=torch.bool)
    for start, end in order.layout.kept:
        kept[start:end] = True
    of_token = kept.repeat_interleave(BLOCK)[: len(tokens)]
    assert bool(of_token[video:].all())
    if first_frame and grid[0] > 1:
        assert torch.equal(order.there[:frame].sort().values, tokens[:frame]) and bool(of_token[:frame].all())
    else:
        assert not of_token[: video // BLOCK * BLOCK].any()


@pytest.mark.parametrize("ordered", [False, True])
def test_the_frames_of_a_part_of_the_tokens(ordered: bool) -> None:
    """Each frame's tokens come together from wherever they stand, and go back; what stands behind is no frame's."""
    grid, behind = (5, 12, 10), 40
    order, per_frame = token_order(grid, behind, True), 120
    frame = (order.there if ordered else torch.arange(640)).clone() // per_frame
    for first, tokens in ((0, 640), (0, 213), (213, 213), (426, 214), (610, 30)):
        here = frames_here(first, tokens, 5, per_frame, order if ordered else None)
        assert here.count == max(min(first + tokens, 600) - first, 0)
        if not here.count:
            continue
        mine = frame[first : first + here.count]
        assert (here.first, here.last) == (int(mine.min()), int(mine.max()) + 1)
        number = torch.arange(2 * here.count).view(2, -1, 1, 1)
        grouped = here.grouped(number)
        assert grouped.shape == (2 * (here.last - here.first), here.width, 1, 1)
        assert torch.equal(here.cut(grouped.flatten(2)), number.flatten(2))
        rows = here.row_of_token(torch.arange(10).view(2, 5))
        assert torch.equal(rows, torch.stack([mine, mine + 5]))
        of_frame = here.cut(torch.arange(here.first, here.last).repeat(2)[:, None, None].expand(-1, here.width, 1))
        assert torch.equal(of_frame[0, :, 0], mine), "a token stands in its own frame"


def test_the_window_knows_near_from_far() -> None:
    order = token_order((8, 16, 16), 20)
    apart = distances(order.layout, order.layout.key_blocks, BLOCK)
    assert torch.equal(apart.argmin(1)[:16], torch.arange(16))
    assert float(apart[0, :16].max()) > 10 and float(apart[0, 16]) == pytest.approx(1e3)


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "best"}, "one of coverage, density, window, calibrated"),
        ({"density": 0.0}, "density is a share above 0"),
        ({"coverage": 1.2}, "coverage is a share above 0"),
        ({"skip_first": 1.0}, "from 0 to below 1"),
        ({"bound": 0.0}, "a relative error above 0, or None"),
        ({"reuse": 0}, "reuse counts steps from 1"),
        ({"backend": "fa9"}, "unknown block-sparse attention backend 'fa9'"),
        ({"policy": "calibrated"}, "takes a calibration"),
    ],
)
def test_wrong_settings_get_a_sentence(change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Sparsity(**change)


def test_window_of_steps_and_blocks() -> None:
    balanced = presets()["balanced"]
    assert balanced.steps(40) == range(8, 38) and balanced.steps(4) == range(1, 3)
    assert [b for b in range(40) if not balanced.allows_block(b, 40)] == [0, 39]
    assert not Sparsity(dense_blocks=(7,)).allows_block(7, 40)
    bounds = [preset.bound for preset in presets().values()]
    assert list(presets()) == ["safe", "balanced", "fast"] and bounds == sorted(bounds)
    assert Attention(sparsity=balanced) == Attention(sparsity=Sparsity()) != Attention()


def test_backends_refuse_by_name() -> None:
    core = AttentionCore()
    q = torch.randn(1, 200, 2, 32)
    for name, words in (("fa4", "Hopper or Blackwell"), ("triton", "need a GPU|not installed")):
        sparsity = Sparsity(policy="density", backend=name, **EVERYWHERE)
        with pytest.raises(BackendUnavailableError, match=words):
            core(q, q, q, Attention(sparsity=sparsity))
    assert SPARSE.names == ("auto", "fa4", "triton", "masked")


# ---- the guarantee --------------------------------------------------------------------------------------------------


def look(error: float) -> tuple[Sample, Measured]:
    value = torch.tensor([[error]])
    return Sample(torch.tensor([1]), torch.tensor([0])), Measured(value, value, value)


def test_a_head_follows_its_error() -> None:
    control = HeadControl(3, 0.05, 0.1, CPU)
    assert torch.allclose(control.amount(0.9), torch.full((3,), 0.9))
    control.learn(*look(0.2))
    up = control.amount(0.9)
    assert float(up[1]) > 0.95 and up[0] == up[2] == pytest.approx(0.9), "only the head that was looked at moves"
    for _ in range(200):
        control.learn(*look(0.001))
    assert float(control.amount(0.9)[1]) == pytest.approx(0.1), "down to the least, not further"
    assert not control.dense.any()
    for _ in range(STRIKES):
        control.learn(*look(math.inf))
    assert control.dense.tolist() == [0, 1, 0]
    for _ in range(50):
        control.learn(*look(0.0))
    assert control.dense.tolist() == [0, 1, 0], "for the rest of the run"
    free = HeadControl(3, None, 0.1, CPU)
    free.learn(*look(0.9))
    assert torch.equal(free.slack, torch.ones(3))


def test_every_head_and_block_gets_its_turn() -> None:
    seen: set[int] = set()
    places = []
    for call in range(400):
        at = sample(call, HeadShare.whole(10), 40, CPU)
        assert len(at.heads) == 3
        seen |= set(at.heads.tolist())
        places += at.query_block[at.heads == 4].tolist()
    assert seen == set(range(10)) and len(set(places)) > 35
    assert sample(7, HeadShare.whole(10), 40, CPU, every_head=True).heads.tolist() == list(range(10))


def test_ranks_look_together_at_what_one_process_looks_at() -> None:
    order, alone = [3, 0, 7, 5, 1, 2, 6, 4], 0
    for call in range(12):
        for every in (False, True):
            whole = sample(call, HeadShare.whole(8), 40, CPU, every_head=every)
            seen = {}
            for rank in range(4):
                share = HeadShare.part(order, rank, 4)
                at = sample(call, share, 40, CPU, every_head=every)
                seen |= zip((share.heads[n] for n in at.heads), at.query_block.tolist(), strict=True)
                alone += not at.heads.numel()
            assert seen == dict(zip(whole.heads.tolist(), whole.query_block.tolist(), strict=True))
    assert alone, "a rank of two heads has none to look at in some calls"


def test_bound_holds_and_diffuse_heads_keep_everything() -> None:
    order = token_order((8, 12, 16))
    q, k, v = structured_qkv(order.layout.places, ("local", "strided", "sink", "diffuse"), 64)
    run = SparseRun(Sparsity(bound=0.05, **EVERYWHERE), 0, 1)
    for step in range(10):
        run.sparse(q, k, v, Step(step, 16), order.layout)
    density = run.calls[-1].density
    assert float(density[3]) == 1.0 and float(density[:3].max()) < 0.9, density
    errors = torch.cat([call.found.error.flatten() for call in run.calls])
    assert float((errors > 0.05).float().mean()) < 0.1
    loose = SparseRun(Sparsity(bound=0.3, **EVERYWHERE), 0, 1)
    for step in range(6):
        loose.sparse(q, k, v, Step(step, 16), order.layout)
    assert float(loose.calls[-1].density.mean()) < float(density.mean()), "a looser bound keeps less"


def test_a_head_that_cannot_meet_the_bound_goes_dense() -> None:
    """Static blocks on a head that looks at one place far away."""
    order = token_order((8, 12, 16))
    q, k, v = structured_qkv(order.layout.places, ("sink", "local"), 64)
    run = SparseRun(Sparsity(policy="window", density=0.2, bound=0.05, **EVERYWHERE), 0, 1)
    for step in range(12):
        run.sparse(q, k, v, Step(step, 12), order.layout)
    assert float(run.calls[-1].density[0]) == 1.0 > float(run.calls[-1].density[1])
    last = [call for call in run.calls if 0 in call.at.heads.tolist()][-1]
    assert float(last.found.error.max()) < 1e-5


def test_one_choice_for_some_steps() -> None:
    layout = BlockLayout(900)
    run = SparseRun(Sparsity(policy="density", density=0.4, bound=None, reuse=3, **EVERYWHERE), 0, 1)
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for step in range(6):
        for _ in range(2):  # two conditionings
            q, k, v = (torch.randn(1, 900, 2, 32, generator=generator) for _ in range(3))
            chosen.append(run.selected(q, k, v, Step(step, 6), layout)[1].blocks)
    same = [[chosen[i] is chosen[j] for j in range(12)] for i in range(12)]
    assert [row.index(True) for row in same] == [0, 1, 0, 1, 0, 1, 6, 7, 6, 7, 6, 7]


def test_a_choice_serves_the_conditioning_that_it_was_made_for() -> None:
    """A cache skips one of two passes; the other is then the first of its step."""
    run = SparseRun(Sparsity(policy="density", density=0.4, bound=None, reuse=3, **EVERYWHERE), 0, 1)
    generator = torch.Generator().manual_seed(0)
    chosen = {}
    for step, passes in enumerate(("cu", "u", "uc", "u", "c", "uc")):
        for name in passes:
            q, k, v = (torch.randn(1, 900, 2, 32, generator=generator) for _ in range(3))
            at = Step(step, 6, (name,))
            chosen[name, step] = run.selected(q, k, v, at, BlockLayout(900))[1].blocks
    for name, steps in (("c", (0, 2)), ("u", (0, 1, 2)), ("u", (3, 5)), ("c", (4, 5))):
        assert all(chosen[name, step] is chosen[name, steps[0]] for step in steps)
    assert len({blocks.data_ptr() for blocks in chosen.values()}) == 4
    assert len(run._kept) == 2, "what no step can use is freed"


# ---- the table ------------------------------------------------------------------------------------------------------


def test_calibrated_densities_are_used_and_saved() -> None:
    table = Calibration(10, ((2, 0, (0.2, 0.9)), (7, 0, (0.5, 0.5))))
    again = Calibration.from_json(table.to_json())
    assert again == table and hash(again) == hash(table) and table != Calibration(10, table.densities[:1])
    sparsity = Sparsity(policy="calibrated", calibration=again, bound=None, **EVERYWHERE)
    q, k, v = (torch.randn(1, 10 * BLOCK, 2, 32) for _ in range(3))
    counts = []
    for step, total in ((0, 10), (30, 40)):
        _, selection = SparseRun(sparsity, 0, 1).selected(q, k, v, Step(step, total), None)
        counts.append(selection.counts.float().mean((0, 2)).tolist())
    assert counts == [[2, 9], [5, 5]]
    _, other = SparseRun(sparsity, 3, 4).selected(q, k, v, Step(0, 10), None)
    assert bool((other.counts == 10).all()), "a block that the table does not hold"
    half = SparseRun(sparsity, 0, 1).selected(*(t[:, :, :1] for t in (q, k, v)), Step(0, 10), None, HeadShare((1,), 2))
    assert bool((half[1].counts == 9).all()), "the second of two ranks"
    with pytest.raises(InputError, match="for 2 heads, and this model has 1"):
        SparseRun(sparsity, 0, 1).selected(*(t[:, :, :1] for t in (q, k, v)), Step(0, 10), None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"format": "other", "version": 1}',
        "[1]",
        "[" * 100_000,
        '{"format": "wan_fp8.sparsity", "version": 1, "densities": [], "steps": 1e999}',
    ],
    ids=["empty", "nothing", "other", "list", "deep", "endless"],
)
def test_wrong_tables_get_a_sentence(text: str) -> None:
    with pytest.raises(InputError, match="not a table of densities"):
        Calibration.from_json(text)
