"""Block-sparse attention by itself: the eager paths on the CPU, the kernels in Triton's interpreter, settings, the
guarantee and its table. On a GPU the same cases run natively in tests/gpu/test_sparse_gpu.py."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

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
from wan_fp8.errors import BackendUnavailableError, InputError

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
    assert done.stdout.count("ok ") == 9


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
    assert torch.equal(order.video_in_blocks(x[:, :video]), order.apply(x)[:, :video])
    kept = torch.zeros(order.layout.key_blocks, dtype=torch.bool)
    for start, end in order.layout.kept:
        kept[start:end] = True
    of_token = kept.repeat_interleave(BLOCK)[: len(tokens)]
    assert bool(of_token[video:].all())
    if first_frame and grid[0] > 1:
        assert torch.equal(order.there[:frame].sort().values, tokens[:frame]) and bool(of_token[:frame].all())
    else:
        assert not of_token[: video // BLOCK * BLOCK].any()


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
        at = sample(call, 10, 40, CPU)
        assert len(at.heads) == 3
        seen |= set(at.heads.tolist())
        places += at.query_block[at.heads == 4].tolist()
    assert seen == set(range(10)) and len(set(places)) > 35
    assert sample(7, 10, 40, CPU, every_head=True).heads.tolist() == list(range(10))


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
    half = SparseRun(sparsity, 0, 1).selected(*(t[:, :, :1] for t in (q, k, v)), Step(0, 10), None, (1, 2))
    assert bool((half[1].counts == 9).all()), "the second of two ranks"
    with pytest.raises(InputError, match="for 2 heads, and this model has 1"):
        SparseRun(sparsity, 0, 1).selected(*(t[:, :, :1] for t in (q, k, v)), Step(0, 10), None)


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other", "version": 1}', "[1]"])
def test_wrong_tables_get_a_sentence(text: str) -> None:
    with pytest.raises(InputError, match="not a table of densities"):
        Calibration.from_json(text)
