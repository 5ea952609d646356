"""Put a recipe to work in a model, and take it away again.

A linear is converted in place: the same module, its ``weight`` now e4m3 and a ``weight_scale`` beside it. What it was
made of stays in reach (``source``) where that costs nothing, which is what LoRA merges start from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.quantize import BLOCK, E4M3, E8M0, MX_BLOCK, Granularity, quantize_weight, weight_granularity
from ..models.layers import HIGH_PRECISION, Linear
from ..models.wan import WanModel
from .linear import FP8Linear, InputQuantizer, Quantization
from .recipe import LINEARS, Recipe

log = logging.getLogger("wan_fp8")

PAGE = 4096
_SHARED = {"self_attn.k": "self_attn.q", "self_attn.v": "self_attn.q", "cross_attn.v": "cross_attn.k"}
"""Linears that read the same input as another one."""
_TEXT = "cross_attn.k"
"""Its input, the text, is cast once a prompt and by its own maximum: a history would hold other prompts."""


def apply_recipe(
    model: WanModel,
    recipe: Recipe,
    *,
    device: torch.device | str | None = None,
    move: bool = False,
    keep_sources: bool | None = None,
) -> WanModel:
    """Turn the linears of every block into FP8, one tensor at a time; undone on an error where the originals are kept.

    Weights that a file holds in e4m3 keep their bytes where the recipe can multiply them (one scale for the tensor
    serves every recipe, MXFP8 only as a power of two; row scales serve ``rowwise``, finer ones
    the recipe that makes such); elsewhere they are made real values and rounded again (``rounded_again`` counts them).
    Applying the same recipe again changes nothing; another recipe is made from the original weights.

    Args:
        device: where to cast; None: where each weight lies. A GPU casts in seconds what a CPU takes minutes for.
        move: leave the FP8 weights on ``device``; False puts them where the weights were.
        keep_sources: keep the original weights in reach, to undo the recipe and to merge LoRAs in high precision.
            None: those in host memory (which are views of the file where the loader mapped it), not those on a GPU.
    Returns:
        ``model``, changed in place.
    Raises:
        InputError: widths that the recipe does not divide, a ``keep`` that names nothing, or original weights that
            another recipe is to be made of and that are gone.
    """
    present = recipe_of(model)
    if recipe.is_none:
        return model if present == recipe else remove_recipe(model)
    wanted = {name: module for name, module in _block_linears(model) if recipe.converts(name)}
    if present == recipe and all(isinstance(module, FP8Linear) for module in wanted.values()):
        return model
    _check_weights(model)
    _check_widths(wanted, recipe)
    _check_keep(model, recipe)
    if present is not None:
        _leave(model, present, recipe, wanted)
    fresh = [module for module in wanted.values() if not isinstance(module, FP8Linear)]
    try:
        for module in fresh:
            _convert(module, recipe, device, move, keep_sources)
    except BaseException:  # out of memory, mostly: what was done is undone, or left in a state that works
        for module in fresh:
            if isinstance(module, FP8Linear) and module.original is not None:
                _restore(module)
        _wire(model, recipe)
        if recipe_of(model) is not None and not any(isinstance(m, FP8Linear) for m in model.modules()):
            model.quantization = None
        raise
    _wire(model, recipe)
    return model


def check_recipe(model: WanModel, recipe: Recipe) -> None:
    """
    Raises:
        InputError: ``recipe`` does not fit the widths or names of ``model``, whatever its weights.
    """
    if not recipe.is_none:
        _check_widths({name: module for name, module in _block_linears(model) if recipe.converts(name)}, recipe)
        _check_keep(model, recipe)


def remove_recipe(model: WanModel) -> WanModel:
    """Put the original weights back, where the weights are now; returns the model.

    Raises:
        InputError: the original weights are gone; nothing was changed.
    """
    converted = [(name, module) for name, module in _block_linears(model) if isinstance(module, FP8Linear)]
    if converted:
        _check_weights(model)
    _require_originals(converted)
    for _, module in converted:
        _restore(module)
    model.quantization = None
    _forget(model)
    return model


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe at work in ``model``; None for none."""
    quantization = getattr(model, "quantization", None)
    return quantization.recipe if isinstance(quantization, Quantization) else None


