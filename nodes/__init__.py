"""The extension that ComfyUI loads, and the list of its nodes.

Node ids and inputs are saved in users' workflows: they never change.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .animate import WanFP8SampleAnimate
from .caching import WanFP8MagCache, WanFP8MagCacheCalibrate, WanFP8MagCacheSave
from .curves import register_curve_folder
from .inspect import WanFP8Doctor
from .loaders import WanFP8LoadCheckpoint
from .lora import WanFP8LoadLora
from .multigpu import WanFP8MultiGPU, WanFP8StopPool
from .preset import WanFP8Preset
from .receipt import WanFP8QualityReceipt
from .recipe import WanFP8Recipe
from .s2v import WanFP8SampleS2V
from .samplers import WanFP8SampleI2V, WanFP8SampleT2V, WanFP8SampleTI2V
from .save import WanFP8SaveCheckpoint
from .scales import WanFP8SaveScales
from .schedules import WanFP8Sigmas, WanFP8Solver
from .settings import WanFP8Attention, WanFP8Compile
from .sources import register_model_folder
from .text import WanFP8TextEncode

NODES: list[type[io.ComfyNode]] = [
    WanFP8LoadCheckpoint,
    WanFP8LoadLora,
    WanFP8TextEncode,
    WanFP8Preset,
    WanFP8Recipe,
    WanFP8Attention,
    WanFP8Compile,
    WanFP8MagCache,
    WanFP8MagCacheCalibrate,
    WanFP8MagCacheSave,
    WanFP8SampleT2V,
    WanFP8SampleI2V,
    WanFP8SampleTI2V,
    WanFP8SampleAnimate,
    WanFP8SampleS2V,
    WanFP8Sigmas,
    WanFP8Solver,
    WanFP8SaveCheckpoint,
    WanFP8SaveScales,
    WanFP8QualityReceipt,
    WanFP8Doctor,
    WanFP8MultiGPU,
    WanFP8StopPool,
]


class WanFP8Extension(ComfyExtension):
    """Everything that this pack adds to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ComfyExtension:
    """Called once by ComfyUI when it loads the pack."""
    register_model_folder()
    register_curve_folder()
    return WanFP8Extension()
