"""What a forward needs, against a walk through it: the real model at the width of A14B, with kernels that only take
memory, under the arithmetic of PyTorch's caching allocator on a card that is full."""

from __future__ import annotations

import bisect
import dataclasses
import math
import sys
import types

import pytest
import torch
from torch._C._profiler import _EventType

from wan_fp8 import MagCache, Recipe, apply_magcache, apply_recipe, kernels
from wan_fp8.attention import AttentionCore
from wan_fp8.caching import Curve
from wan_fp8.gemm.core import GemmRunner
from wan_fp8.kernels import quantize, residual_norm, rms_rope
from wan_fp8.models import specs, wan
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.memory import OVERHEAD, forward_needs, rounding_bytes
from wan_fp8.models.passes import Conditioning, RunPosition
from wan_fp8.quant.linear import Quantization

MIB, GIB = 1 << 20, 1 << 30
LAYERS = 3
RESERVE = 400
"""MiB that core keeps free on Linux: ``EXTRA_RESERVED_VRAM``."""


class OutOfMemory(Exception):
    pass


class Allocator:
    """PyTorch's native one: segments of 2 or 20 MiB for small requests, of their own for large ones; the best fitting
    free block of the stream's; free neighbours are joined; whole free segments go back when there is no room."""

    def __init__(self, limit: float) -> None:
        self.limit, self.reserved, self.allocated, self.peak = limit, 0, 0, 0
        self.segments: dict[int, tuple[int, tuple, dict[int, list]]] = {}
        self.free: dict[tuple, list[tuple[int, int, int]]] = {}
        self._next = 0

    def take(self, size: int, stream: int = 0) -> tuple[int, int]:
        size = max(512, -(-size // 512) * 512)
        small = size <= MIB
        pool = (stream, small)
        free = self.free.setdefault(pool, [])
        at = bisect.bisect_left(free, (size, -1, -1))
        if at < len(free):
            whole, segment, start = free.pop(at)
        else:
            whole = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            if self.reserved + whole > self.limit:
                self.give_back()
            if self.reserved + whole > self.limit:
                raise OutOfMemory(f"{whole >> 20} MiB with {self.allocated >> 20} of {self.reserved >> 20} in use")
            segment, start = self._next, 0
            self._next += 1
            self.segments[segment] = (whole, pool, {})
            self.reserved += whole
        blocks, rest = self.segments[segment][2], whole - size
        split = rest >= 512 if small else rest > MIB
        if split:
            blocks[start + size] = [rest, False]
            bisect.insort(free, (rest, segment, start + size))
        blocks[start] = [size if split else whole, True]
        self.allocated += blocks[start][0]
        self.peak = max(self.peak, self.allocated)
        return segment, start

    def drop(self, block: tuple[int, int]) -> None:
        segment, start = block
        _, pool, blocks = self.segments[segment]
        free, size = self.free[pool], blocks.pop(start)[0]
        self.allocated -= size
        before = [s for s, (length, used) in blocks.items() if s + length == start and not used]
        for other in [*before, *([start + size] if start + size in blocks and not blocks[start + size][1] else [])]:
            length = blocks.pop(other)[0]
            free.remove((length, segment, other))
            size, start = size + length, min(start, other)
        blocks[start] = [size, False]
        bisect.insort(free, (size, segment, start))

    def give_back(self) -> None:
        for segment, (whole, pool, blocks) in list(self.segments.items()):
            if blocks == {0: [whole, False]}:
                self.free[pool].remove((whole, segment, 0))
                del self.segments[segment]
                self.reserved -= whole


def test_the_allocator_does_as_pytorch_does():
    memory = Allocator(60 * MIB)
    linear = memory.take(25 * MIB)
    assert (memory.allocated, memory.reserved) == (26 * MIB, 26 * MIB), "1 MiB is not split off"
    memory.drop(linear)
    memory.take(10 * MIB)
    assert memory.reserved == 26 * MIB and memory.allocated == 10 * MIB, "the rest of a free block"
    with pytest.raises(OutOfMemory, match="36 MiB"):
        memory.take(36 * MIB)
    assert rounding_bytes([25 * MIB, 13824 * 5120, 26 * MIB, 10 * MIB, 100]) == MIB + MIB // 2


# ---- kernels that only take memory ---------------------------------------------------------------------------------


def outputs(x, cast, dtype):
    """As the Triton kernels': values, and a scale for each row."""
    if cast is None or cast.granularity is None:
        return torch.empty(x.shape, dtype=dtype)
    rows = x.numel() // x.shape[-1]
    return quantize.QuantizedActivation(
        torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, 1), cast.granularity, dtype
    )


def attend(self, q, k, v, setting=None, step=None):
    torch.empty(q.shape[0], q.shape[2], q.shape[1])  # logarithms of the sums
    return torch.empty(q.shape, dtype=q.dtype)


def settle(x, branch, gate, table, row_of_token, *, eps, out_dtype, in_place, cast=None):
    stream = x if branch is None or in_place else torch.empty_like(x)
    return stream, None if table is None else outputs(x, cast, out_dtype)


def multiply(x, weight, scale, bias):
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)


