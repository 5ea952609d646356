"""A real ComfyUI core in this process, for benchmarks: our bridge beside it, random FP8 experts as MODELs, and cards
smaller than the one at hand."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

COMFYUI = Path(os.environ.get("COMFYUI_DIR") or common.ROOT / ".host" / "comfyui")
PACKAGE = "wan_fp8_pack"
GIB = 2**30


def import_core(device: str) -> None:
    """Make ``import comfy`` and ``module`` work; core decides at import whether there is a GPU."""
    if not (COMFYUI / "comfy" / "options.py").is_file():
        raise SystemExit(f"there is no ComfyUI at {COMFYUI}: run 'python scripts/host.py', or set COMFYUI_DIR")
    sys.path.insert(0, str(COMFYUI))
    arguments, sys.argv = sys.argv, sys.argv[:1]
    import comfy.cli_args

    comfy.cli_args.args.cpu = device == "cpu"
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfy.model_management

    sys.argv = arguments
    assert comfy.model_management.get_torch_device().type == torch.device(device).type
    for name, path in ((PACKAGE, common.ROOT), (f"{PACKAGE}.nodes", common.ROOT / "nodes")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package


def module(name: str) -> Any:
    """A module of the pack, such as ``nodes.bridge`` or ``wan_fp8.quant``, as ComfyUI would import it."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def random_expert(spec: Any, recipe: Any, expert: str, seed: int) -> Any:
    """A MODEL with ``recipe``, whose FP8 weights are random bytes in host memory, each in pages of its own."""
    wan, convert = module("wan_fp8.models.wan"), module("wan_fp8.quant.convert")
    generator = torch.Generator().manual_seed(seed)
    # unit gain: e4m3 values of deviation 64 under a scale that brings a matrix to 1 / sqrt(columns)
    values = (64 * torch.randn(1 << 24, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
    pool = values.view(torch.uint8)
    with torch.device("meta"):
        net = wan.build_model(spec)
    state: dict[str, Tensor] = {}
    for name, meta in net.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer != name and recipe.converts(layer):
            state[name] = _filled(meta.shape, pool, convert.PAGE)
            scale = torch.full(_scale_shape(recipe, meta.shape), 1 / (64 * math.sqrt(meta.shape[1])))
            net.get_submodule(layer).weight_scale = torch.nn.Parameter(scale, requires_grad=False)
            state[f"{layer}.weight_scale"] = scale
            continue
        value = torch.randn(meta.shape, generator=generator)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
            value = 1 + 0.1 * value
        else:
            value *= 1 / math.sqrt(meta[0].numel()) if meta.ndim > 1 and "modulation" not in name else 0.1
        state[name] = value.to(torch.bfloat16)
    net.load_state_dict(state, assign=True)
    bridge = module("nodes.bridge")
    return bridge.with_recipe(bridge.build_model_patcher(net, expert), recipe)[0]


def _scale_shape(recipe: Any, shape: torch.Size) -> tuple[int, ...]:
    shapes = {"row": (shape[0], 1), "block": (shape[0] // 128, shape[1] // 128)}
    return shapes.get(str(recipe.granularity), ())


def _filled(shape: torch.Size, pool: Tensor, page: int) -> Tensor:
    count = math.prod(shape)
    whole = torch.empty(count + page, dtype=torch.uint8)
    target = whole[-whole.data_ptr() % page :][:count]
    for first in range(0, count, pool.numel()):
        part = target[first : first + pool.numel()]
        part.copy_(pool[: part.numel()])
    return target.view(torch.float8_e4m3fn).view(shape)


@contextlib.contextmanager
def card(gib: float | None, device: str, models: list[Any]) -> Iterator[None]:
    """Core, and torch's allocator, see a GPU of ``gib`` GiB; None: the one that is there.

    What the driver takes on this GPU counts as taken on the small one. On a CPU, core knows no partial load: every
    load is made one, of the share that a card of that size would hold.
    """
    import comfy.model_management as management
    import comfy.model_patcher

    if gib is None:
        yield
        return
    if device == "cpu":
        original = comfy.model_patcher.ModelPatcher.load

        def load(self: Any, device_to: Any = None, *_: Any, **more: Any) -> Any:
            return original(self, device_to, lowvram_model_memory=max(1, int(self.model_size() * (gib - 8) / 16)))

        comfy.model_patcher.ModelPatcher.load = load
        try:
            yield
        finally:
            comfy.model_patcher.ModelPatcher.load = original
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    limit = int(gib * GIB)
    originals = management.get_total_memory, management.get_free_memory

    def get_total_memory(dev: Any = None, torch_total_too: bool = False) -> Any:
        if dev is not None and torch.device(dev).type == "cpu":
            return originals[0](dev, torch_total_too)
        return (limit, torch.cuda.memory_reserved()) if torch_total_too else limit

    def get_free_memory(dev: Any = None, torch_free_too: bool = False) -> Any:
        if dev is not None and torch.device(dev).type == "cpu":
            return originals[1](dev, torch_free_too)
        stats = torch.cuda.memory_stats()
        active, reserved = (stats[f"{kind}_bytes.all.current"] for kind in ("active", "reserved"))
        found = limit - outside - active
        return (found, reserved - active) if torch_free_too else found

    management.get_total_memory, management.get_free_memory = get_total_memory, get_free_memory
    torch.cuda.set_per_process_memory_fraction((limit - outside) / total)  # beyond it, out of memory
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        management.get_total_memory, management.get_free_memory = originals


class Traffic:
    """Bytes of weights that cross the bus as parameters move."""

    def __init__(self, models: list[Any]) -> None:
        self.loaded = self.copied_back = 0
        homes, leaf = module("nodes.bridge.homes"), module("wan_fp8.models.layers").Leaf

        def counted(one: Any, function: Any) -> None:
            def moving(value: Tensor) -> Tensor:
                made = function(value)
                if made.device != value.device:
                    there = made.device.type != "cpu"
                    self.loaded += there * value.nbytes
                    self.copied_back += (not there) * value.nbytes
                return made

            homes.move(one, moving)

        for model in models:
            for one in model.model.diffusion_model.modules():
                if isinstance(one, leaf):
                    one.mover = counted


def offloaded(model: Any) -> dict[str, float]:
    """What of a loaded MODEL stays in host memory, crosses the bus at every forward, and is pinned."""
    leaf = module("wan_fp8.models.layers").Leaf
    rest = [
        parameter
        for one in model.model.diffusion_model.modules()
        if isinstance(one, leaf) and one.comfy_cast_weights
        for parameter in one.parameters(recurse=False)
        if parameter.device.type == "cpu"
    ]
    cuda = torch.cuda.is_available()
    pinned = [parameter for parameter in rest if cuda and parameter.is_pinned()]
    return {
        "streamed_gib": round(sum(p.nbytes for p in rest) / GIB, 3),
        "pinned_gib": round(sum(p.nbytes for p in pinned) / GIB, 3),
    }
