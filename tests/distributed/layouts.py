"""Cases that every rank of a world runs (see ``world``): each layout against the same model in one process.

The reference is a twin that every rank runs by itself. In fp64 the layouts differ from it by rounding of 1e-16, which
all but never moves a value across a step of FP8: a scale that is not one GPU's shows at once. fp32 and bf16 say what
users get, where a sum in another order may move single values by one step of FP8.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from torch import Tensor

import wan_fp8
from wan_fp8.attention import Attention, AttentionCore, Sparsity, Step, attention_cores, sparsity_report
from wan_fp8.attention.sparse.report import SparseReport
from wan_fp8.caching import Conditioning, Curve, EasyCache, MagCache, RunPosition, apply_cache, apply_magcache, cache_of
from wan_fp8.errors import InputError
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.low_rank import LiveLora, LiveTerm
from wan_fp8.models.specs import ModelSpec, Task
from wan_fp8.models.vae import VAESpec, WanVAE
from wan_fp8.models.vae22 import VAE22Spec, Wan22VAE
from wan_fp8.models.wan import WanModel, build_model
from wan_fp8.parallel import ParallelDims, layout_of, parallelize, remove_parallel
from wan_fp8.parallel import vae as vae_groups
from wan_fp8.parallel.plan import Workload, sent_bytes
from wan_fp8.parallel.vae import SplitVAE
from wan_fp8.quant import Recipe
from wan_fp8.sampling import sigmas

HEADS, WIDTH, TEXT = 12, 192, 64
GRID = (3, 6, 10)
"""Latent frames, rows and columns: 45 tokens."""
DEVICE = "cpu"
BACKEND = "reference"
"""Who multiplies in FP8. ``nccl_layouts`` sets these for a GPU."""
STEPS = 10
SCHEDULE = tuple(sigmas(STEPS, 3.0, "euler").tolist())
COND, UNCOND = Conditioning("c", 0), Conditioning("u", 1)
PER_TENSOR = ("DelayedScaling", "Float8CurrentScaling")
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative L2 error of a velocity. fp64 with FP8 rounds to fp32 before each cast."""
FP8_TOLERANCE = {torch.float64: 1e-7, torch.float32: 5e-3, torch.bfloat16: 3e-2}

LAYOUTS: dict[int, dict[str, ParallelDims]] = {
    2: {
        "ulysses 2": ParallelDims(ulysses=2),
        "ring 2": ParallelDims(ring=2),
        "ring 2, passed around": ParallelDims(ring=2, merge=True),
        "cfg 2": ParallelDims(cfg=2),
        "ulysses 2, sharded": ParallelDims(ulysses=2, shard=2),
        "cfg 2, sharded": ParallelDims(cfg=2, shard=2),
    },
    3: {
        "ulysses 3": ParallelDims(ulysses=3),
        "ring 3": ParallelDims(ring=3),
        "ring 3, passed around": ParallelDims(ring=3, merge=True),
        "ulysses 3, sharded": ParallelDims(ulysses=3, shard=3),
    },
    4: {
        "ulysses 2 x ring 2": ParallelDims(ulysses=2, ring=2),
        "ulysses 2 x ring 2, passed around": ParallelDims(ulysses=2, ring=2, merge=True),
        "cfg 2 x ulysses 2": ParallelDims(cfg=2, ulysses=2),
        "cfg 2 x ulysses 2, sharded": ParallelDims(cfg=2, ulysses=2, shard=4),
        "ulysses 4, sharded inside pairs": ParallelDims(ulysses=4, shard=2),
    },
}


EVERYWHERE = {"skip_first": 0.0, "skip_last": 0.0, "skip_first_blocks": 0, "skip_last_blocks": 0}
SPARSE = (
    (Task.TI2V, "none", 1, Sparsity(coverage=0.8, bound=0.2, **EVERYWHERE)),
    (Task.T2V, "rowwise", 2, Sparsity(policy="density", density=0.5, bound=0.3, reuse=2, remainder=True, **EVERYWHERE)),
    (Task.T2V, "none", 1, Sparsity(policy="window", density=0.4, bound=None, **EVERYWHERE)),
)
"""Task, recipe, batch and setting of sparse runs."""