def rounded_again(model: nn.Module) -> int:
    """How many linears held FP8 under other scales before, so that their values were rounded a second time."""
    return sum(isinstance(module, FP8Linear) and module.rounded_again for module in model.modules())


def share_recipe(model: WanModel, other: WanModel) -> None:
    """Give ``other``, which holds the same stored tensors under plain linears, the recipe of ``model``.

    Scales that ``model`` had loaded are where the runs of ``other`` begin as well.
    """
    recipe = recipe_of(model)
    if recipe is None:
        return
    theirs = dict(_block_linears(other))
    for name, module in _block_linears(model):
        if isinstance(module, FP8Linear):
            linear = theirs[name]
            linear.source = module.source
            linear.__class__ = FP8Linear
            assert isinstance(linear, FP8Linear)
            linear.original, linear.rounded_again = module.original, module.rounded_again
    _wire(other, recipe)
    assert isinstance(model.quantization, Quantization) and isinstance(other.quantization, Quantization)
    if model.quantization.scales is not None and other.quantization.scales is not None:
        other.quantization.scales.start_like(model.quantization.scales)


# ---- pieces --------------------------------------------------------------------------------------------------------


def _block_linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type, var-annotated]
        for name in LINEARS:
            yield f"blocks.{index}.{name}", block.get_submodule(name)


def _check_weights(model: WanModel) -> None:
    if model.fixed_weights is not None:
        raise InputError(f"the recipe cannot be changed: {model.fixed_weights}")


def _check_widths(wanted: dict[str, Linear], recipe: Recipe) -> None:
    step = {Granularity.BLOCK: BLOCK, Granularity.MX: MX_BLOCK}.get(recipe.granularity, 16)
    for name, module in wanted.items():
        if module.in_features % step or module.out_features % step:
            raise InputError(
                f"recipe {recipe.name} needs widths divisible by {step}; {name} is {module.out_features} x "
                f"{module.in_features}: choose {'none' if step == 16 else 'rowwise'}"
            )


def _check_keep(model: nn.Module, recipe: Recipe) -> None:
    names = [name for name, _ in _block_linears(model)]
    without = Recipe(recipe.name)
    for prefix in recipe.keep:
        one = Recipe(recipe.name, keep=(prefix,))
        if all(one.converts(name) == without.converts(name) for name in names):
            raise InputError(
                f"keep names {prefix!r}, with which no FP8 layer begins: use a prefix such as 'blocks.0.' "
                f"(there are {len(model.blocks)} blocks), 'cross_attn.' or 'ffn.2'"  # type: ignore[arg-type]
            )


def _leave(model: WanModel, present: Recipe, recipe: Recipe, wanted: dict[str, Linear]) -> None:
    """Undo what the next recipe cannot use: all of it if weights are scaled in another way, else what it keeps."""
    same = present.granularity is recipe.granularity
    stale = [
        (name, module)
        for name, module in _block_linears(model)
        if isinstance(module, FP8Linear) and not (same and name in wanted)
    ]
    _require_originals(stale)
    for _, module in stale:
        _restore(module)


def _require_originals(modules: list[tuple[str, FP8Linear]]) -> None:
    gone = [name for name, module in modules if module.original is None]
    if gone:
        raise InputError(
            f"the original weights of {len(gone)} layers ({gone[0]}, ...) are gone, so that this recipe cannot be "
            "undone: load the model again, or apply the recipe with keep_sources=True"
        )


