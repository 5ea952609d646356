"""Memory comes back: weights that leave a device, partial loads, two workflows in turn, one MODEL with and without a
recipe."""

from __future__ import annotations

import gc
import os
import sys
import weakref

import bridge_kit as kit
import pytest
import torch
from bridge_kit import bridge, core_model, engine, ksample
from torch._subclasses.fake_tensor import FakeTensor

pytestmark = pytest.mark.usefixtures("comfy_core")

TURNS = 50


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield
    kit.unload_everything()


def fp8(model, name: str = "rowwise"):
    return bridge().with_recipe(model, engine("quant").Recipe(name, backend="reference"))[0]


def pointers(model) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.model.diffusion_model.named_parameters()}


def tensor_bytes() -> int:
    """Bytes of every tensor alive, each storage once; fake ones, which other tests may have left, hold none."""
    gc.collect()
    found = {}
    for value in gc.get_objects():
        kind = type(value)
        if issubclass(kind, torch.Tensor) and not issubclass(kind, FakeTensor) and value.device.type == "cpu":
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def back(value: torch.Tensor) -> torch.Tensor:
    """``.to("cpu")`` that cannot copy: from ``meta``, which stands for the device, there is nothing to copy."""
    if value.device.type == "meta":
        assert value.numel() == 0, "a weight was copied"
        return torch.empty(0, dtype=value.dtype)
    return value


# ---- weights go home ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [kit.own_model, lambda: fp8(core_model())], ids=["fp32", "fp8"])
def test_weights_that_leave_a_device_are_the_hosts_own_again(make) -> None:
    model = make()
    net = model.model.diffusion_model
    before, values = pointers(model), kit.state_bytes(model)
    leaves = {
        f"{path}.{name}"
        for path, m in net.named_modules()
        if isinstance(m, engine("models.layers").Leaf)
        for name, p in m._parameters.items()
        if p is not None
    }
    for module in net.modules():
        if isinstance(module, engine("models.layers").Leaf):
            module.to("meta")
    assert all(net.get_parameter(name).device.type == "meta" for name in leaves)
    net._apply(back)
    assert pointers(model) == before and kit.same_bytes(values, kit.state_bytes(model))
    assert not any(module.homes for module in net.modules() if isinstance(module, engine("models.layers").Leaf))


def test_a_weight_that_was_replaced_or_written_to_does_not_go_home() -> None:
    model = kit.own_model()
    layer = model.model.diffusion_model.blocks[0].ffn[0]
    layer.to("meta")
    layer.weight = torch.nn.Parameter(torch.ones(layer.weight.shape), requires_grad=False)
    layer._apply(back)
    assert (layer.weight == 1).all(), "a merged weight is not the one that left"
    layer.to("meta")
    layer.set_weight(torch.zeros(layer.weight.shape, device="meta"), inplace_update=True)
    with pytest.raises(AssertionError, match="copied"):
        layer._apply(back)


def test_a_weight_that_is_there_already_keeps_its_home() -> None:
    """Core moves every resident module again whenever it loads a clone of the MODEL."""
    model = kit.own_model()
    layer = model.model.diffusion_model.blocks[0].ffn[0]
    before = layer.weight.data_ptr()
    layer.to("meta")
    layer.to("meta")
    layer._apply(back)
    assert layer.weight.data_ptr() == before


@pytest.mark.parametrize("form", ["recipe", "file"])
def test_merged_weights_go_with_their_lora(form: str) -> None:
    """Core puts the old weight back when a model is unloaded: nothing else may hold the merged one on a GPU."""
    model = fp8(core_model()) if form == "recipe" else bridge().fork(kit.quantised_core_model("scaled_fp8"))
    linears = [m for m in model.model.diffusion_model.modules() if isinstance(m, engine("models.layers").Linear)]
    loaded = [m.weight for m in linears]
    merged: list[weakref.ref] = []

    def seen(run, *args, **kwargs):
        merged.extend(weakref.ref(m.weight) for m in linears)
        return run(*args, **kwargs)

    patched = kit.with_core_lora(model, kit.core_lora(kit.lora_pairs(kit.core_weights())))
    patched.add_wrapper_with_key("diffusion_model", "seen", seen)
    ksample(patched)
    changed = [ref for ref in merged if all(ref() is not weight for weight in loaded)]
    kit.unload_everything()
    gc.collect()
    assert changed and not [ref for ref in changed if ref() is not None]
    assert all(m.weight.data_ptr() == weight.data_ptr() for m, weight in zip(linears, loaded, strict=True))