CHANNELS = {Task.T2V: (16, 16), Task.I2V: (36, 16), Task.TI2V: (48, 48), Task.ANIMATE: (36, 16), Task.S2V: (16, 16)}


def spec(task: Task) -> ModelSpec:
    channels, layers = CHANNELS[task], 5 if task in EXTENDED else 2
    return ModelSpec(
        task=task, dim=WIDTH, ffn_dim=256, num_heads=HEADS, num_layers=layers, in_dim=channels[0], out_dim=channels[1],
        text_dim=TEXT,
    )  # fmt: skip


EXTENDED = (Task.ANIMATE, Task.S2V)


class MeanColour(torch.nn.Module):
    """In place of Animate's motion encoder, which takes seconds a frame on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, faces: Tensor) -> Tensor:
        self.calls += 1
        return faces.transpose(1, 2).flatten(3).std(3).repeat(1, 1, 171)[..., :512] - 0.5


def extended_inputs(task: Task, batch: int, grid: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """What Animate and S2V are told beside latents and text; no two samples the same."""
    generator = torch.Generator().manual_seed(4)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(DEVICE, dtype)

    frames, rows, columns = grid
    if task is Task.ANIMATE:
        faces = torch.rand(batch, 3, 4 * frames - 7, 512, 512, generator=generator).to(DEVICE, dtype)
        return {
            "clip_fea": randn(9, 1280),
            "pose_latents": randn(16, frames - 1, rows, columns),
            "face_pixel_values": faces,
        }
    return {
        "audio_embed": randn(25, 1024, 4 * frames),
        "reference_latent": randn(16, 1, rows, columns),
        "reference_motion": randn(16, 19, rows, columns),
        "control_video": randn(16, frames, rows, columns),
    }


def check_extended(
    dims: ParallelDims,
    task: Task,
    recipe: str,
    batch: int,
    dtype: torch.dtype = torch.float64,
    sparsity: Sparsity | None = None,
) -> None:
    """Tokens of a rank begin and end inside a latent frame, and of S2V the last rank has few of the video: the same as
    one process; faces and sounds are encoded once for all steps. With sparse attention a rank has some tokens of many
    frames."""
    grid = (3, 8, 10) if sparsity is None else (4, 16, 18)
    given, results = extended_inputs(task, batch, grid, dtype), []
    for layout in (None, dims):
        model = model_of(task, dtype, recipe)
        if task is Task.ANIMATE:
            model.motion_encoder = MeanColour()
        else:
            model.casual_audio_encoder.weights.data.abs_()
        if layout is not None:
            parallelize(model, layout)
        if sparsity is not None:
            wan_fp8.set_attention(model, Attention(sparsity=sparsity))
        video = Video(task, batch, grid)
        made = []
        for step in range(2):
            time, text = video.timestep(step, slice(None)), video.context.to(dtype)
            made.append(model(video.x[step].to(dtype), time, context=text, **given).clone())
        results.append(made)
        if sparsity is not None:
            (report,) = sparsity_report(model)
            assert report.heads == spec(task).num_layers * HEADS and 0 < report.density < 1
            assert report.ranks == (1 if layout is None else dims.ulysses)
        if task is Task.ANIMATE:
            assert model.motion_encoder.calls == 1
    same_on_every_rank(results[1][-1])
    close(results[1], results[0], bound_of(recipe, dtype))


def model_of(task: Task, dtype: torch.dtype, recipe: str = "none") -> WanModel:
    """The same weights on every call and rank."""
    with torch.inference_mode(False):
        model = build_model(spec(task)).to(dtype)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                value = 1 + 0.2 * value
            elif parameter.ndim > 1 and "modulation" not in name:
                value = value / math.sqrt(parameter[0].numel())
            else:
                value = 0.3 * value
            parameter.data.copy_(value)
        model.to(DEVICE)
        if recipe != "none":
            wan_fp8.apply_recipe(model, Recipe(recipe, backend=BACKEND if dtype != torch.float64 else "reference"))
    return model


class Video:
    """Inputs of one sampling run."""

    def __init__(self, task: Task, batch: int, grid: tuple[int, int, int] | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.task, self.batch, self.grid = task, batch, grid or GRID
        self.x = torch.randn(STEPS, batch, spec(task).in_dim, *self.grid, generator=generator).to(DEVICE)
        self.context = torch.randn(batch, 7, TEXT, generator=generator)
        # one row decides the maximum of each prompt, so that it is the same whether prompts are cast apart or together
        self.context[:, 0] = 20 * torch.randn(TEXT, generator=generator)
        self.context = self.context.to(DEVICE)

    def timestep(self, step: int, rows: slice) -> Tensor:
        now = 1000 * SCHEDULE[step]
        one = [0.0, *[now] * (self.grid[0] - 1)] if self.task == Task.TI2V else now
        return torch.tensor([one] * self.batch, device=DEVICE)[rows]

    def forward(
        self, model: WanModel, step: int, /, rows: slice = slice(None), *parts: Conditioning, **options
    ) -> Tensor:
        position = None
        if parts:
            position = RunPosition(sigma=SCHEDULE[step], schedule=SCHEDULE, conditionings=parts)
        given = ForwardOptions(position=position, text_key=(rows.start, rows.stop), **options)
        return model(self.x[step, rows], self.timestep(step, rows), context=self.context[rows], options=given).clone()


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def close(ours: list[Tensor], theirs: list[Tensor], bound: float) -> None:
    errors = [relative(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) <= bound, f"relative errors {errors}, bound {bound}"


def same_on_every_rank(velocity: Tensor) -> None:
    import torch.distributed as dist

    first = velocity.clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, velocity), "ranks disagree"


def bound_of(recipe: str, dtype: torch.dtype) -> float:
    return (TOLERANCE if recipe == "none" else FP8_TOLERANCE)[dtype]


@functools.cache
def in_one_process(
    task: Task, recipe: str, dtype: torch.dtype, batch: int, steps: int, apart: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Velocities of a short run, and the maxima that DelayedScaling has collected by then."""
    model, video = model_of(task, dtype, recipe), Video(task, batch)
    halves = [slice(half, half + 1) for half in range(2)] if apart else [slice(None)]
    seen = [torch.cat([video.forward(model, step, rows) for rows in halves]) for step in range(steps)]
    return seen, model.quantization.scales.history if recipe == "DelayedScaling" else None


