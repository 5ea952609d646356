"""What the bridge's tests share: the pack imported beside a real core, tiny models, and a few of core's own nodes."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch

PACK = Path(__file__).resolve().parent.parent.parent
PACKAGE = "wan_fp8_pack"
TEXT_DIM = 4096  # core detects no other


def bridge() -> Any:
    """``nodes.bridge`` of the pack, imported as ComfyUI does: under a parent package that is not the pack's own
    name."""
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(PACK)]
        sys.modules[PACKAGE] = package
        nodes = types.ModuleType(f"{PACKAGE}.nodes")
        nodes.__path__ = [str(PACK / "nodes")]
        sys.modules[f"{PACKAGE}.nodes"] = nodes
    return importlib.import_module(f"{PACKAGE}.nodes.bridge")


def engine(name: str = "") -> Any:
    """A module of the engine as the bridge sees it."""
    bridge()
    return importlib.import_module(f"{PACKAGE}.wan_fp8" + (f".{name}" if name else ""))


def core_weights(
    kind: str = "t2v", layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random weights under the official names, at the smallest sizes that core detects."""
    import comfy.ldm.wan.model
    import comfy.ops

    sizes: dict[str, dict[str, int]] = {
        "t2v": dict(dim=128, ffn_dim=256, num_heads=1, in_dim=16, out_dim=16),
        "i2v": dict(dim=128, ffn_dim=256, num_heads=1, in_dim=36, out_dim=16),
        "ti2v": dict(dim=256, ffn_dim=256, num_heads=2, in_dim=48, out_dim=48),
    }
    net = comfy.ldm.wan.model.WanModel(
        **sizes[kind], num_layers=layers, dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in net.state_dict().items():
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
            weights[name] = 1 + 0.1 * torch.randn(value.shape, generator=generator)
        elif name.endswith("modulation"):
            weights[name] = 0.3 * torch.randn(value.shape, generator=generator)
        elif value.ndim == 1:
            weights[name] = 0.05 * torch.randn(value.shape, generator=generator)
        else:
            weights[name] = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
    return {name: value.to(dtype) for name, value in weights.items()}


def core_model(kind: str = "t2v", **options: Any) -> Any:
    """A MODEL from core's own loader."""
    import comfy.sd

    load_options = options.pop("model_options", {})
    return comfy.sd.load_diffusion_model_state_dict(core_weights(kind, **options), model_options=load_options)


def prompt(seed: int = 1, rows: int = 8) -> list[Any]:
    """A CONDITIONING."""
    return [[torch.randn(1, rows, TEXT_DIM, generator=torch.Generator().manual_seed(seed)), {}]]


def empty_latent(channels: int = 16, frames: int = 2, size: int = 4) -> dict[str, torch.Tensor]:
    """A LATENT of zeros."""
    return {"samples": torch.zeros(1, channels, frames, size, size)}


def ksample(
    model: Any, latent: dict[str, Any] | None = None, *, steps: int = 2, cfg: float = 3.5, seed: int = 7, **kw: Any
) -> torch.Tensor:
    """Core's KSampler; returns the latents."""
    import comfy.sample

    latent = empty_latent(model.model.latent_format.latent_channels) if latent is None else latent
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    positive, negative = kw.pop("positive", prompt(1)), kw.pop("negative", prompt(2))
    noise = comfy.sample.prepare_noise(samples, seed)
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        kw.pop("sampler", "euler"),
        kw.pop("scheduler", "simple"),
        positive,
        negative,
        samples,
        noise_mask=latent.get("noise_mask"),
        disable_pbar=True,
        seed=seed,
        **kw,
    )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def own_net(kind: str = "t2v", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """An engine model filled with the weights of ``core_weights``, as our loader would."""
    weights = core_weights(kind, **options)
    wan, specs = engine("models.wan"), engine("models.specs")
    patch, ffn = weights["patch_embedding.weight"], weights["blocks.0.ffn.0.weight"]
    spec = specs.ModelSpec(
        task=specs.Task(kind),
        dim=patch.shape[0],
        ffn_dim=ffn.shape[0],
        num_heads=patch.shape[0] // 128,
        num_layers=1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks.")),
        in_dim=patch.shape[1],
        out_dim=weights["head.head.weight"].shape[0] // 4,
    )
    with torch.device("meta"):
        net = wan.build_model(spec)
    net.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, strict=True, assign=True)
    return net


