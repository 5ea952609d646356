"""Animate-14B and S2V-14B on a real GPU: fused kernels against the eager ones, FP8 against bf16, every attention by
every backend, and nothing in a forward that waits for the GPU."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import test_model_animate
import test_model_s2v
import torch
from test_model_parity import relative
from torch import Tensor

from wan_fp8 import Attention, Recipe, apply_recipe, set_attention
from wan_fp8.attention.core import ATTENTION, AttentionCore, register_backends
from wan_fp8.models.wan import WanModel

CUDA = torch.device("cuda")
TASKS = ("animate", "s2v")


@pytest.fixture(autouse=True)
def _inference():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[WanModel, dict[str, Tensor], Tensor]]:
    """By task: a tiny fp32 model on the CPU, its inputs, and its velocity, which the unit tests hold against others."""
    found = {}
    with torch.inference_mode():
        for task, module in zip(TASKS, (test_model_animate, test_model_s2v), strict=True):
            model = module.tiny(dataclasses.replace(module.SPEC, num_layers=10 if task == "animate" else 5))
            given = module.inputs()
            found[task] = (model, given, model(**given))
    return found


def on_gpu(made, task: str, dtype: torch.dtype) -> tuple[WanModel, dict[str, Tensor], Tensor]:
    model, given, expected = made[task]
    placed = {
        name: value.to(CUDA, dtype if value.is_floating_point() else value.dtype) for name, value in given.items()
    }
    return copy.deepcopy(model).to(CUDA, dtype), placed, expected


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_and_eager_agree_with_the_cpu(made, task: str, dtype: torch.dtype) -> None:
    model, given, expected = on_gpu(made, task, dtype)
    errors = {}
    for setting in ("triton", "eager"):
        model.fused_kernels = setting
        model.begin_run()
        errors[setting] = relative(model(**given).cpu(), expected)
    low, high = (0, 2e-5) if dtype == torch.float32 else (5e-4, 3e-2)
    assert all(low <= error < high for error in errors.values()), errors
    assert errors["triton"] < 1.2 * errors["eager"] + 1e-6, errors


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("recipe", ["rowwise", "DelayedScaling", "Float8CurrentScaling"])
def test_fp8_is_near_bf16(made, task: str, recipe: str) -> None:
    model, given, expected = on_gpu(made, task, torch.bfloat16)
    apply_recipe(model, Recipe(recipe))
    if recipe == "DelayedScaling":
        model(**given)  # its first scales come from no history
    fp8 = [name for name, value in model.state_dict().items() if value.dtype == torch.float8_e4m3fn]
    assert len(fp8) == 10 * len(model.blocks)
    assert 3e-3 < relative(model(**given).cpu(), expected) < 0.2


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("backend", ["cudnn", "fa2", "fa3"])
def test_every_attention_follows_the_setting(made, task: str, backend: str) -> None:
    register_backends()
    model, given, expected = on_gpu(made, task, torch.bfloat16)
    core = next(module for module in model.modules() if isinstance(module, AttentionCore))
    probe = torch.empty(1, 16, 2, 128, device=CUDA, dtype=torch.bfloat16)
    reason = ATTENTION._backends[backend].refuse(core.request(probe, probe))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    set_attention(model, Attention(backend))
    cores = [module for module in model.modules() if isinstance(module, AttentionCore)]
    called: set[AttentionCore] = set()
    hooks = [core.register_forward_hook(lambda core, *_: called.add(core)) for core in cores]
    assert relative(model(**given).cpu(), expected) < 3e-2
    for hook in hooks:
        hook.remove()
    assert called == set(cores), "fusers and injectors too"
    assert all(core.resolve(probe, probe).backend.name == backend for core in cores)


@pytest.mark.parametrize("task", TASKS)
def test_no_host_synchronisation_inside_a_forward(made, task: str) -> None:
    model, given, _ = on_gpu(made, task, torch.bfloat16)
    model(**given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
