"""A cache of steps, or the measuring of a curve for it, around one run; and by what a MODEL's curve is found again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...wan_fp8.caching import RunPlan
from ...wan_fp8.errors import InputError, UnsupportedPatchError
from .hosted_model import SHARE, HostedModel, schedule_of_run, settings_of
from .voice import say

OTHER_CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}
"""Keys of core's own caches, as wrappers and in ``transformer_options`` (LazyCache uses EasyCache's there)."""
WHO = {"high_noise": "high-noise expert", "low_noise": "low-noise expert"}
SAMPLED = ("patch_embedding.weight", "time_embedding.0.weight", "time_projection.1.weight", "head.head.weight")
"""Weights that no recipe changes and every training does."""
ROWS = 8


def refuse_other_caches(patcher: Any) -> None:
    """Raise where core's EasyCache or LazyCache is on the MODEL as well: each would take the other's skipped steps for
    computed ones."""
    keys = {key for by_key in getattr(patcher, "wrappers", {}).values() for key, found in by_key.items() if found}
    options = patcher.model_options.get("transformer_options", {})
    keys |= {key for by_key in options.get("wrappers", {}).values() for key, found in by_key.items() if found}
    names = sorted(OTHER_CACHES[key] for key in keys & OTHER_CACHES.keys())
    if not names and "easycache" in options:
        names = ["EasyCache"]
    if names:
        raise UnsupportedPatchError(
            f"this MODEL carries core's {' and '.join(names)} beside Wan2.2 MagCache, and each would take the other's "
            "skipped steps for computed ones: keep one of the two nodes"
        )


def prepare_cache(patcher: Any, net: HostedModel, sigmas: Tensor) -> None:
    """Before a run, and before its weights are loaded: refuse what cannot be cached; start a recording.

    Raises:
        InputError: the policy's own refusal.
        UnsupportedPatchError: two caches, or a cache while a curve is measured.
    """
    settings = net.settings_of_run
    if settings.cache is None and settings.recording is None:
        return
    refuse_other_caches(patcher)
    if settings.cache is not None and settings.recording is not None:
        raise UnsupportedPatchError(
            "this MODEL carries Wan2.2 MagCache and Wan2.2 Calibrate MagCache, and a curve is measured with every step "
            "computed: remove the first while you measure"
        )
    options = patcher.model_options.get("transformer_options", {})
    own = sigmas.flatten().tolist()
    if len(own) < 2:
        return
    if settings.recording is not None:
        settings.recording.begin(id(net), net.expert_of_run, own)
        return
    assert settings.cache is not None
    schedule = schedule_of_run(options) or tuple(own)
    first, end = options.get(SHARE) or (0, len(schedule) - 1)
    plan = RunPlan(spec=net.spec, schedule=schedule, first=first, end=end, expert=net.expert_of_run)
    reason = settings.cache.refusal(plan)
    if reason is not None:
        raise InputError(reason)


def report_cache(net: HostedModel) -> None:
    """Tell the user what a cache of steps did in the run that ends, and keep it for a receipt."""
    told = []
    for cache in net.caches.values():
        report = cache.finish()
        if report.computed + report.skipped:
            say("\n".join(report.lines(WHO.get(cache.expert or "", ""))), keep=True)
            told.append(report.facts(cache.expert))
    net.cache_facts = tuple(told)


def fingerprint(patcher: Any) -> str:
    """A name for the weights of a MODEL, LoRAs included. FP8 recipes do not change it; storage in fp16 or plain FP8
    does, and so does whether a LoRA is merged or live."""
    digest = hashlib.sha256()
    net = patcher.model.diffusion_model
    if getattr(net, "is_remote", False):
        state = net.weights_named(SAMPLED)
    else:
        state = net.state_dict() if not hasattr(patcher, "backup") else _stored(patcher, net)
    for name in SAMPLED:
        digest.update(name.encode() + _bytes(state[name]))
    for key in sorted(patcher.patches, key=str):
        for strength, patch, model_strength, *_ in patcher.patches[key]:
            digest.update(f"{key} {float(strength):.6g} {float(model_strength):.6g}".encode())
            for tensor in _tensors(patch):
                digest.update(_bytes(tensor))
    live = settings_of(patcher).lora
    for term in () if live is None else live.terms:
        for name, pair in sorted(term.pairs.items()):
            digest.update(f"{name} {term.strength * pair.factor:.6g}".encode() + _bytes(pair.down) + _bytes(pair.up))
    return digest.hexdigest()[:16]


def _stored(patcher: Any, net: Any) -> dict[str, Tensor]:
    """Weights without what is merged into them now."""
    state = dict(net.state_dict())
    for key, kept in patcher.backup.items():
        state[key.removeprefix("diffusion_model.")] = kept.weight
    return state


def _bytes(weight: Tensor) -> bytes:
    """Some of a tensor's values, rounded to what every storage type holds."""
    rows = weight.detach().reshape(-1)[: ROWS * 512].to("cpu", torch.float32)
    return str(tuple(weight.shape)).encode() + rows.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def _tensors(patch: Any) -> Iterator[Tensor]:
    """The tensors of one of core's patches: an adapter's weights, a difference, or nested tuples of either."""
    if isinstance(patch, Tensor):
        yield patch
    elif isinstance(patch, (list, tuple)):
        for part in patch:
            yield from _tensors(part)
    elif hasattr(patch, "weights"):
        yield from _tensors(patch.weights)
