"""Every layout equals one GPU, over NCCL with the GPU's own kernels: ``tests/distributed/nccl_layouts``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "distributed"))

import nccl_layouts
import world

WORLDS = (2, 4)


@pytest.mark.timeout(world.TIMEOUT + 30)
@pytest.mark.parametrize("ranks", WORLDS)
def test_every_layout_equals_one_gpu(ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs; there are {torch.cuda.device_count()}")
    found = world.run("nccl_layouts", ranks, "nccl")
    failed = {case: failure for case, failure in found.items() if failure}
    print(f"{len(found)} cases, {len(failed)} failed")
    assert not failed, "\n\n".join(f"{case}\n{failure}" for case, failure in failed.items())
    assert any(case.startswith(next(iter(nccl_layouts.topologies(ranks)))) for case in found)
