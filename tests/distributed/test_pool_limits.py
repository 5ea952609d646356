"""A pool's limits that need no second process: GPUs of different size, no memory to read a model, what crosses."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pool_kit
import pytest
import torch
import torch.distributed as dist

from wan_fp8 import parallel
from wan_fp8.errors import InputError
from wan_fp8.models.specs import I2V_A14B
from wan_fp8.parallel import pools, worker
from wan_fp8.parallel.remote import Remote, Topology
from wan_fp8.parallel.serving import Serving
from wan_fp8.parallel.source import ModelSource
from wan_fp8.quant import Recipe

GIB = 2**30


def test_gpus_of_different_size_are_planned_with_as_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank has 80 GiB and the other one 24: what fits 80 is sharded."""
    seen: list[Any] = []

    def reduce(value: torch.Tensor, op: Any, group: Any) -> None:
        seen.append(op)
        value.clamp_(max=24 * GIB)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", reduce)
    monkeypatch.setattr(dist, "all_gather", lambda names, name, group: [each.copy_(name) for each in names])
    monkeypatch.setattr(worker, "_link_gbs", lambda device, world: 100.0)
    facts = worker._facts(torch.device("cuda:0"), None)
    assert seen == [dist.ReduceOp.MIN] and facts["memory"] == 24 * GIB and facts["per_host"] == 2
    source = ModelSource(path="a file")
    for memory, shard in ((facts["memory"], 2), (80 * GIB, 1)):
        pool = SimpleNamespace(world=2, connection=SimpleNamespace(ready=facts | {"memory": memory}))
        remote = Remote(I2V_A14B, source, pools.PoolSpec(devices=("cuda:0", "cuda:1")), Topology(), Recipe("rowwise"))
        assert remote.layout(pool)[0].shard == shard


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_no_memory_while_a_model_is_read_is_agreed_on(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says what to do; the other ranks hear of it instead of waiting."""
    told: list[float] = []
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda value, op, group: told.append(float(value)))
    serving = Serving(torch.device("cpu"), None)  # type: ignore[arg-type]
    words = "rank 1 has no memory left to read it: choose weights 'shard'"
    with pytest.raises(InputError, match=words), serving.agreed("read it"):
        raise error
    assert told == [1.0]


def test_a_forward_is_one_message_each_way(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents cross once a forward; a prompt's rows and nothing of the weights with them."""
    model = pool_kit.in_pool(checkpoints["t2v"], "high_noise")
    inputs = pool_kit.Inputs(model.spec)
    try:
        inputs.into(model)
        connection, sent = model.remote.pool().connection, []
        send = connection._send

        def counted(kind: str, fields: Any, tensors: Any, **more: Any) -> int:
            sent.append((kind, sum(value.numel() * value.element_size() for value in tensors.values())))
            return send(kind, fields, tensors, **more)

        monkeypatch.setattr(connection, "_send", counted)
        for step in range(3):
            inputs.into(model, timestep=900.0 - step)
        given = (inputs.x, inputs.timestep, inputs.context)
        assert sent == [("forward", sum(value.numel() * value.element_size() for value in given))] * 3
    finally:
        pools.stop_pools()


def test_nothing_of_a_pool_can_pickle_and_secrets_are_compared_in_constant_time() -> None:
    """Of the modules that talk to other processes: no pickle, none of torch's calls that use it."""
    folder = Path(parallel.__file__).parent
    talking = [path for path in folder.glob("*.py") if "torch.load" not in path.read_text()]
    assert len(talking) == len(list(folder.glob("*.py"))) > 15
    for path in talking:
        code = path.read_text()
        assert not re.search(
            r"import pickle|marshal|_object_list|_object\(|multiprocessing|(?<!\.)\beval\(|\bexec\(", code
        ), path
    wire = (folder / "wire.py").read_text()
    assert wire.count("compare_digest(") == 3 and not re.search(r"(mac|proof|digest\([^)]*\)) (==|!=) ", wire)
