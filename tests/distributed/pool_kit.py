"""What the tests of pools share: models that run in one, and what may be left on the machine afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wan_fp8
from wan_fp8.models.specs import ModelSpec
from wan_fp8.models.wan import WanModel, build_model
from wan_fp8.parallel.pools import Pool, PoolSpec
from wan_fp8.parallel.remote import Remote, RemoteWanModel, Topology
from wan_fp8.parallel.source import ModelSource

WATCHDOG = 3.0
TWO = PoolSpec(devices=("cpu",) * 2, watchdog=WATCHDOG)


def in_pool(
    path: Path,
    expert: str | None = None,
    pool: PoolSpec = TWO,
    topology: Topology | None = None,
    recipe: Any = None,
    dtype: torch.dtype = torch.float32,
) -> RemoteWanModel:
    """A checkpoint's transformer in a pool."""
    source = ModelSource.of(path, expert, dtype=dtype)
    with torch.device("meta"):
        model = build_model(spec_of(path, expert), model_class=RemoteWanModel)
    model.remote = Remote(model.spec, source, pool, topology or Topology(), recipe)
    return model


def here(path: Path, expert: str | None = None, dtype: torch.dtype = torch.float32, recipe: Any = None) -> WanModel:
    """The same in this process."""
    return wan_fp8.load_transformer(path, expert, dtype=dtype, recipe=recipe)


_specs: dict[tuple[Path, str | None], ModelSpec] = {}


def spec_of(path: Path, expert: str | None) -> ModelSpec:
    if (path, expert) not in _specs:
        _specs[path, expert] = wan_fp8.load_transformer(path, expert).spec
    return _specs[path, expert]


class Inputs:
    """Of one forward."""

    def __init__(self, spec: ModelSpec, batch: int = 2, frames: int = 3, size: int = 8, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(batch, spec.in_dim, frames, size, size, generator=generator)
        self.timestep = torch.full((batch,), 600.0)
        self.context = torch.randn(batch, 9, spec.text_dim, generator=generator)

    def into(self, model: WanModel, options: Any = None, timestep: float | None = None) -> Tensor:
        given = self.timestep if timestep is None else torch.full_like(self.timestep, timestep)
        with torch.inference_mode():
            return model(self.x, given, self.context, options=options).clone()


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def eventually(condition: Callable[[], bool], what: str, seconds: float = 10.0, pids: Sequence[int] = ()) -> None:
    """Wait; after ``seconds`` fail and say what these processes are at."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "\n".join([what, *map(_described, pids)])
        time.sleep(0.02)


def _described(pid: int) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        tasks = [f"{task.name} {(task / 'wchan').read_text()}" for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError as error:
        return f"{pid}: {error}"
    return f"{pid}: {[line for line in lines if line.startswith(('State', 'PPid', 'Sig', 'Thr'))]} waits: {tasks}"


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits for its parent to take note of its end does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def nothing_left(pool: Pool) -> None:
    """No process and no meeting place of a pool that is gone."""
    eventually(lambda: not any(alive(pid) for pid in pool.pids), "workers are left")
    eventually(lambda: not os.path.exists(pool.folder), "a meeting place is left")
