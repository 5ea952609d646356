"""Loading straight to a GPU: bytes travel as stored and are converted there, to the same values as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_kit import official_state, quantised, tiny_spec
from safetensors.torch import save_file

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