def _convert(
    module: Linear, recipe: Recipe, device: torch.device | str | None, move: bool, keep_sources: bool | None
) -> None:
    stored, scale, rest = module.weight.detach(), module.weight_scale, module.weight.device
    keep = rest.type == "cpu" if keep_sources is None else keep_sources
    home = torch.device(device) if move and device is not None else rest
    kept = _same_bytes(stored, scale, recipe.granularity)
    if kept is not None:
        qdata, fresh = stored, kept
    else:
        values = stored if device is None else stored.to(device)
        if stored.dtype not in HIGH_PRECISION:
            moved = None if scale is None else scale.detach().to(values.device)
            module.weight_scale = None if moved is None else nn.Parameter(moved, requires_grad=False)
            values = module.dequantized(values, torch.float32)
        qdata, fresh = quantize_weight(values, recipe.granularity, power_of_2=recipe.granularity is Granularity.BLOCK)
    reachable = keep or kept is not None
    module.source = stored if keep and stored.dtype in HIGH_PRECISION else None
    resting = in_pages(qdata) if home.type == "cpu" and kept is None else qdata.to(home)
    module.weight = nn.Parameter(resting, requires_grad=False)
    module.weight_scale = nn.Parameter(fresh.to(home), requires_grad=False)
    module._merged = None
    module.__class__ = FP8Linear
    assert isinstance(module, FP8Linear)
    module.rounded_again = kept is None and stored.dtype not in HIGH_PRECISION
    module.original = (stored, None if scale is None else scale.detach()) if reachable else None


def in_pages(value: Tensor) -> Tensor:
    """``value`` in host memory in pages of its own, from the first byte of one: memory is pinned in pages, and two
    weights that share one cannot both be."""
    count = value.numel() * value.element_size()
    whole = torch.empty(-(-count // PAGE) * PAGE + PAGE, dtype=torch.uint8)
    first = -whole.data_ptr() % PAGE
    return whole[first : first + count].view(value.dtype).view(value.shape).copy_(value)


def _same_bytes(stored: Tensor, scale: Tensor | None, granularity: Granularity) -> Tensor | None:
    """The scale under which e4m3 bytes serve ``granularity`` as they are; None where they do not."""
    if stored.dtype != E4M3:
        return None
    if scale is None or scale.dtype != E8M0:
        scale = torch.ones((), device=stored.device) if scale is None else scale.detach().float()
    kind = weight_granularity(scale, stored.shape)
    if kind is granularity:
        return scale.reshape(()) if kind is Granularity.TENSOR else scale
    if kind is not Granularity.TENSOR:
        return None
    rows, columns = stored.shape
    if granularity is Granularity.MX:
        mantissa, exponent = (float(part) for part in torch.frexp(scale))
        fits = mantissa == 0.5 and -126 <= exponent <= 128  # a power of two that E8M0 holds
        assert E8M0 is not None
        return scale.reshape(1, 1).to(E8M0).expand(rows, columns // MX_BLOCK).contiguous() if fits else None
    shape = (rows, 1) if granularity is Granularity.ROW else (rows // BLOCK, columns // BLOCK)
    return scale.reshape(1, 1).expand(shape).contiguous()


def _restore(module: FP8Linear) -> None:
    assert module.original is not None
    weight, scale = module.original
    home = module.weight.device
    module.weight = nn.Parameter(weight.to(home), requires_grad=False)
    module.weight_scale = None if scale is None else nn.Parameter(scale.to(home), requires_grad=False)
    module.source = module._merged = None
    for name in ("original", "rounded_again", "input_quantizer", "quantization"):
        module.__dict__.pop(name, None)
    module.__class__ = Linear  # type: ignore[assignment]


def _wire(model: WanModel, recipe: Recipe) -> None:
    """One ``Quantization`` for the model, one ``InputQuantizer`` for each input that linears read."""
    converted = {name: module for name, module in _block_linears(model) if isinstance(module, FP8Linear)}
    readers: dict[str, list[FP8Linear]] = {}
    for name, module in converted.items():
        block, layer = name.rsplit(".", 2)[0], ".".join(name.rsplit(".", 2)[1:])
        readers.setdefault(f"{block}.{_SHARED.get(layer, layer)}", []).append(module)
    sites = [name for name in readers if not name.endswith(_TEXT)]
    quantization = Quantization(recipe, sites)
    index = {name: number for number, name in enumerate(sites)}
    for name, modules in readers.items():
        site = index.get(name) if recipe.is_delayed else None
        quantizer = None if recipe.is_weight_only else InputQuantizer(quantization, site, text=name.endswith(_TEXT))
        for module in modules:
            module.quantization, module.input_quantizer = quantization, quantizer
    quantization.reduce_with(model.amax_reduction)
    model.quantization = quantization
    _forget(model)


def _forget(model: WanModel) -> None:
    """Drop what was made with other weights."""
    model.clear_text_cache()
    model.compiled_parts.clear()