def test_other_moves_are_those_of_torch() -> None:
    model = kit.own_model()
    net = model.model.diffusion_model
    before = kit.state_bytes(model)
    net.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in net.parameters())
    net.to(torch.float32)
    assert kit.same_bytes(before, kit.state_bytes(model))
    net.to("cpu")
    assert kit.same_bytes(before, kit.state_bytes(model))


# ---- memory comes back ----------------------------------------------------------------------------------------------


def partly(model):
    """A clone of which every run casts all weights for each forward, as on a card that is much too small."""
    clone = model.clone()
    load = type(clone).load
    clone.load = lambda device, **kw: load(clone, device, lowvram_model_memory=1)
    return clone


@pytest.mark.parametrize("small", [False, True], ids=["whole", "forced-offload"])
def test_two_workflows_in_turn(small: bool) -> None:
    """50 times, with a LoRA on one of them and everything unloaded now and then; what a turn takes it gives back."""
    make = partly if small else lambda model: model.clone()
    high, low = fp8(core_model(seed=0)), fp8(core_model(seed=1), "DelayedScaling")
    lora = kit.core_lora(kit.lora_pairs(kit.core_weights()))
    patched = kit.with_core_lora(low, lora)
    states = [kit.state_bytes(model) for model in (high, low)]

    def turn(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        results = ksample(make(high), steps=1, cfg=1.0), ksample(make(patched), steps=1, cfg=1.0)
        if index % 10 == 9:
            kit.unload_everything()
        return results

    first = turn(9)
    turn(9)
    tensors, resident = tensor_bytes(), resident_bytes() if sys.platform == "linux" else 0
    for index in range(TURNS):
        results = turn(index)
    assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
    del results
    kit.unload_everything()
    assert tensor_bytes() <= tensors
    if sys.platform == "linux":
        grown = resident_bytes() - resident
        one = sum(value.nbytes for value in states[0].values())
        assert grown < TURNS * one / 4, f"{grown / 2**20:.0f} MiB more; one model has {one / 2**20:.1f}"
    assert all(kit.same_bytes(s, kit.state_bytes(m)) for s, m in zip(states, (high, low), strict=True))


@pytest.mark.parametrize("small", [False, True], ids=["whole", "forced-offload"])
def test_one_model_with_and_without_a_recipe(small: bool) -> None:
    """Both in one graph, over and over; the recipe's weights go with the last MODEL that has them."""
    make = partly if small else lambda model: model.clone()
    model = bridge().fork(core_model())
    state, plain = kit.state_bytes(model), ksample(make(model), steps=1)
    kit.unload_everything()
    before = tensor_bytes()
    results = []
    for _ in range(3):
        with_fp8 = fp8(model)
        for _ in range(TURNS // 10):
            results.append(ksample(make(with_fp8), steps=1))
            assert torch.equal(ksample(make(model), steps=1), plain)
        del with_fp8
        kit.unload_everything()
    assert all(torch.equal(result, results[0]) for result in results)
    del results
    assert tensor_bytes() <= before + 4096
    assert kit.same_bytes(state, kit.state_bytes(model))


def test_streamed_weights_are_pinned_in_every_run(monkeypatch) -> None:
    """Core unpins them when a run's clone of the MODEL goes; a fake stands for the pinning, which needs a GPU."""
    import comfy.model_management as management

    pinned: set[int] = set()

    def pin(tensor: torch.Tensor) -> bool:
        fresh = tensor.data_ptr() not in pinned
        pinned.add(tensor.data_ptr())
        return fresh

    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", 1 << 40)
    monkeypatch.setattr(management, "pin_memory", pin)
    monkeypatch.setattr(management, "unpin_memory", lambda tensor: pinned.discard(tensor.data_ptr()))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: self.data_ptr() in pinned)
    model = fp8(core_model())
    net = model.model.diffusion_model
    streamed: list[set[int]] = []

    def look(*_: object) -> None:
        leaves = [m for m in net.modules() if isinstance(m, engine("models.layers").Leaf) and m.comfy_cast_weights]
        streamed.append({p.data_ptr() for m in leaves for p in m.parameters(recurse=False)} - pinned)

    net.register_forward_pre_hook(look)
    for _ in range(3):
        clone = partly(model)
        ksample(clone, steps=1)
        del clone
        gc.collect()
    assert len(streamed) == 3 and not any(streamed)
    kit.unload_everything()
    gc.collect()
    assert not pinned