def check(dims: ParallelDims, task: Task, recipe: str, dtype: torch.dtype, batch: int, steps: int = 2) -> None:
    """A short run in the layout is the same run in one process, scales included."""
    apart = dims.cfg == 2 and batch == 2 and recipe == "Float8CurrentScaling"  # each half has a maximum of its own
    theirs, history = in_one_process(task, recipe, dtype, batch, steps, apart)
    model, video = parallelize(model_of(task, dtype, recipe), dims), Video(task, batch)
    ours = [video.forward(model, step) for step in range(steps)]
    same_on_every_rank(ours[-1])
    # partial softmaxes are stored in the type of the activations before they are merged
    close(ours, theirs, bound_of(recipe, dtype) * (2 if dims.merge and dtype == torch.bfloat16 else 1))
    if history is not None:
        scales = model.quantization.scales
        assert all(site.calibrated for site in scales.entries)
        torch.testing.assert_close(scales.history, history, rtol=1e-6 if dtype == torch.float64 else 0.05, atol=0)
        assert history[:steps].min() > 0 and not history[steps:].any()


def check_sharding_is_exact(dims: ParallelDims, recipe: str, dtype: torch.dtype) -> None:
    """Gathered weights are the same bits, a byte a parameter on the wire and at rest."""
    whole = parallelize(model_of(Task.T2V, dtype, recipe), dataclasses.replace(dims, shard=1))
    parts = parallelize(model_of(Task.T2V, dtype, recipe), dims)
    video = Video(Task.T2V, 2)
    for step in range(2):
        assert torch.equal(video.forward(whole, step), video.forward(parts, step))
    weight = parts.blocks[0].ffn[0].weight
    assert weight.dtype == (dtype if recipe == "none" else torch.float8_e4m3fn)
    assert weight.to_local().numel() * dims.shard <= 256 * WIDTH + WIDTH * dims.shard
    for change in (
        lambda: remove_parallel(parts),
        lambda: wan_fp8.apply_recipe(parts, Recipe("rowwise", keep=("ffn",))),
    ):
        refused(change, "weights are sharded")