def convolve(x, weight, bias=None, stride=1, *args, **kwargs):
    size = (n // s for n, s in zip(x.shape[2:], stride, strict=True))
    return torch.empty(x.shape[0], weight.shape[0], *size, dtype=x.dtype)


@pytest.fixture
def hollow(monkeypatch):
    """Nothing is computed, and host memory that nobody writes to costs nothing."""
    triton = types.ModuleType("wan_fp8.kernels._quantize_triton")
    triton.launch_quantize = lambda x, cast, gelu: outputs(x.contiguous(), cast, x.dtype)
    monkeypatch.setitem(sys.modules, triton.__name__, triton)
    monkeypatch.setattr(sys.modules["wan_fp8.kernels"], "_quantize_triton", triton, raising=False)
    monkeypatch.setattr(kernels, "select", lambda *args: True)
    monkeypatch.setattr(quantize, "_use_triton", lambda x, fused: True)
    monkeypatch.setattr(residual_norm, "fused", settle)
    monkeypatch.setattr(rms_rope, "fused_", lambda x, *args, **kwargs: x)
    monkeypatch.setattr(Quantization, "runner", lambda self, device, dtype: GemmRunner(multiply))
    monkeypatch.setattr(AttentionCore, "forward", attend)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: multiply(x, w, None, b))
    monkeypatch.setattr(torch.nn.functional, "conv3d", convolve)
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate="none": x)  # on a GPU: the GEMM's
    with torch.inference_mode():
        yield


def model_of(recipe: str | None, layers: int = LAYERS):
    spec = dataclasses.replace(specs.T2V_A14B, num_layers=layers)
    made = None if recipe is None else Recipe(recipe, backend="reference")
    with torch.device("meta"):
        net = wan.build_model(spec)
    state = {}
    for name, meta in net.state_dict().items():
        layer = name.removesuffix(".weight")
        converted = made is not None and layer != name and made.converts(layer)
        state[name] = torch.empty(meta.shape, dtype=torch.float8_e4m3fn if converted else torch.bfloat16)
        if converted:
            state[f"{layer}.weight_scale"] = torch.ones(meta.shape[0], 1)
            net.get_submodule(layer).weight_scale = torch.nn.Parameter(
                torch.ones(meta.shape[0], 1), requires_grad=False
            )
    net.load_state_dict(state, assign=True)
    return net.eval() if made is None else apply_recipe(net.eval(), made)


def walked(run) -> list[tuple[int, int]]:
    """Address and bytes of every tensor that is made and, below zero, dropped, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    found, waiting = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda one: one[0])]


def forwards(net, shape, prompts: int, turns: int = 2, **options) -> list[tuple[int, int]]:
    """A run's first steps: every prompt in turn."""
    x, t = torch.zeros(shape, dtype=torch.bfloat16), torch.full((shape[0],), 500.0)
    contexts = [torch.zeros(shape[0], 512, 4096, dtype=torch.bfloat16) for _ in range(prompts)]

    def run():
        for step in range(turns):
            for index, context in enumerate(contexts):
                made = {name: make(step, index) for name, make in options.items()}
                net(x, t, context=context, options=ForwardOptions(**made))

    return walked(run)


