"""The fused Triton kernels, run by Triton's CPU interpreter in a process of its own, against float64 closed forms.

On a GPU the same cases run natively in tests/gpu/test_kernels.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import CASES

from wan_fp8 import kernels
from wan_fp8.errors import BackendUnavailableError, InputError

HERE = Path(__file__).resolve().parent
TRITON = Path(os.environ.get("WAN_FP8_HOST_DIR") or HERE.parents[1] / ".host") / "triton"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_eager_references(case, dtype: str) -> None:
    case(torch.device("cpu"), getattr(torch, dtype), fused=False)


@pytest.mark.skipif(not TRITON.is_dir(), reason="no Triton beside the host ('make triton'): its interpreter cannot run")
def test_triton_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TRITON.resolve())}
    done = subprocess.run(
        [sys.executable, str(HERE / "kernel_cases.py")], env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 3 * len(CASES)


def test_selection() -> None:
    cpu = torch.device("cpu")
    assert kernels.select("auto", cpu, torch.bfloat16) is False
    assert kernels.select("eager", torch.device("cuda"), torch.bfloat16) is False
    with pytest.raises(BackendUnavailableError, match="Triton"):
        kernels.select("triton", cpu, torch.bfloat16)
    with pytest.raises(InputError, match="auto, triton, eager"):
        kernels.select("fast", cpu, torch.bfloat16)
    assert kernels.select("auto", torch.device("cuda"), torch.float64) is False
