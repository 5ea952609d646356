"""What ``dit.py`` measures for Animate-14B and S2V-14B: blocks, what stands between them, and the encoders, apart.

    python benchmarks/dit.py --model animate-14B --size 1280x720 --frames 77 --attention fa3 --recipe rowwise
    python benchmarks/dit.py --model s2v-14B --size 1280x704 --frames 80 --attention fa3 --recipe rowwise

A fuser stands after every fifth block of Animate, an injector after every fourth of S2V (nearly): ``layer_ms`` is a
block without them, ``between_ms`` one fuser or injector, both by differences between 2, 4 and 6 blocks (``--layers`` is
not asked): the first two counts have one of them, the third has two. ``encoders_ms`` are the parts that run once a
segment. ``floor_ms`` is that of a block of so many tokens, as for the other models, and for Animate of the attention to
the image. ``segment_s`` is one segment of the published steps and guidance: forwards and encoders; with --comfyui the
VAE too, which is core's, and core's own class is timed in the same run.

The blocks come first, and are in the file before the rest of their row is measured. Each phase says on stderr when it
began.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import dit
import torch
from torch import Tensor

from wan_fp8 import Recipe, apply_recipe, set_attention
from wan_fp8.attention import Attention, AttentionCore
from wan_fp8.models.audio import AUDIO_LAYERS, AUDIO_WIDTH
from wan_fp8.models.face import FACE_SIZE
from wan_fp8.models.specs import SPECS, ModelSpec, Task
from wan_fp8.models.wan import WanModel, build_model
from wan_fp8.sampling import DEFAULTS

IMAGE_TOKENS = 257
BETWEEN = {Task.ANIMATE: 8, Task.S2V: 12}
"""How many there are."""
LAYERS = (2, 4, 6)
"""Layer counts that are timed: two blocks more, then two blocks and one fuser or injector more."""
BUILT = {Task.ANIMATE: 10, Task.S2V: 6}
"""Blocks that are built: Animate's come in fives."""
CORE_LAYERS = {Task.ANIMATE: (5, 10), Task.S2V: (4, 8)}
"""The same for core, of which no fuser or injector can be left out: each has one more than the other."""
TINY = {
    f"tiny-{task}": dataclasses.replace(
        SPECS[f"{task}-14B"], dim=256, ffn_dim=512, num_heads=2, num_layers=10, text_dim=512
    )
    for task in BETWEEN
}
MODELS: dict[str, ModelSpec] = {name: SPECS[name] for name in ("animate-14B", "s2v-14B")} | TINY
SOURCES = {Task.ANIMATE: "face_pixel_values", Task.S2V: "audio_embed"}
"""The input that fusers or injectors read."""