def replay(events, memory: Allocator) -> None:
    live = {}
    for address, size in events:
        if size > 0:
            live[address] = memory.take(size)
        elif address in live:
            memory.drop(live.pop(address))


def peak_of(events) -> int:
    memory = Allocator(math.inf)
    replay(events, memory)
    return memory.peak


# ---- what is told to the host --------------------------------------------------------------------------------------

SIZES = {
    "832x480, 81 frames": ([1, 16, 21, 60, 104], 2),
    "832x480, 33 frames, guidance in one batch": ([2, 16, 9, 60, 104], 1),
    "832x480, 17 frames": ([1, 16, 5, 60, 104], 2),
    "one small picture": ([1, 16, 1, 32, 32], 2),
}


@pytest.mark.parametrize(("size", "recipe"), [*((size, "rowwise") for size in SIZES), ("832x480, 17 frames", None)])
def test_a_card_that_is_full_of_weights_has_room_for_a_forward(hollow, size, recipe):
    """With what ``memory_required`` tells core, half of what core keeps free besides (the rest is for streamed weights
    on their way and the workspace of the GEMM library), and up to 1 GiB more: more room is not always better for an
    allocator that leaves pieces."""
    (shape, prompts), net = SIZES[size], model_of(recipe)
    events = forwards(net, shape, prompts)
    told = forward_needs(net.spec, shape, torch.bfloat16, quantized=recipe is not None)
    weights = [parameter.nbytes for parameter in net.parameters()]
    rounding = rounding_bytes(weights)
    lowest = peak_of(events)
    assert lowest <= told.total <= 1.35 * lowest, (lowest / GIB, told)
    assert lowest >= told.text + max(told.blocks, told.time) / OVERHEAD * 0.98, "every term of it is needed"
    for more in range(0, 1024, 128):
        memory = Allocator(sum(weights) + rounding + told.total + (RESERVE // 2 + more) * MIB)
        for weight in weights:
            memory.take(weight)
        replay(events, memory)


def test_a_cache_of_steps_keeps_what_is_told(hollow):
    shape, net = [1, 16, 5, 60, 104], model_of("rowwise", layers=2)
    plain = peak_of(forwards(net, shape, 2))
    schedule = tuple(1 - step / 20 for step in range(21))
    curve = Curve(
        name="a", task="t2v", sigmas=schedule[:20], cond=(1.0,) * 20, uncond=(1.0,) * 20, switch=None, source="b"
    )
    apply_magcache(net, MagCache(threshold=0.0, max_skips=0, curve=curve))

    def position(step, index):
        return RunPosition(schedule=schedule, sigma=schedule[step], conditionings=(Conditioning(index, index),))

    with_it = peak_of(forwards(net, shape, 2, position=position))
    told = [forward_needs(net.spec, shape, torch.bfloat16, quantized=True, kept_residuals=n).total for n in (0, 1)]
    assert with_it - plain <= told[1] - told[0] + 4 * MIB


def test_text_is_kept_in_one_piece_for_each_kind(hollow):
    net = model_of("rowwise", layers=3)
    forwards(net, [1, 16, 1, 32, 32], 2, turns=1)
    for kept in net._text_cache._kept.values():
        rows = [kept.value._blocks[index] for index in range(3)]
        for kind in range(2):
            storages = {row[kind].untyped_storage().data_ptr() for row in rows}
            assert len(storages) == 1 and all(row[kind].is_contiguous() for row in rows)


def test_a_small_picture_needs_the_time_projection():
    """0.6 GiB of fp32 weights, whatever the number of tokens."""
    needs = forward_needs(specs.T2V_A14B, [1, 16, 1, 32, 32], torch.bfloat16)
    assert needs.time > needs.blocks and needs.time == int(OVERHEAD * (256 * 4 * 5120 + 6 * 4 * 5120**2))
    assert needs.total == needs.time + needs.text
