"""What tests of several files ask for by name, with ``pytest.mark.usefixtures``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def inference() -> Iterator[None]:
    """Torch's inference mode around a test, as core's executor has it around nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def pools_end(comfy_core: Path) -> Iterator[None]:
    """Pools that a module started end with it, under whatever name the pack was imported."""
    yield
    for name, module in list(sys.modules.items()):
        if name.endswith("wan_fp8.parallel.pools"):
            module.stop_pools()
