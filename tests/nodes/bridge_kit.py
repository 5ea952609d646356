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
    """``nodes.bridge`` of the pack, imported as ComfyUI does: under a parent package that is not the pack's own name."""
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


def ksample(model: Any, latent: dict[str, Any] | None = None, *, steps: int = 2, cfg: float = 3.5, seed: int = 7, **kw: Any) -> torch.Tensor:
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
