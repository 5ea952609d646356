"""The Triton kernels compile for GPUs that are not here, as their launchers and torch.compile would call them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TRITON = Path(os.environ.get("WAN_FP8_HOST_DIR") or HERE.parents[1] / ".host") / "triton"


@pytest.mark.skipif(not TRITON.is_dir(), reason="no Triton beside the host ('make triton'): its compiler cannot run")
def test_kernels_compile_for_every_fp8_architecture(tmp_path: Path) -> None:
    """One launch of each kernel at the sizes of a real video: types, shared memory, spills, no float64. Under
    torch.compile a number that is no constant arrives as float64, and e4m3 is made of no float64."""
    environment = os.environ | {"PYTHONPATH": str(TRITON.resolve()), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py")], env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("ok ") == 30
    kernels = "_forward _attend _statistics _choose _reduce _cast _add_rows project add quantize residual_norm rms_rope"
    assert not [name for name in kernels.split() if f"ok {name}_kernel " not in done.stdout]