def check_padding(dims: ParallelDims, recipe: str) -> None:
    """A rank that holds nothing but padding; and padding changes no number and no scale."""
    one = model_of(Task.TI2V, torch.float64, recipe)
    many = parallelize(model_of(Task.TI2V, torch.float64, recipe), dims)
    many.token_multiple = 16 * dims.sequence  # as a recipe that takes multiples of 16: 27 tokens
    video = Video(Task.TI2V, 1, (3, 6, 6))
    for step in range(2):
        close([video.forward(many, step)], [video.forward(one, step)], 1e-7)


def check_cache(dims: ParallelDims, recipe: str, phase: str, dtype: torch.dtype = torch.float64) -> None:
    """MagCache skips the same passes, with the same numbers."""
    cond = (1.0, *[0.99] * (STEPS - 1))
    uncond = (1.0, *[0.99, 0.94] * STEPS)[:STEPS]
    curve = Curve("own", "t2v", SCHEDULE[:-1], cond, uncond, None, models=(("only", "x"),), shape=(WIDTH, 2))
    setting = MagCache(0.1, 2, 0.2, phase=phase, curve=curve)
    one = apply_magcache(model_of(Task.T2V, dtype, recipe), setting)
    many = apply_magcache(parallelize(model_of(Task.T2V, dtype, recipe), dims), setting)  # added after the split
    video = Video(Task.T2V, 2)
    for step in range(STEPS):
        ours = video.forward(many, step, slice(None), COND, UNCOND)
        if recipe == "Float8CurrentScaling" and dims.cfg == 2:
            halves = ((slice(0, 1), COND), (slice(1, 2), UNCOND))
            theirs = torch.cat([video.forward(one, step, rows, part) for rows, part in halves])
        else:
            theirs = video.forward(one, step, slice(None), COND, UNCOND)
        close([ours], [theirs], 1e-6 if dtype == torch.float64 else 2 * FP8_TOLERANCE[dtype])
        same_on_every_rank(ours)
    theirs, ours = (cache_of(model).report.skipped_passes for model in (one, many))
    assert {kind % 2 for kind in theirs} == {0, 1}, "nothing was skipped"
    here = {0, 1} if dims.cfg == 1 else {layout_of(many).groups.cfg_rank}
    assert ours == {number for number in theirs if number % 2 in here}
    many.begin_run()
    assert torch.isfinite(video.forward(many, 0, slice(None), COND, UNCOND)).all()


def check_skipped_pass_is_silent(dims: ParallelDims) -> None:
    """A pass that is skipped sends nothing between the ranks of a sequence."""
    cond = (1.0, *[0.99] * (STEPS - 1))
    curve = Curve("own", "t2v", SCHEDULE[:-1], cond, None, None, models=(("only", "x"),), shape=(WIDTH, 2))
    many = parallelize(model_of(Task.T2V, torch.float32), dims)
    apply_magcache(many, MagCache(0.1, 2, 0.2, curve=curve))
    video, sent = Video(Task.T2V, 1), []
    for step in range(STEPS):
        before = layout_of(many).traffic.total
        video.forward(many, step, slice(None), COND)
        sent.append(layout_of(many).traffic.total - before)
    assert 0 in sent and len(set(sent)) == 2, sent


def check_lora(dims: ParallelDims) -> None:
    one, many = model_of(Task.T2V, torch.float64, "rowwise"), model_of(Task.T2V, torch.float64, "rowwise")
    generator = torch.Generator().manual_seed(2)

    @dataclasses.dataclass(frozen=True)
    class Pair:
        down: Tensor
        up: Tensor
        factor: float = 1.0

    names = {"blocks.0.self_attn.q": (WIDTH, WIDTH), "blocks.1.ffn.0": (WIDTH, 256), "text_embedding.0": (TEXT, WIDTH)}
    pairs = {
        name: Pair(torch.randn(4, a, generator=generator) / 8, torch.randn(b, 4, generator=generator) / 8)
        for name, (a, b) in names.items()
    }
    parallelize(many, dims)
    video, plain = Video(Task.T2V, 2), None
    for step, strength in enumerate((1.0, 0.5, 0.0)):
        lora = LiveLora((LiveTerm("test", strength, pairs),))
        ours, theirs = (video.forward(model, step, lora=lora) for model in (many, one))
        close([ours], [theirs], 1e-7)
        plain = video.forward(one, step)
        assert (relative(theirs, plain) > 1e-3) is (strength > 0)


