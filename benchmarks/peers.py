"""Time a Wan2.2 block of ours beside diffusers' and core ComfyUI's: same shapes, same GPU, same run, random weights.

    python benchmarks/peers.py --comfyui DIR --json benchmarks/results/peers.json

Every peer runs as shipped (torch's choice of attention) and again with FlashAttention 3, diffusers also compiled; TF32
is allowed for all, and nobody but the rows that say so is compiled. FP8 rows: our recipes, and core's own FP8 matrix
products. Time per block is the difference between two layer counts, the median of four forwards each.
A peer that is not installed is named as left out.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import common
import torch
import typer
from dit import MODELS, latent_grid, model_inputs, open_window, random_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from wan_fp8 import Recipe, apply_recipe, set_attention
from wan_fp8.errors import BackendUnavailableError
from wan_fp8.kernels.quantize import Granularity, quantize_weight
from wan_fp8.models.specs import ModelSpec

DTYPE = torch.bfloat16
console = Console(width=140)


@contextmanager
def ours(
    spec: ModelSpec, layers: int, attention: str, recipe: str = "none"
) -> Iterator[tuple[nn.ModuleList, Callable[..., Tensor]]]:
    """Our model, without torch.compile; low-precision attention in every block."""
    model = random_model(spec, layers, "cuda", DTYPE)
    set_attention(model, open_window(attention))
    apply_recipe(model, Recipe(recipe))
    yield model.blocks, model


def flash3() -> Callable:
    """The kernel that our ``fa3`` backend uses."""
    from wan_fp8.attention.backends.flash3 import _load

    function, note = _load()
    if function is None:
        raise BackendUnavailableError(note)
    return function


def filled(model: nn.Module) -> nn.Module:
    """Random weights of the size that training leaves, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    state = {}
    for name, p in model.named_parameters():
        value = torch.randn(p.shape, device="cuda", generator=generator)
        value = value / p[0].numel() ** 0.5 if p.ndim > 1 else 1 + 0.1 * value if "norm" in name else 0.1 * value
        state[name] = value.to(DTYPE)
    model.load_state_dict(state, strict=False, assign=True)
    return model.eval().requires_grad_(False)


@contextmanager
def diffusers_peer(
    spec: ModelSpec, layers: int, attention: str, compiled: bool
) -> Iterator[tuple[nn.ModuleList, Callable[..., Tensor]]]:
    """diffusers' WanTransformer3DModel; ``compiled`` as its documentation advises, block by block."""
    from diffusers import WanTransformer3DModel
    from diffusers.models import attention_dispatch

    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=spec.num_heads, attention_head_dim=spec.head_dim, in_channels=spec.in_dim,
            out_channels=spec.out_dim, ffn_dim=spec.ffn_dim, num_layers=layers, text_dim=spec.text_dim,
        )  # fmt: skip
    model = filled(model)
    model.rope = type(model.rope)(spec.head_dim, spec.patch_size, 1024).to("cuda")
    if attention == "fa3":  # diffusers looks for another package name: point it at the installed one
        kernel = flash3()
        attention_dispatch._CAN_USE_FLASH_ATTN_3 = True
        attention_dispatch.flash_attn_3_func = kernel
        model.set_attention_backend("_flash_3")
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)

    def forward(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return model(x, timestep, context, return_dict=False)[0]

    yield model.blocks, forward


@contextmanager
def core_peer(
    spec: ModelSpec, layers: int, attention: str, fp8: bool = False
) -> Iterator[tuple[nn.ModuleList, Callable[..., Tensor]]]:
    """Core ComfyUI's WanModel, with core's own operations and its choice of attention; ``fp8``: as it runs a scaled FP8
    checkpoint with its FP8 matrix products switched on."""
    import comfy.ldm.wan.model as core_wan
    import comfy.ops

    original = core_wan.optimized_attention
    if attention == "fa3":
        kernel = flash3()

        def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: object) -> Tensor:
            out = kernel(*(t.unflatten(-1, (heads, -1)) for t in (q, k, v)))
            return (out[0] if isinstance(out, tuple) else out).flatten(2)

        core_wan.optimized_attention = attend
    with torch.device("meta"):
        model = core_wan.WanModel(
            model_type="t2v", in_dim=spec.in_dim, out_dim=spec.out_dim, dim=spec.dim, ffn_dim=spec.ffn_dim,
            num_heads=spec.num_heads, num_layers=layers,
            text_dim=spec.text_dim, dtype=DTYPE,
            operations=comfy.ops.scaled_fp8_ops(fp8_matrix_mult=True) if fp8 else comfy.ops.disable_weight_init,
        )  # fmt: skip
    model = filled(model)
    model.patch_embedding.float()  # as core's loader leaves it
    if fp8:
        scale_linears(model)
    try:
        yield model.blocks, lambda x, timestep, context: model(x, timestep, context)
    finally:
        core_wan.optimized_attention = original


def scale_linears(model: nn.Module) -> None:
    """The linears of the blocks as a scaled FP8 checkpoint holds them: e4m3, one scale a tensor."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        module.scale_weight = nn.Parameter(torch.ones((), device="cuda"), requires_grad=False)
        module.comfy_cast_weights = True
        if name.startswith("blocks."):
            qdata, scale = quantize_weight(module.weight, Granularity.TENSOR)
            module.weight, module.scale_weight = (nn.Parameter(t, requires_grad=False) for t in (qdata, scale))


def layer_times(peer, layers: tuple[int, int], inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Milliseconds per block, and outside the blocks."""
    times = {}
    with peer(layers=layers[1]) as (blocks, forward):
        every = list(blocks)
        for count in layers:
            del blocks[0 : len(blocks)]
            blocks.extend(every[:count])
            times[count] = common.median_ms(lambda: forward(*inputs), "cuda", repeats=4, warmup=1)
    layer_ms = (times[layers[1]] - times[layers[0]]) / (layers[1] - layers[0])
    return layer_ms, times[layers[0]] - layers[0] * layer_ms


