"""The only part of the pack that touches ComfyUI's internals: patchers, base models, samplers, LoRA patches.

It detects what the running ComfyUI offers and never compares versions.
"""

from __future__ import annotations

from .build import build_model_patcher
from .caching import fingerprint, refuse_other_caches
from .clip_vision import image_rows, lazy_clip_vision, load_clip_vision
from .fork import expert_of, fork, hosted, is_hosted, spec_of
from .hosted_model import HostSettings, refuse_context_windows, settings_of
from .lora import WithLora, load_lora
from .measure import Measured, in_float32, measured, plain
from .memory import free_host_bytes
from .recipe import fp8_layers, recipe_of, rounded_again, with_recipe
from .remote import in_pool, is_remote, remote_of, source_of
from .remote_vae import vae_in_pool, vae_needs
from .residency import make_resident, manage
from .sampling import (
    core_sigmas,
    make_sampler,
    raw_latents,
    sampler_names,
    scheduler_names,
    set_shift,
    where_it_computes,
    with_timesteps,
)
from .save import save_model, save_scales
from .settings import attention_request, device_of, main_device, with_settings
from .stages import Progress, Stage, run_stages
from .vae import lazy_vae, load_vae
from .voice import kept_words, say, stop_if_cancelled

__all__ = [
    "HostSettings",
    "Measured",
    "Progress",
    "Stage",
    "WithLora",
    "attention_request",
    "build_model_patcher",
    "core_sigmas",
    "device_of",
    "expert_of",
    "fingerprint",
    "fork",
    "fp8_layers",
    "free_host_bytes",
    "hosted",
    "image_rows",
    "in_float32",
    "in_pool",
    "is_hosted",
    "is_remote",
    "kept_words",
    "lazy_clip_vision",
    "lazy_vae",
    "load_clip_vision",
    "load_lora",
    "load_vae",
    "main_device",
    "make_resident",
    "make_sampler",
    "manage",
    "measured",
    "plain",
    "raw_latents",
    "recipe_of",
    "refuse_context_windows",
    "refuse_other_caches",
    "remote_of",
    "rounded_again",
    "run_stages",
    "sampler_names",
    "save_model",
    "save_scales",
    "say",
    "scheduler_names",
    "set_shift",
    "settings_of",
    "source_of",
    "spec_of",
    "stop_if_cancelled",
    "vae_in_pool",
    "vae_needs",
    "where_it_computes",
    "with_recipe",
    "with_settings",
    "with_timesteps",
]