def check_fp8_attention(dims: ParallelDims, backend: str = "reference-fp8", dtype: torch.dtype = torch.float64) -> None:
    """Casts and guard see whole sequences; with Ulysses a head's scale is one GPU's."""
    setting = Attention(
        backend, skip_first_steps=0, skip_last_steps=0, skip_first_blocks=0, skip_last_blocks=0, bound=1.0
    )
    models = [model_of(Task.T2V, dtype), parallelize(model_of(Task.T2V, dtype), dims)]
    for model in models:
        wan_fp8.set_attention(model, setting)
    video = Video(Task.T2V, 2, (3, 8, 8))  # 48 tokens: the sample of queries has no padding in it
    theirs, ours = (video.forward(model, 0) for model in models)
    close([ours], [theirs], 1e-6 if dims.ring == 1 and dtype == torch.float64 else 2e-2)
    core = models[1].blocks[1].self_attn.inner_attention.core
    assert core.answered[setting][backend] == 1 and core.verdicts[setting].error > 0


def check_merge_refuses(dims: ParallelDims) -> None:
    model = parallelize(model_of(Task.T2V, torch.float32), dims)
    wan_fp8.set_attention(model, Attention("reference-fp8", skip_first_steps=0, skip_last_steps=0))
    refused(lambda: Video(Task.T2V, 2).forward(model, 0), "cannot be merged from parts of the keys: choose fa3, cudnn")
    refused(lambda: ParallelDims(ulysses=2, merge=True), "ring is 1")


def check_compiled(dims: ParallelDims) -> None:
    """Compiled parts of a block send nothing from inside; nor does a layout that was told so."""
    velocities = []
    for how in ("as made", "at once", "compiled"):
        model = parallelize(model_of(Task.TI2V, torch.float64, "rowwise"), dims)
        if how == "at once":
            model.stack_wrappers["sequence_parallel"].overlap = False
        if how == "compiled":
            wan_fp8.compile_blocks(model, backend="eager")
        velocities.append(Video(Task.TI2V, 2).forward(model, 0))
        assert layout_of(model).traffic.heads > 0
    assert torch.equal(velocities[0], velocities[1])
    close(velocities[2:], velocities[:1], 1e-7)


def check_sparse_attention(
    dims: ParallelDims, task: Task, recipe: str, batch: int, sparsity: Sparsity, dtype: torch.dtype = torch.float64
) -> None:
    """A run under a bound, measured and moved on the rank that owns a head, and heads that change ranks: the same
    choices as in one process, to the last block, and one report of all heads."""
    many = parallelize(_uneven(task, recipe, dtype), dims)
    many.stack_wrappers["sequence_parallel"].overlap = recipe == "none"  # else all at once, as compiled blocks send
    wan_fp8.set_attention(many, Attention(sparsity=sparsity))
    video = Video(task, batch, (6, 20, 18))  # 540 tokens, 90 of them a first frame: 5 blocks
    ours = [video.forward(many, step, step=Step(step, 4)) for step in range(4)]
    same_on_every_rank(ours[-1])
    (found,) = sparsity_report(many)
    theirs, expected = _sparse_in_one_process(task, recipe, batch, sparsity, dtype)
    exact = dtype == torch.float64
    close(ours, theirs, 1e-7 if exact else 5e-2)  # rounded, a block on the threshold may fall to the other side
    assert (found.answered, found.heads, found.samples) == (expected.answered, 2 * HEADS, expected.samples)
    assert found.ranks == dims.ulysses and 0 < found.density < 1
    assert [row[:2] for row in found.table] == [row[:2] for row in expected.table]
    for (_, _, here), (_, _, there) in zip(found.table, expected.table, strict=True):
        assert here == there if exact else sum(abs(a - b) for a, b in zip(here, there, strict=True)) < 0.05 * HEADS
    for step, numbers in expected.error_by_step.items() if exact else ():
        assert found.dense_heads == expected.dense_heads
        assert all(math.isclose(*pair, rel_tol=1e-4) for pair in zip(found.error_by_step[step], numbers, strict=True))
    orders = {block.self_attn.inner_attention.order for block in many.blocks}
    assert (orders != {tuple(range(HEADS))}) is (sparsity.policy != "window"), "heads that keep more change ranks"
    many.begin_run()
    assert {block.self_attn.inner_attention.order for block in many.blocks} == {tuple(range(HEADS))}
    assert torch.equal(video.forward(many, 0, step=Step(0, 4)), ours[0]), "a second run begins as the first one did"
    remove_parallel(many)
    assert _core(many).share is None and many.gather_findings is None


