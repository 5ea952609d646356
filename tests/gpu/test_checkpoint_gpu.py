"""Loading straight to a GPU: bytes travel as stored and are converted there, to the same values as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_kit import official_state, quantised, tiny_spec
from safetensors.torch import save_file

from wan_fp8 import Recipe
from wan_fp8.checkpoint.load import load_transformer

SPEC = tiny_spec("t2v", dim=256, layers=3)
CONVENTIONS = ["fp32", "fp8", "scaled_fp8", "comfy_quant", "lightx2v_fp8", "lightx2v_int8"]


@pytest.mark.parametrize("map_files", [True, False])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_gpu_gets_what_the_cpu_gets(tmp_path: Path, convention: str, map_files: bool) -> None:
    state, metadata = official_state(SPEC), None
    if convention != "fp32":
        state, metadata, _ = quantised(state, convention)
    path = tmp_path / "t2v_high_noise.safetensors"
    save_file(state, path, metadata=metadata)
    choices = [{"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "keep_fp8": True}, {"dtype": None}]
    for choice in choices[: 2 if "int8" in convention else 3]:
        here = load_transformer(path, map_files=map_files, **choice).state_dict()
        there = load_transformer(path, device="cuda", map_files=map_files, **choice).state_dict()
        assert here.keys() == there.keys()
        for name, value in here.items():
            assert there[name].device.type == "cuda" and there[name].dtype == value.dtype
            assert torch.equal(there[name].cpu().view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), name


def _anonymous() -> int:
    """Bytes of this process's memory that are no file's pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["rowwise", "DelayedScaling", "Float8BlockScaling"])
def test_loading_quantises_while_it_streams(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Never more on the GPU than 1.2 times the FP8 model, nor more host memory than some megabytes beside the file's
    pages; the same bits as on the CPU."""
    spec = tiny_spec("t2v", dim=1024, layers=24)
    path = tmp_path / "t2v_high_noise.safetensors"
    generator = torch.Generator("cuda").manual_seed(0)
    state = official_state(tiny_spec("t2v", dim=1024, layers=1))
    for key in [k for k in state if k.startswith("blocks.0.")]:
        for index in range(24):
            shape = state[key].shape
            values = 0.05 * torch.randn(shape, device="cuda", generator=generator)
            state[key.replace("blocks.0.", f"blocks.{index}.")] = values.to(dtype).cpu()
    save_file({key: value.to(dtype).contiguous() for key, value in state.items()}, path)
    del state
    recipe = Recipe(name, backend="reference")
    torch.cuda.empty_cache()
    resting, host = torch.cuda.memory_allocated(), _anonymous()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model = load_transformer(path, device="cuda", recipe=recipe)
    peak, grown = torch.cuda.max_memory_allocated() - resting, _anonymous() - host
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert all(p.device.type == "cuda" for p in model.parameters()) and spec == model.spec
    assert peak <= 1.2 * held, f"{peak / 2**20:.0f} MiB for {held / 2**20:.0f}"
    assert grown < 100 * 2**20, f"{grown / 2**20:.0f} MiB of host memory"
    with torch.inference_mode():
        here = load_transformer(path, recipe=recipe).blocks[3].ffn[2]
    there = model.blocks[3].ffn[2]
    assert torch.equal(there.weight.cpu().view(torch.uint8), here.weight.view(torch.uint8))
    assert torch.equal(there.weight_scale.cpu(), here.weight_scale)
