"""Compile the Triton kernels for GPUs that are not here, as their launchers launch them.

The launchers run on tensors without memory, of the sizes of a 14B model at 720p (75,648 tokens, 40 heads of 128), and
each launch is taken down instead of being made: types, constants, alignment, warps and stages are those of a GPU. What
the transformer's compiled parts launch (``opened``) has the arguments that torch.compile gives: what it keeps open for
every number of tokens is an int64 of unknown divisors, and a number that is no constant would be float64. Attention is
never compiled by torch, so that the numbers of its kernels (``scale``, ``dense_from``) are fp32.

Of each kernel: no instruction in float64, NaN kept where it casts to e4m3, products on the tensor cores, shared and
tensor memory that the GPU has, registers without spills.

Run by ``test_kernels_compile.py`` in a process of its own, where Triton can be imported. By hand, every type and mode:
``PYTHONPATH=.host/triton .host/venv/bin/python tests/unit/compile_kernels.py --all [capability ...] [word ...]``
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from wan_fp8.attention.sparse import BLOCK, BlockLayout, Selection
from wan_fp8.attention.sparse import _forward_triton as sparse_forward
from wan_fp8.attention.sparse import _guarantee_triton as sparse_guarantee
from wan_fp8.attention.sparse import _remainder_triton as sparse_remainder
from wan_fp8.attention.sparse import _selection_triton as sparse_selection
from wan_fp8.attention.sparse.remainder import Remainder
from wan_fp8.kernels import _attention_cast_triton as attention_cast
from wan_fp8.kernels import _low_rank_triton as low_rank
from wan_fp8.kernels import parts as layout
from wan_fp8.kernels import residual_norm, rms_rope
from wan_fp8.kernels._quantize_triton import launch_amax, launch_quantize
from wan_fp8.kernels.quantize import E4M3, Cast, Granularity, QuantizedActivation
from wan_fp8.kernels.residual_norm import NormTable

TOKENS, HEADS, WIDTH, FFN = 75_648, 40, 128, 13_824
DIM = HEADS * WIDTH
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that a program may ask for, by compute capability."""
TENSOR_COLUMNS = 512
"""Of the tensor memory of capability 10.0."""
TENSOR_CORES = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
"""Their instructions."""
FP8 = (89, 90, 100, 120)
"""Those that multiply in FP8."""
EVERY = (80, *FP8)
OPEN = ("rows", "tokens", "scale_stride")
"""Arguments that come from the number of tokens."""
SPILLS = 64
"""Bytes, stored and loaded, that a thread may put aside."""
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch that was not made."""

    kernel: JITFunction
    args: tuple[object, ...]
    options: dict[str, object]


@dataclass(frozen=True, slots=True)
class Case:
    """A launcher and its arguments."""

    name: str
    launch: Callable[[], object]
    quick: tuple[int, ...] = ()
    """Capabilities that the test suite compiles for."""
    all: tuple[int, ...] = FP8
    """Those that it runs on."""
    opened: bool = False
    """Launched from parts that torch.compile may compile."""


@contextlib.contextmanager
def taken_down() -> Iterator[list[Launch]]:
    """What is launched inside."""
    launches: list[Launch] = []
    plain = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **options: launches.append(Launch(self, args, options))
    try:
        yield launches
    finally:
        JITFunction.run = plain


# ---- what is launched ------------------------------------------------------------------------------------------------


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def attend_sparsely(
    dtype: torch.dtype, batch: int = 1, tokens: int = TOKENS, heads: int = HEADS, width: int = WIDTH, sums=False
):
    """Queries and keys are views that leave padding out."""
    rows = -(-tokens // BLOCK)
    q, k, v = (empty(batch, tokens + 48, heads, width, dtype=dtype)[:, :tokens] for _ in range(3))
    blocks = (empty(batch, heads, rows, dtype=torch.int32), empty(batch, heads, rows, rows, dtype=torch.int32))
    sparse_forward.forward(q, k, v, Selection(*blocks, tokens, tokens), sums)


def look_at_samples(dtype: torch.dtype, samples: int = 10, tokens: int = TOKENS):
    k, v = (empty(1, tokens, HEADS, WIDTH, dtype=dtype) for _ in range(2))
    kept = empty(1, samples, -(-tokens // BLOCK), dtype=torch.bool)
    q = empty(1, samples, 64, WIDTH, dtype=dtype)
    sparse_guarantee.attend(q, k, v, kept, empty(samples, dtype=torch.int64))


def add_remainder(dtype: torch.dtype, tokens: int = TOKENS, query_rows: int = BLOCK):
    rows, every = -(-tokens // query_rows), -(-tokens // BLOCK)
    blocks = (empty(1, HEADS, rows, dtype=torch.int32), empty(1, HEADS, rows, every, dtype=torch.int32))
    means = (empty(1, HEADS, every, WIDTH) for _ in range(2))
    q, out = empty(1, tokens + 48, HEADS, WIDTH, dtype=dtype)[:, :tokens], empty(1, tokens, HEADS, WIDTH, dtype=dtype)
    selection = Selection(*blocks, tokens, tokens, query_rows)
    sparse_remainder.add_(out, empty(1, HEADS, tokens), q, Remainder(*means, empty(every)), selection)


def choose_blocks(rule: str, query_rows: int = BLOCK, tokens: int = TOKENS, heads: int = HEADS, kept=((590, 591),)):
    rows, every = -(-tokens // query_rows), -(-tokens // BLOCK)
    scores = empty(1, heads, rows, every)
    dense = empty(heads, dtype=torch.int32)
    sparse_selection.choose(scores, empty(heads), dense, rule, BlockLayout(tokens, kept), query_rows, 0.9)


def cast_of(granularity: Granularity | None, power_of_2: bool = False, collect: bool = False) -> Cast:
    scaled = granularity is Granularity.TENSOR
    return Cast(
        granularity,
        power_of_2,
        empty(1) if scaled else None,
        empty(1) if scaled else None,
        empty(1) if collect else None,
    )


def named(granularity: Granularity | None, power_of_2: bool, collect: bool) -> str:
    return f"{granularity}{' powers of 2' if power_of_2 else ''}{' collect' if collect else ''}"


def norm(stream: torch.dtype, cast: Cast | None, *, modulated=True, rows=False, gated=True, add=True, only_add=False):
    x, branch = empty(1, TOKENS, DIM, dtype=stream), empty(1, TOKENS, DIM, dtype=BF16) if add else None
    table = None if only_add else NormTable(empty(31, DIM), empty(31, DIM), modulated)
    row_of_token = empty(1, TOKENS, dtype=torch.int64) if rows else None
    residual_norm.fused(
        x, branch, empty(31, DIM) if gated else None, table, row_of_token, eps=1e-6, out_dtype=BF16, in_place=True,
        cast=cast,
    )  # fmt: skip


def rotate(dtype: torch.dtype, rope: bool = True, parts: int = 1, ordered: bool = False):
    angles = (empty(TOKENS, WIDTH // 2), empty(TOKENS, WIDTH // 2)) if rope else None
    x, gain = empty(1, TOKENS, DIM, dtype=dtype), empty(DIM, dtype=dtype)
    heads = empty(DIM // WIDTH, dtype=torch.int64) if ordered else None
    rms_rope.fused_(x, gain, angles, head_dim=WIDTH, eps=1e-6, parts=parts, heads=heads)


def move(dtype: torch.dtype, ordered: bool, back: bool):
    heads = empty(DIM // WIDTH, dtype=torch.int64) if ordered else None
    if back:
        layout.join(empty(1, 8, TOKENS, DIM // 8, dtype=dtype), heads, head_dim=WIDTH, fused=True)
    else:
        layout.cut(empty(1, TOKENS, DIM, dtype=dtype), 8, heads, head_dim=WIDTH, fused=True)


def project(granularity: Granularity, rank: int, dtype: torch.dtype = BF16, dim: int = DIM):
    shape = {Granularity.ROW: (TOKENS, 1), Granularity.TENSOR: (1,), Granularity.BLOCK: (dim // 128, TOKENS)}
    x = QuantizedActivation(empty(1, TOKENS, dim, dtype=E4M3), empty(*shape[granularity]), granularity, dtype)
    low_rank.launch_project(x, empty(rank, dim, dtype=dtype))


def add_low_rank(rank: int, dtype: torch.dtype = BF16, dim: int = FFN):
    low_rank.launch_add(
        empty(1, TOKENS, dim, dtype=dtype), empty(TOKENS, rank, dtype=dtype), empty(dim, rank, dtype=dtype)
    )


def cast_for_attention(dtype: torch.dtype, smooth: bool = True):
    x = empty(1, TOKENS + 48, HEADS, WIDTH, dtype=dtype)[:, :TOKENS]
    attention_cast.cast(x, *attention_cast.statistics(x, smooth))


def cases() -> Iterator[Case]:
    """Sparse attention, FP8 attention, linears, norms; the first of a kind is in the test suite."""
    ROW, TENSOR, BLOCKS = Granularity.ROW, Granularity.TENSOR, Granularity.BLOCK
    for dtype in (BF16, FP16, FP32):
        quick = FP8 if dtype is BF16 else ()
        name = str(dtype).removeprefix("torch.")
        yield Case(f"sparse forward {name}", lambda d=dtype: attend_sparsely(d), quick, EVERY)
        yield Case(f"sparse samples {name}", lambda d=dtype: look_at_samples(d), quick[::2], EVERY)
        if dtype is not FP32:  # there it spills half a kilobyte: right, and slow as fp32 is
            yield Case(f"sparse forward with sums {name}", lambda d=dtype: attend_sparsely(d, sums=True), (), EVERY)
        yield Case(f"sparse remainder {name}", lambda d=dtype: add_remainder(d), quick[-1:], EVERY)
        yield Case(f"sparse remainder, 256 rows {name}", lambda d=dtype: add_remainder(d, query_rows=256), (), EVERY)
        yield Case(f"sparse samples of every head {name}", lambda d=dtype: look_at_samples(d, HEADS), (), EVERY)
        yield Case(
            f"sparse block statistics {name}",
            lambda d=dtype: sparse_selection.statistics(empty(1, TOKENS, HEADS, WIDTH, dtype=d), TOKENS, BLOCK),
            (90,) if quick else (), EVERY,
        )  # fmt: skip
        yield Case(
            f"sparse block statistics of 256 rows {name}",
            lambda d=dtype: sparse_selection.statistics(empty(1, TOKENS, HEADS, WIDTH, dtype=d), TOKENS, 2 * BLOCK),
            (100,) if quick else (), EVERY,
        )  # fmt: skip
    for width in (64, 32, 16):
        yield Case(f"sparse forward width {width}", lambda w=width: attend_sparsely(BF16, 2, width=w), (), EVERY)
    # sizes of 1 become constants
    yield Case("sparse forward of one token", lambda: attend_sparsely(BF16, 1, 1, 1), (), EVERY)
    yield Case("sparse samples of one block", lambda: look_at_samples(BF16, 1, 1), (), EVERY)
    yield Case("sparse choice of one block", lambda: choose_blocks("count", BLOCK, 1, 1, ((0, 1),)), (), EVERY)
    yield Case("sparse choice by mass", lambda: choose_blocks("mass"), (89,), EVERY)
    yield Case("sparse choice by number", lambda: choose_blocks("count"), (), EVERY)
    yield Case("sparse choice for 256 rows", lambda: choose_blocks("count", 2 * BLOCK), (100,), EVERY)

    for dtype in (BF16, FP16, FP32):
        name, quick = str(dtype).removeprefix("torch."), (90,) if dtype is BF16 else ()
        yield Case(f"cast for attention {name}", lambda d=dtype: cast_for_attention(d), quick)
        yield Case(f"cast for attention, not smooth {name}", lambda d=dtype: cast_for_attention(d, False))
        yield Case(
            f"mean of v {name}",
            lambda d=dtype: attention_cast.add_rows_(empty(1, TOKENS, HEADS, WIDTH, dtype=d), empty(1, HEADS, WIDTH)),
            quick,
        )

    def linear(
        name: str, launch: Callable[[], object], quick: tuple[int, ...] = (), all: tuple[int, ...] = FP8
    ) -> Case:
        return Case(name, launch, quick, all, opened=True)

    for granularity, rank, quick in (
        (ROW, 64, (89, 90, 100)),
        (TENSOR, 16, ()),
        (BLOCKS, 32, (90,)),
        (ROW, 256, ()),
        (BLOCKS, 256, ()),
    ):
        yield linear(f"low rank down {granularity} {rank}", lambda g=granularity, r=rank: project(g, r), quick)
    yield linear("low rank down fp16", lambda: project(ROW, 64, FP16))
    yield linear("low rank down of 13,824", lambda: project(ROW, 128, BF16, FFN))
    for rank, dtype, quick in ((64, BF16, FP8[::2]), (16, BF16, ()), (256, BF16, ()), (64, FP16, ())):
        yield linear(f"low rank up {rank} {dtype}", lambda r=rank, d=dtype: add_low_rank(r, d), quick, EVERY)

    for granularity, power_of_2, quick in (
        (ROW, False, (89,)),
        (TENSOR, False, ()),
        (BLOCKS, False, ()),
        (BLOCKS, True, (90,)),
    ):
        for collect in (False, True):
            for gelu, dim in ((True, FFN), (False, DIM)):
                for dtype in (BF16, FP16, FP32):
                    first = dtype is BF16 and gelu and collect == (granularity is not ROW)
                    yield linear(
                        f"quantize {named(granularity, power_of_2, collect)} {dim} {dtype}",
                        lambda g=granularity, p=power_of_2, c=collect, a=gelu, n=dim, d=dtype: launch_quantize(
                            empty(1, TOKENS, n, dtype=d), cast_of(g, p, c), a
                        ),
                        quick if first else (),
                    )
    yield linear("largest", lambda: launch_amax(empty(1, TOKENS, FFN, dtype=BF16), True, None), (120,), EVERY)

    for stream in (FP32, BF16):
        name = str(stream).removeprefix("torch.")
        for granularity, power_of_2, quick in (
            (None, False, (100,)),
            (ROW, False, (89,)),
            (TENSOR, False, (120,)),
            (BLOCKS, False, ()),
            (BLOCKS, True, (90,)),
        ):
            for collect in (False, True):
                cast = cast_of(granularity, power_of_2, collect)
                what = f"{named(granularity, power_of_2, collect)} {name}"
                first = stream is FP32 and collect == (granularity not in (ROW, None))
                targets = FP8 if granularity else EVERY
                yield linear(f"norm {what}", lambda s=stream, c=cast: norm(s, c), quick if first else (), targets)
                yield linear(f"norm rows {what}", lambda s=stream, c=cast: norm(s, c, rows=True), (), targets)
        yield linear(
            f"norm rows {name}", lambda s=stream: norm(s, None, rows=True), (89,) if stream is FP32 else (), EVERY
        )
        yield linear(f"affine norm {name}", lambda s=stream: norm(s, None, modulated=False, gated=False), (), EVERY)
        yield linear(f"norm alone {name}", lambda s=stream: norm(s, cast_of(ROW), add=False, gated=False))
        yield linear(f"sum alone {name}", lambda s=stream: norm(s, None, only_add=True), (), EVERY)

    for dtype in (BF16, FP16, FP32):
        quick = (90,) if dtype is BF16 else ()
        yield linear(f"rms and rope {dtype}", lambda d=dtype: rotate(d), quick, EVERY)
        yield linear(f"rms {dtype}", lambda d=dtype: rotate(d, rope=False), (), EVERY)
        yield linear(f"rms and rope in 8 parts {dtype}", lambda d=dtype: rotate(d, parts=8), (), EVERY)
        yield linear(
            f"rms and rope, 8 parts, ordered {dtype}", lambda d=dtype: rotate(d, parts=8, ordered=True), quick, EVERY
        )
        for ordered, back in itertools.product((False, True), (False, True)):
            what = f"{'join' if back else 'cut'}{', ordered' if ordered else ''} {dtype}"
            yield linear(what, lambda d=dtype, o=ordered, b=back: move(d, o, b), quick if ordered else (), EVERY)


# ---- compiling -------------------------------------------------------------------------------------------------------


def compile_for(launch: Launch, capability: int, opened: bool) -> str:
    """Check one kernel; what it takes, in words."""
    kernel, target = launch.kernel, GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, types, _ = bind(*launch.args, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(backend, launch.options, bound, types, None)
    if opened:
        for place, (name, value) in enumerate(bound.items()):
            if name in OPEN or (isinstance(value, float) and not kernel.params[place].is_constexpr):
                signature[name] = "i64" if name in OPEN else "fp64"
                constants.pop((place,), None)
                attributes.pop((place,), None)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=target, options=options.__dict__)
    log, name = printed.getvalue(), f"{kernel.__name__} for {capability}"
    registers = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers and spilled, f"{name}: ptxas says {log!r}"
    stored, loaded = map(int, spilled.groups())
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    assert ".f64" not in ptx, f"{name} computes in float64"
    if re.search(r"cvt\S*\.e4m3x2\.f", ptx):  # it writes e4m3: the clamp before it must not lose a NaN
        clamps = "max.NaN.f32" in ptx and "min.NaN.f32" in ptx  # one instruction for both sides from 9.0 on
        assert clamps or "min.NaN.xorsign.abs.f32" in ptx, f"{name} clamps NaN away"
    if "tt.dot" in compiled.asm["ttir"] and launch.options.get("PRECISION") != "ieee":
        assert TENSOR_CORES[capability] in ptx, f"{name} multiplies outside the tensor cores"
    assert shared <= SHARED[capability] * 1024, (
        f"{name}: {shared:,} bytes of shared memory, more than {SHARED[capability]} KiB"
    )
    assert compiled.metadata.tmem_size <= TENSOR_COLUMNS, f"{name}: {compiled.metadata.tmem_size} tensor columns"
    assert stored + loaded <= SPILLS, f"{name} spills: {stored} bytes stored, {loaded} loaded"
    return (
        f"{kernel.__name__} {capability}: {registers[1]} registers, {compiled.metadata.num_warps} warps, "
        f"{shared:,} bytes shared" + (f", {stored} + {loaded} bytes spilled" if stored + loaded else "")
    )


def main(words: list[str]) -> int:
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True
    whole, only = "--all" in words, [int(word) for word in words if word.isdigit()]
    words = [word for word in words if word != "--all" and not word.isdigit()]
    failed = 0
    for case in cases():
        targets = [one for one in (case.all if whole else case.quick) if not only or one in only]
        if not targets or not all(word in case.name for word in words):
            continue
        with taken_down() as launches:
            case.launch()
        assert launches, case.name
        ways = [True, False] if case.opened and whole else [case.opened]
        for launch, capability, opened in itertools.product(launches, targets, ways):
            began = time.perf_counter()
            try:
                said = "ok " + compile_for(launch, capability, opened)
            except Exception as error:  # a list of all that is wrong is worth more than the first one
                failed += 1
                said = f"FAILED {launch.kernel.__name__} {capability}: {type(error).__name__}: {str(error)[:400]}"
            print(f"{said} ({case.name}{', opened' * opened}, {time.perf_counter() - began:.1f} s)", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
