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
    assert done.stdout.count("ok ") == 33
    attention = "_forward _attend _statistics _choose _reduce _cast _add_rows"
    rest = "project add quantize residual_norm rms_rope parts _remainder"
    assert not [name for name in f"{attention} {rest}".split() if f"ok {name}_kernel " not in done.stdout]


TRACE = """
import sys
import torch
import torch.utils._triton as support
from torch._subclasses.fake_tensor import FakeTensorMode

support.has_triton = lambda: True  # there is no GPU to ask; nothing is launched
sys.path.insert(0, sys.argv[1])
from wan_fp8.kernels.quantize import Cast, Granularity, quantize

launches = []

def keep(graph, inputs):
    launches.extend(str(node.target) for node in graph.graph.nodes if "triton" in str(node.target))
    return graph.forward

def cast(x):
    return quantize(x, Cast(Granularity.BLOCK, power_of_2=True), gelu=True, fused=True).qdata

run = torch.compile(cast, backend=keep, fullgraph=True, dynamic=True)
with torch.inference_mode(), FakeTensorMode():
    for rows, dim in ((24, 256), (40, 13824)):
        assert run(torch.empty(1, rows, dim, dtype=torch.bfloat16)).shape == (1, rows, dim)
print("launches", len(launches))
"""


@pytest.mark.skipif(not TRITON.is_dir(), reason="no Triton beside the host ('make triton'): it is imported to trace")
def test_a_launch_is_traced_where_torch_compile_holds_the_width_as_a_symbol(tmp_path: Path) -> None:
    """After another graph a width may be one; warps and the width of a program must be numbers all the same, one graph
    for each."""
    environment = os.environ | {"PYTHONPATH": str(TRITON.resolve()), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", TRACE, str(HERE.parents[1])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["launches", "2"]