def peers(spec: ModelSpec) -> dict[str, tuple[str, Callable]]:
    """Name -> attention and builder, ours first."""
    from functools import partial

    return {
        "ours, FA3": ("fa3", partial(ours, spec, attention="fa3")),
        "ours, cuDNN": ("cudnn", partial(ours, spec, attention="cudnn")),
        "ours, FP8 rowwise, FA3": ("fa3", partial(ours, spec, attention="fa3", recipe="rowwise")),
        "ours, FP8 DelayedScaling, FA3": ("fa3", partial(ours, spec, attention="fa3", recipe="DelayedScaling")),
        "ours, FP8 CurrentScaling, FA3": ("fa3", partial(ours, spec, attention="fa3", recipe="Float8CurrentScaling")),
        "ours, FP8 BlockScaling, FA3": ("fa3", partial(ours, spec, attention="fa3", recipe="Float8BlockScaling")),
        "ours, FP8 rowwise, FP8 attention": ("fa3-fp8", partial(ours, spec, attention="fa3-fp8", recipe="rowwise")),
        "core ComfyUI, as shipped": ("native", partial(core_peer, spec, attention="native")),
        "core ComfyUI, FA3": ("fa3", partial(core_peer, spec, attention="fa3")),
        "core ComfyUI, FP8, as shipped": ("native", partial(core_peer, spec, attention="native", fp8=True)),
        "core ComfyUI, FP8, FA3": ("fa3", partial(core_peer, spec, attention="fa3", fp8=True)),
        "diffusers, eager, as shipped": ("native", partial(diffusers_peer, spec, attention="native", compiled=False)),
        "diffusers, compiled, as shipped": ("native", partial(diffusers_peer, spec, attention="native", compiled=True)),
        "diffusers, eager, FA3": ("fa3", partial(diffusers_peer, spec, attention="fa3", compiled=False)),
        "diffusers, compiled, FA3": ("fa3", partial(diffusers_peer, spec, attention="fa3", compiled=True)),
    }


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "i2v-A14B",
    size: Annotated[str, typer.Option(help="Pixels, width x height.")] = "1280x720",
    frames: Annotated[int, typer.Option(help="Pixel frames, 4n+1.")] = 81,
    layers: Annotated[str, typer.Option(help="The two layer counts whose difference is timed.")] = "2,4",
    comfyui: Annotated[str, typer.Option(help="Folder of a ComfyUI, for core's model.")] = "",
    skip: Annotated[str, typer.Option(help="Leave out peers whose name has this in it, such as 'eager'.")] = "",
    json: Annotated[str, typer.Option(help="Where to write the results file.")] = "",
) -> None:
    """Time a Wan2.2 block of ours beside diffusers' and core ComfyUI's on one GPU."""
    torch.set_float32_matmul_precision("high")
    if comfyui:
        sys.path.insert(0, comfyui)
        sys.argv = sys.argv[:1]  # core parses the command line at import
    spec = MODELS[model]
    width, height = (int(n) for n in size.split("x"))
    inputs = model_inputs(spec, latent_grid(spec, width, height, frames), "cuda", DTYPE)
    counts = tuple(int(n) for n in layers.split(","))
    assert len(counts) == 2
    rows = []
    for name, (attention, peer) in peers(spec).items():
        if skip and skip in name:
            continue
        if name.startswith("core") and not comfyui:
            console.print(f"left out: {name}: no --comfyui given")
            continue
        try:
            with torch.inference_mode() if name.startswith(("ours", "core")) else torch.no_grad():
                layer_ms, fixed_ms = layer_times(peer, counts, inputs)
        except (ImportError, BackendUnavailableError) as error:
            console.print(f"left out: {name}: {error}")
            continue
        except Exception:  # a peer that breaks is a row, not the end of the run
            traceback.print_exc()
            rows.append(
                {"peer": name, "model": model, "size": size, "frames": frames, "failed": traceback.format_exc(limit=1)}
            )
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
            torch._dynamo.reset()
        rows.append({
            "peer": name, "model": model, "size": size, "frames": frames, "attention": attention,
            "recipe": peer.keywords.get("recipe", "scaled_fp8" if peer.keywords.get("fp8") else "none"),
            "layer_ms": round(layer_ms, 2), "fixed_ms": round(fixed_ms, 2),
        })  # fmt: skip
        console.print(rows[-1])
        if json:
            common.write_results(json, rows, "cuda")
    table = Table(title=f"{model} {size} x {frames} frames")
    for column in ("peer", "ms a block", "outside the blocks", "ours with FA3 is faster by"):
        table.add_column(column)
    best = next((row["layer_ms"] for row in rows if row["peer"] == "ours, FA3" and "layer_ms" in row), None)
    for row in rows:
        if "layer_ms" in row:
            ratio = "" if best is None else f"{row['layer_ms'] / best:.3f} x"
            table.add_row(row["peer"], f"{row['layer_ms']:.1f}", f"{row['fixed_ms']:.1f}", ratio)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