def grid_of(spec: ModelSpec, width: int, height: int, frames: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns: Animate has one more, of its reference; S2V has a quarter of its frames."""
    latent = frames // 4 if spec.task is Task.S2V else (frames - 1) // 4 + 2
    return latent, height // 8, width // 8


def task_inputs(
    spec: ModelSpec, grid: tuple[int, int, int], frames: int, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a forward is told beside latents, timestep and text; of S2V, as in its second clip and all later ones."""
    generator = torch.Generator(device).manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(1, *shape, device=device, dtype=dtype, generator=generator)

    if spec.task is Task.ANIMATE:
        faces = frames if device.startswith("cuda") else 1  # one takes a second on a CPU
        return {
            "clip_fea": randn(IMAGE_TOKENS, 1280),
            "pose_latents": randn(16, grid[0] - 1, *grid[1:]),
            "face_pixel_values": randn(3, faces, FACE_SIZE, FACE_SIZE).clamp(-1, 1),
        }
    return {
        "audio_embed": randn(AUDIO_LAYERS, AUDIO_WIDTH, frames),
        "reference_latent": randn(16, 1, *grid[1:]),
        "reference_motion": randn(16, 19, *grid[1:]),
        "control_video": randn(16, *grid),
    }


def by_layers(model: WanModel, forward: Callable[[], Any], device: str, rounds: int) -> dict[int, float]:
    """Milliseconds of a forward with each count of layers. They are run in turn, so that a warming GPU slows them
    alike; on a GPU they come after forwards that have let its clock settle, elsewhere after one of each."""
    every = model.blocks
    times: dict[int, list[float]] = {count: [] for count in LAYERS}
    for round_ in range(rounds):
        for count in LAYERS:
            model.blocks = every[:count]
            times[count] += common.milliseconds(forward, device, repeats=1, warmup=int(round_ == 0 and device == "cpu"))
    model.blocks = every
    return {count: statistics.median(values) for count, values in times.items()}


def encoders(model: WanModel, given: dict[str, Tensor], device: str) -> dict[str, float]:
    """Milliseconds of what runs once a segment."""
    dtype = model.compute_dtype
    net: Any = model
    parts: dict[str, Callable[[], Any]]
    if model.spec.task is Task.ANIMATE:
        faces = given["face_pixel_values"]
        motion = net.motion_encoder(faces).to(dtype)
        parts = {
            "motion_encoder": lambda: net.motion_encoder(faces),
            "face_encoder": lambda: net.face_encoder(motion),
            "image_projection": lambda: net.img_emb(given["clip_fea"]),
        }
    else:
        audio = given["audio_embed"].float()
        parts = {"audio_encoder": lambda: net.casual_audio_encoder(audio)}
    return {name: round(min(common.milliseconds(part, device, repeats=2, warmup=1)), 3) for name, part in parts.items()}


def image_attention(model: WanModel, tokens: int, device: str, dtype: torch.dtype) -> float:
    """The attention of every token to the image's, by itself."""
    spec, block = model.spec, model.blocks[0]
    shapes = [(1, count, spec.num_heads, spec.head_dim) for count in (tokens, IMAGE_TOKENS, IMAGE_TOKENS)]
    core = block.cross_attn.inner_attention
    assert isinstance(core, AttentionCore)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    return min(common.milliseconds(dit.attention_alone(core, q, k, v), device))


def velocity_error(model: WanModel, grid: tuple[int, int, int], device: str) -> float:
    """Relative L2 error against the same weights, drawn again, in fp32, with every input, on a short clip."""
    dtype = model.compute_dtype
    short = (3 if model.spec.task is Task.ANIMATE else 2, *(min(side, 32) // 8 * 8 for side in grid[1:]))
    few = 5 if model.spec.task is Task.ANIMATE else 8
    x, timestep, context = dit.model_inputs(model.spec, short, device, dtype)
    given = task_inputs(model.spec, short, few, device, dtype)
    model.begin_run()
    ours = model(x, timestep, context, **given)
    originals = dit.random_model(model.spec, model.spec.num_layers, device, dtype).state_dict()
    with torch.device("meta"):
        exact = build_model(model.spec)
    exact.fused_kernels = "eager"
    exact.load_state_dict({name: value.float() for name, value in originals.items()}, assign=True)
    set_attention(exact, Attention("sdpa"))
    reference = exact(x.float(), timestep, context.float(), **{name: value.float() for name, value in given.items()})
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def measure(
    name: str,
    size: str,
    frames: int,
    attention: str,
    recipe: Recipe | None,
    dtype: torch.dtype,
    device: str,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """One row of results; ``save`` gets what there is of it as soon as blocks have their times."""
    spec = MODELS[name]
    task = spec.task
    width, height = (int(n) for n in size.split("x"))
    grid = grid_of(spec, width, height, frames)
    phase = common.Phases()
    phase(
        "weights", f"{name}, {'no recipe' if recipe is None else recipe.name}: random weights of {BUILT[task]} blocks"
    )
    model = dit.random_model(spec, BUILT[task], device, dtype)
    set_attention(model, dit.open_window(attention))
    if recipe is not None:
        phase("recipe", "weights to FP8")
        apply_recipe(model, recipe)
    x, timestep, context = dit.model_inputs(spec, grid, device, dtype)
    given = task_inputs(spec, grid, frames, device, dtype)
    lengths: list[int] = []

    def counted(tokens: Tensor, state: Any, inner: Callable[..., Tensor]) -> Tensor:
        lengths.append(state.num_tokens)
        return inner(tokens, state)

    model.stack_wrappers["counted"] = counted
    every_block, model.blocks = model.blocks, model.blocks[: LAYERS[-1]]

    def full() -> Tensor:
        return model(x, timestep, context, **given)

    cuda = device.startswith("cuda")
    phase("first forward", "first forward: kernels are compiled, encoders run")
    full()
    if cuda:
        torch.cuda.synchronize()
    tokens = lengths[0]
    del model.stack_wrappers["counted"]
    if cuda:
        phase("settling", "forwards until the clock has settled")
        dit.settle(full)
        torch.cuda.reset_peak_memory_stats()
    rounds = 4 if tokens > 40_000 else 15
    phase("rounds", f"{rounds} rounds of {', '.join(map(str, LAYERS))} blocks at {tokens:,} tokens")
    times = by_layers(model, full, device, rounds)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    few, more, most = LAYERS
    layer_ms = (times[more] - times[few]) / (more - few)
    between_ms = times[most] - times[more] - (most - more) * layer_ms
    fixed_ms = times[few] - few * layer_ms - between_ms  # the first count has one fuser or injector as well
    forward_s = (fixed_ms + spec.num_layers * layer_ms + BETWEEN[task] * between_ms) / 1000
    row: dict[str, Any] = {
        "model": name,
        "size": size,
        "frames": frames,
        "tokens": tokens,
        "recipe": "none" if recipe is None else recipe.name,
        "backend": str(dtype).removeprefix("torch.")
        if recipe is None
        else model.quantization.resolve(torch.device(device), dtype).backend.name,  # type: ignore[union-attr]
        "attention": attention,
        "sparsity": None,
        "cache": None,
        "world_size": 1,
        "topology": None,
        "layer_ms": round(layer_ms, 3),
        "between_ms": round(between_ms, 3),
        "between": f"{BETWEEN[task]} {'face fusers' if task is Task.ANIMATE else 'audio injectors'}",
        "fixed_ms": round(fixed_ms, 3),
        "forward_s": round(forward_s, 4),
        "peak_gib": peak_gib and round(peak_gib, 2),
    }
    save(row)
    phase("profile", f"a block takes {layer_ms:.3f} ms; kernels by name")
    model.blocks = every_block[:few]
    row["kernels"] = dit.kernels_used(full, device)
    phase("encoders")
    once = encoders(model, given, device)
    defaults = DEFAULTS[task]
    passes = defaults.steps * (1 if defaults.guidance[0] == 1 else 2)
    row |= {
        "encoders_ms": once,
        "forwards_a_segment": passes,
        "segment_s": round(passes * forward_s + sum(once.values()) / 1000, 2),
    }
    save(row)
    phase("floor", "floor: each product and attention by itself")
    stream_bytes = torch.empty((), dtype=model.stream_dtype).element_size()
    terms = dit.floor_terms(model, tokens, device, dtype, stream_bytes, full)
    if task is Task.ANIMATE:
        terms["image_attention"] = image_attention(model, tokens, device, dtype)
    model.blocks = every_block
    row |= {
        "floor_ms": round(sum(terms.values()), 3),
        "floor_ratio": round(layer_ms / sum(terms.values()), 4),
        "floor_terms_ms": {key: round(value, 3) for key, value in terms.items()},
    }
    save(row)
    phase("error", "error against fp32")
    row["error"] = velocity_error(model, grid, device)
    phase.done()
    return row


# ---- core, in the same run -----------------------------------------------------------------------------------------


@contextmanager
def fa3_in_core(attention: str) -> Any:
    """While active, core's blocks, fusers and injectors attend through FlashAttention 3, where that was asked for."""
    import comfy.ldm.wan.model
    import comfy.ldm.wan.model_animate
    from peers import flash3

    modules = (comfy.ldm.wan.model, comfy.ldm.wan.model_animate)
    kept = [module.optimized_attention for module in modules]
    if attention == "fa3":
        kernel = flash3()

        def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: object) -> Tensor:
            out = kernel(*(t.unflatten(-1, (heads, -1)) for t in (q, k, v)))
            return (out[0] if isinstance(out, tuple) else out).flatten(2)

        for module in modules:
            module.optimized_attention = attend
    try:
        yield
    finally:
        for module, function in zip(modules, kept, strict=True):
            module.optimized_attention = function


def core_row(name: str, size: str, frames: int, attention: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Core's own class on the same shapes: blocks and fusers or injectors together, as core has no way to leave them
    out of the difference. Its face or audio encoder runs with every forward: that is in ``fixed_ms``."""
    import comfy.ldm.wan.model
    import comfy.ldm.wan.model_animate
    import comfy.ops

    spec = MODELS[name]
    task, layers = spec.task, CORE_LAYERS[spec.task]
    width, height = (int(n) for n in size.split("x"))
    grid = grid_of(spec, width, height, frames)
    sizes = dict(
        in_dim=spec.in_dim, out_dim=spec.out_dim, dim=spec.dim, ffn_dim=spec.ffn_dim, num_heads=spec.num_heads,
        text_dim=spec.text_dim, num_layers=layers[1], dtype=dtype, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    with torch.device("meta"):
        if task is Task.ANIMATE:
            model: Any = comfy.ldm.wan.model_animate.AnimateWanModel(**sizes)
        else:
            model = comfy.ldm.wan.model.WanModel_S2V(**sizes)
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for key, meta in [*model.named_parameters(), *model.named_buffers()]:
        value = torch.randn(meta.shape, device=device, generator=generator)
        value = value / max(1, meta[0].numel()) ** 0.5 if meta.ndim > 1 else 0.1 * value
        state[key] = value.to(meta.dtype)  # its own: core keeps the patch embedding in fp32, and gives it fp32
    model.load_state_dict(state, strict=False, assign=True)
    model = model.to_empty(device=device) if any(p.is_meta for p in model.parameters()) else model
    model = model.eval().requires_grad_(False)
    x, timestep, context = dit.model_inputs(spec, grid, device, dtype)
    given = task_inputs(spec, grid, frames, device, dtype)
    with fa3_in_core(attention):
        blocks, every, times = model.blocks, list(model.blocks), {}
        for count in layers:
            del blocks[:]
            blocks.extend(every[:count])
            times[count] = common.median_ms(lambda: model(x, timestep, context, **given), device, repeats=4, warmup=1)
    step = layers[1] - layers[0]
    together = (times[layers[1]] - times[layers[0]]) / step
    return {
        "peer": "core ComfyUI",
        "model": name,
        "size": size,
        "frames": frames,
        "attention": attention if attention == "fa3" else "native",
        "layer_ms_with_between": round(together, 3),
        "fixed_ms": round(times[layers[0]] - layers[0] * together, 3),
    }


def vae_seconds(task: Task, size: str, frames: int, device: str) -> dict[str, float]:
    """Core's VAE, which the nodes use: what a segment encodes and decodes, in bf16, in seconds."""
    import comfy.ldm.wan.vae

    width, height = (int(n) for n in size.split("x"))
    config = dict(dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True])
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    vae: Any = comfy.ldm.wan.vae.WanVAE(dim=96 if device.startswith("cuda") else 8, z_dim=16, dropout=0.0, **config)
    vae = vae.to(device, dtype).eval().requires_grad_(False)
    seen = frames if task is Task.ANIMATE else 73  # S2V encodes the frames that the next clip looks back at
    times = 2 if task is Task.ANIMATE else 1  # Animate encodes its pose, and what is known
    video = torch.randn(1, 3, seen, height, width, device=device, dtype=dtype)
    latents = (frames - 1) // 4 + 1 if task is Task.ANIMATE else 19 + frames // 4
    z = torch.randn(1, 16, latents, height // 8, width // 8, device=device, dtype=dtype)
    encode = common.median_ms(lambda: vae.encode(video), device, repeats=2, warmup=1)
    decode = common.median_ms(lambda: vae.decode(z), device, repeats=2, warmup=1)
    return {"vae_encode_s": round(times * encode / 1000, 2), "vae_decode_s": round(decode / 1000, 2)}


def run(
    model: str,
    size: str,
    frames: int,
    attention: str,
    recipes: list[Recipe | None],
    dtype: str,
    device: str,
    comfyui: str,
    json: str,
) -> None:
    """The rows of ``dit.py`` for one of these models."""
    if comfyui:
        sys.path.insert(0, str(Path(comfyui).resolve()))
        sys.argv = sys.argv[:1]  # core parses the command line at import
        import comfy.cli_args

        comfy.cli_args.args.cpu = device == "cpu"
    rows: list[dict[str, Any]] = []
    kind = getattr(torch, dtype)

    def save(unfinished: dict[str, Any]) -> None:
        if json:
            common.write_results(json, [*rows, unfinished], device)

    with torch.inference_mode():
        for name in attention.split(","):
            for recipe in recipes:
                rows.append(measure(model, size, frames, name, recipe, kind, device, save))
                dit.show({**rows[-1], "attention_refused": {}})
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
                if json:
                    common.write_results(json, rows, device)
        if comfyui:
            phase = common.Phases()
            phase("VAE", "core's VAE")
            vae = vae_seconds(MODELS[model].task, size, frames, device)
            for row in rows:
                row |= vae | {"segment_with_vae_s": round(row["segment_s"] + sum(vae.values()), 2)}
            phase("class", "core's class")
            rows += [core_row(model, size, frames, name, kind, device) for name in attention.split(",")]
            phase.done("core measured")
            for row in rows:
                dit.console.print({key: value for key, value in row.items() if not isinstance(value, dict)})
            if json:
                common.write_results(json, rows, device)