def _uneven(task: Task, recipe: str, dtype: torch.dtype) -> WanModel:
    """The first half of the heads looks at little, so that they keep other shares of the blocks than the rest."""
    model = model_of(task, dtype, recipe)
    for block in model.blocks:
        block.self_attn.norm_q.weight.data[: WIDTH // 2] *= 4
    return model


@functools.cache
def _sparse_in_one_process(
    task: Task, recipe: str, batch: int, sparsity: Sparsity, dtype: torch.dtype
) -> tuple[list[Tensor], SparseReport]:
    one, video = _uneven(task, recipe, dtype), Video(task, batch, (6, 20, 18))
    wan_fp8.set_attention(one, Attention(sparsity=sparsity))
    made = [video.forward(one, step, step=Step(step, 4)) for step in range(4)]
    return made, sparsity_report(one)[0]


def check_sparse_is_refused(dims: ParallelDims) -> None:
    """A ring splits keys."""
    model = parallelize(model_of(Task.T2V, torch.float32), dims)
    wan_fp8.set_attention(model, Attention(sparsity=Sparsity(**EVERYWHERE)))
    refused(lambda: Video(Task.T2V, 1).forward(model, 0), "which a ring splits")


def _core(model: WanModel) -> AttentionCore:
    return next(core for core in attention_cores(model) if not core.always_exact)


def check_undone(dims: ParallelDims) -> None:
    """Attaching changes no weight and leaves nothing behind; attaching twice is attaching once."""
    model = model_of(Task.T2V, torch.float32, "DelayedScaling")
    video = Video(Task.T2V, 2)
    before = video.forward(model, 0)
    names = dict(model.named_modules()).keys()
    parallelize(model, dims)
    layout = model.layout
    assert parallelize(model, dims).layout is layout
    video.forward(model, 0)
    remove_parallel(model)
    model.begin_run()
    assert torch.equal(video.forward(model, 0), before)
    assert dict(model.named_modules()).keys() == names and not model.stack_wrappers and model.token_multiple == 1
    wan_fp8.apply_recipe(parallelize(model, dims), Recipe("Float8CurrentScaling", backend="reference"))
    assert model.quantization.reduction is model.amax_reduction is not None, "a recipe applied later agrees as well"
    remove_parallel(model)
    assert model.quantization.reduction is None


def check_traffic(dims: ParallelDims) -> None:
    """What is sent is what the planner reckons with (bf16 activations, fp32 stream)."""
    model = parallelize(model_of(Task.T2V, torch.bfloat16), dims)
    video = Video(Task.T2V, 2)
    video.forward(model, 0)
    traffic = layout_of(model).traffic
    one = 4 * 16 * math.prod(GRID)
    assert traffic.velocity == (one if dims.cfg == 2 else 0)
    work = Workload(spec=model.spec, tokens=math.prod(GRID) // 4, guidance=True)
    assert traffic.total - traffic.velocity == sent_bytes(dims, work)


def check_twin(ranks: int) -> None:
    """Text keys of a half are kept: the prompt is projected once, not once a step."""
    model = parallelize(model_of(Task.T2V, torch.float32), ParallelDims(cfg=2, ulysses=ranks // 2))
    calls = []
    model.text_embedding.register_forward_hook(lambda *_: calls.append(1))
    video = Video(Task.T2V, 2)
    for step in range(3):
        model(video.x[step], video.timestep(step, slice(None)), video.context)
    assert len(calls) == 1


def check_vae(ranks: int, design: str, frames: int) -> None:
    """Rows that do not divide, and frames in groups, are the whole clip at once; on this rank alone as well."""
    import torch.distributed as dist

    with torch.inference_mode(False):
        vae = WanVAE(VAESpec(dim=4)) if design == "2.1" else Wan22VAE(VAE22Spec(encoder_dim=4, decoder_dim=6))
        vae.to(DEVICE, torch.float64)
        generator = torch.Generator().manual_seed(4)
        for parameter in vae.parameters():
            size = math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 1
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / size)
    rows, columns, per = 5 * vae.stride, 3 * vae.stride, -(-5 // ranks)
    video = torch.randn(2, 3, frames, rows, columns, dtype=torch.float64, generator=generator).to(DEVICE)
    shape = (2, vae.channels, (frames - 1) // 4 + 1, 5, 3)
    latents = torch.randn(shape, dtype=torch.float64, generator=generator).to(DEVICE)
    uneven = (
        vae_groups.values_of_a_frame(vae.widest, 2, vae.stride * per, columns) * 3 // 2
    )  # with fewer rows, two would fit
    for split in (SplitVAE(vae), SplitVAE(vae, dist.group.WORLD)):
        for most in (vae_groups.MOST_VALUES, uneven, 1):
            with mock.patch.object(vae_groups, "MOST_VALUES", most):
                close([split.encode(video), split.decode(latents)], [vae.encode(video), vae.decode(latents)], 1e-9)
    refused(lambda: split.decode(latents[..., : ranks - 1, :]), f"{ranks - 1} latent rows cannot be shared")


def refused(action: Callable[[], object], words: str) -> None:
    try:
        action()
    except InputError as error:
        assert words in str(error), str(error)
        return
    raise AssertionError(f"not refused: {words}")


def check_refusals(ranks: int) -> None:
    model = model_of(Task.T2V, torch.float32)
    refused(lambda: parallelize(model, ParallelDims(ulysses=6)), f"the process group has {ranks}")
    odd = model_of(Task.T2V, torch.float32)
    odd.spec = dataclasses.replace(odd.spec, num_heads=1)
    refused(lambda: parallelize(odd, ParallelDims(ulysses=ranks)), "does not divide the 1 heads")
    assert model.layout is None and not model.stack_wrappers
    parallelize(model, ParallelDims(ulysses=ranks))
    video = Video(Task.T2V, 1)
    refused(lambda: video.forward(model, 0, attention_override=lambda *_: None), "remove it, or use cfg alone")
    refused(lambda: video.forward(model, 0, block_replace={0: lambda *_: None}), "remove it, or use cfg alone")
    if ranks % 2 == 0:
        halves = parallelize(model_of(Task.T2V, torch.float32), ParallelDims(cfg=2, ulysses=ranks // 2))
        apply_cache(halves, EasyCache())
        refused(lambda: Video(Task.T2V, 2).forward(halves, 0, slice(None), COND, UNCOND), "EasyCache decides from one")
        sharded = parallelize(model_of(Task.T2V, torch.float32), ParallelDims(cfg=2, ulysses=ranks // 2, shard=ranks))
        apply_magcache(sharded, MagCache(phase="published"))
        words = "gather weights together"
        refused(lambda: Video(Task.T2V, 2).forward(sharded, 0, slice(None), COND, UNCOND), words)


def check_nan(dims: ParallelDims) -> None:
    """A NaN of one rank's tokens is a NaN in the result, not a number."""
    model = parallelize(model_of(Task.T2V, torch.float32, "DelayedScaling"), dims)
    video = Video(Task.T2V, 1)
    video.x[0, 0, 0, 0, 0, 0] = math.nan
    assert video.forward(model, 0).isnan().any()
    assert model.quantization.scales.multiplier.isfinite().all()


def cases(ranks: int) -> dict[str, Callable[[], None]]:
    return dict(_cases(ranks))


def _cases(ranks: int) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, dims in LAYOUTS[ranks].items():
        # two ranks go through everything, more of them, or another way to attend, through what may depend on that
        few = ranks > 2 or dims.merge
        sharded = dims.shard > 1
        for number, recipe in enumerate(("none", "rowwise", *PER_TENSOR)):
            for batch in (2,) if sharded or few else (1, 2):
                if sharded and recipe in ("rowwise", "Float8CurrentScaling"):
                    continue
                task = list(CHANNELS)[(number + batch) % 3]
                yield (
                    f"{name}: {task} {recipe} batch {batch} fp64",
                    partial(check, dims, task, recipe, torch.float64, batch),
                )
        if (not sharded and not dims.merge) or not few:
            yield f"{name}: MagCache DelayedScaling", partial(check_cache, dims, "DelayedScaling", "in_phase")
        if dims.sequence > 1 and not sharded:
            for recipe in PER_TENSOR:
                yield f"{name}: padding {recipe}", partial(check_padding, dims, recipe)
        if sharded:
            for recipe, dtype in (("rowwise", torch.bfloat16), ("DelayedScaling", torch.float32)):
                yield f"{name}: exact, {recipe}", partial(check_sharding_is_exact, dims, recipe, dtype)
            continue
        yield f"{name}: traffic", partial(check_traffic, dims)
        yield f"{name}: t2v fp32", partial(check, dims, Task.T2V, "none", torch.float32, 2, 1)
        yield f"{name}: i2v DelayedScaling bf16", partial(check, dims, Task.I2V, "DelayedScaling", torch.bfloat16, 1, 1)
        if ranks == 2:
            yield from (_two_ranks(name, dims) if not few else _merged(name, dims))
    if ranks % 2 == 0:
        yield "prompts of a half are kept", partial(check_twin, ranks)
    for name, dims in LAYOUTS[ranks].items():
        if dims.ring > 1:
            yield f"{name}: sparse attention is refused", partial(check_sparse_is_refused, dims)
        elif dims.ulysses > 1 and dims.shard == dims.cfg == 1:
            for task, recipe, batch, sparsity in SPARSE if ranks == 2 else SPARSE[:1]:
                case = partial(check_sparse_attention, dims, task, recipe, batch, sparsity)
                yield f"{name}: sparse {task} {recipe} batch {batch}, {sparsity.policy}", case
    for design in ("2.1", "2.2"):
        for frames in (1, 13):
            yield f"VAE {design}, {frames} frames", partial(check_vae, ranks, design, frames)
    yield "refusals", partial(check_refusals, ranks)
    for name, dims in LAYOUTS[ranks].items():
        if dims.shard == 1 and not dims.merge:
            recipe, batch = "none" if few else "rowwise", max(dims.cfg, 1)
            for task in EXTENDED:
                yield f"{name}: {task} {recipe}", partial(check_extended, dims, task, recipe, batch)
                if dims.ulysses > dims.ring == 1:
                    # each half of guidance keeps the bound by itself
                    sparse = Sparsity(coverage=0.7, bound=0.3 if dims.cfg == 1 else None, **EVERYWHERE)
                    case = partial(check_extended, dims, task, "none", batch, sparsity=sparse)
                    yield f"{name}: sparse {task} batch {batch}", case


def _two_ranks(name: str, dims: ParallelDims) -> Iterator[tuple[str, Callable[[], None]]]:
    yield f"{name}: live LoRA", partial(check_lora, dims)
    yield f"{name}: MagCache none", partial(check_cache, dims, "none", "in_phase")
    yield f"{name}: MagCache Float8CurrentScaling", partial(check_cache, dims, "Float8CurrentScaling", "in_phase")
    yield f"{name}: MagCache as published", partial(check_cache, dims, "DelayedScaling", "published")
    yield f"{name}: undone", partial(check_undone, dims)
    if dims.ulysses > 1:
        yield f"{name}: compiled", partial(check_compiled, dims)
    if dims.sequence > 1:
        yield f"{name}: FP8 attention", partial(check_fp8_attention, dims)
        yield f"{name}: NaN", partial(check_nan, dims)
        yield f"{name}: a skipped pass is silent", partial(check_skipped_pass_is_silent, dims)


def _merged(name: str, dims: ParallelDims) -> Iterator[tuple[str, Callable[[], None]]]:
    yield f"{name}: FP8 attention is refused", partial(check_merge_refuses, dims)
    yield f"{name}: NaN", partial(check_nan, dims)
