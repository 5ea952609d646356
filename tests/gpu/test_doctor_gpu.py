"""The Doctor on a GPU: its self-test passes, within its time, and it recommends something."""

from __future__ import annotations

import json

import torch

from wan_fp8 import doctor, presets
from wan_fp8.hardware import device_caps
from wan_fp8.models.specs import I2V_A14B


def test_it_finds_this_gpu_in_order() -> None:
    report = doctor.examine("cuda")
    tests = report.sections["self-test"]
    assert len(tests) >= 2 and {row.note for row in tests} == {"passed"}, report.text()
    assert report.seconds < 60, "ten seconds, and what a first use of kernels compiles"
    again = doctor.examine("cuda")
    assert again.seconds < 10
    machine = report.sections["machine"]
    assert any("models run here" in row.what and device_caps("cuda").name in row.found for row in machine)
    assert json.loads(again.json())["sections"]["recommended"]


def test_presets_resolve_here() -> None:
    caps = device_caps("cuda")
    for name in presets.NAMES:
        made = presets.choose(name, caps, torch.bfloat16, I2V_A14B)
        assert made.lines()
        if name != "lossless" and (caps.capability or (0, 0)) >= (8, 9) and caps.is_cuda:
            assert made.recipe.name == "rowwise" and made.recipe.backend == "auto"