def own_model(kind: str = "t2v", **options: Any) -> Any:
    """A MODEL as our own loader returns it."""
    return bridge().build_model_patcher(own_net(kind, **options))


def own_fp8_model(rows: bool = True, **options: Any) -> Any:
    """A MODEL of ours whose block linears are FP8."""
    weights, scales = to_fp8(core_weights(**options), rows)
    net = own_net(**options)
    for layer, scale in scales.items():
        leaf = net.get_submodule(layer)
        leaf.weight = torch.nn.Parameter(weights[f"{layer}.weight"], requires_grad=False)
        leaf.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    return bridge().build_model_patcher(net)


def to_fp8(
    weights: dict[str, torch.Tensor], rows: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Block linears as e4m3 with a scale; returns weights and scales (by layer)."""
    out, scales = dict(weights), {}
    for name, value in weights.items():
        if name.startswith("blocks.") and value.ndim == 2:
            amax = value.abs().amax(1, keepdim=True) if rows else value.abs().amax()
            scale = (amax / 448).float()
            out[name] = (value / scale).to(torch.float8_e4m3fn)
            scales[name.removesuffix(".weight")] = scale
    return out, scales


def quantised_core_model(form: str, kind: str = "t2v", seed: int = 0) -> Any:
    """A MODEL from core's loader in one of its storage formats."""
    import json

    import comfy.sd

    if form in ("fp32", "fp16", "bf16"):
        return core_model(
            kind,
            seed=seed,
            model_options={"dtype": getattr(torch, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[form])},
        )
    weights = core_weights(kind, seed=seed)
    if form == "fp8":
        return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float8_e4m3fn})
    weights, scales = to_fp8(weights)
    if form == "scaled_fp8":
        for layer, scale in scales.items():
            weights[f"{layer}.scale_weight"] = scale
        weights["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
        return comfy.sd.load_diffusion_model_state_dict(weights)
    assert form == "mixed"
    for layer, scale in scales.items():
        weights[f"{layer}.weight_scale"] = scale
    layers = {layer: {"format": "float8_e4m3fn"} for layer in scales}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return comfy.sd.load_diffusion_model_state_dict(weights, metadata=metadata)


def lora_pairs(
    weights: dict[str, torch.Tensor], rank: int = 4, seed: int = 5, scale: float = 1.0
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(down, up) for every linear of the blocks, by layer name."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, value in sorted(weights.items()):
        if name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2:
            out_features, in_features = value.shape
            down = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            up = torch.randn(out_features, rank, generator=generator) * 0.3 * scale / rank**0.5
            pairs[name.removesuffix(".weight")] = (down, up)
    return pairs


def core_lora(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A LoRA file in the form that core's loader reads."""
    file = {}
    for layer, (down, up) in pairs.items():
        file[f"diffusion_model.{layer}.lora_A.weight"] = down
        file[f"diffusion_model.{layer}.lora_B.weight"] = up
    return file


def with_core_lora(model: Any, file: dict[str, torch.Tensor], strength: float = 1.0) -> Any:
    """What core's LoraLoaderModelOnly does."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, file, strength, 0)[0]


def state_bytes(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the transformer's stored weights, for bit-equality."""
    return {k: v.detach().clone() for k, v in model.model.diffusion_model.state_dict().items()}


def same_bytes(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal to the bit."""
    return before.keys() == after.keys() and all(
        before[k].dtype == after[k].dtype
        and torch.equal(before[k].flatten().view(torch.uint8), after[k].flatten().view(torch.uint8))
        for k in before
    )


def unload_everything() -> None:
    """What core does when it needs all the memory."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
