"""Wan FP8: a pure-PyTorch engine for Wan2.2 video models. It never imports ComfyUI; importing it initialises nothing.

Public names are resolved on first use, so that ``import wan_fp8`` costs no more than ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "load_transformer": "checkpoint.load",
    "save_checkpoint": "checkpoint.save",
    "load_text_encoder": "models.text_encoder",
    "Lora": "checkpoint.live_lora",
    "set_lora": "checkpoint.live_lora",
    "remove_lora": "checkpoint.live_lora",
    "set_attention": "attention",
    "Attention": "attention",
    "Sparsity": "attention",
    "compile_blocks": "compile",
    "remove_compile": "compile",
    "Compile": "compile",
    "Recipe": "quant",
    "apply_recipe": "quant",
    "remove_recipe": "quant",
    "freeze_scales": "quant",
    "save_scales": "quant",
    "load_scales": "quant",
    "MagCache": "caching",
    "apply_magcache": "caching",
    "remove_magcache": "caching",
    "ParallelDims": "parallel",
    "parallelize": "parallel",
    "remove_parallel": "parallel",
    "caching": "caching",
    "sampling": "sampling",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_EXPORTS[name]}", __name__)
    value = module if name == _EXPORTS[name] in ("caching", "sampling") else getattr(module, name)
    globals()[name] = value
    return value
