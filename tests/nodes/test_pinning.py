"""Weights that core streams: every one can be pinned, since none shares a page with another."""

from __future__ import annotations

import importlib

import bridge_kit as kit
import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfy_core")

PAGE = 4096


def pinning_module():
    kit.bridge()
    return importlib.import_module(f"{kit.PACKAGE}.nodes.bridge.pinning")


@pytest.fixture
def pinned(monkeypatch):
    """Core that pins, on a machine that would refuse a page a second time as CUDA does."""
    import comfy.model_management as management

    ranges: dict[int, range] = {}
    refused: list[int] = []

    def pin(tensor):
        pages = range(tensor.data_ptr() // PAGE, -(-(tensor.data_ptr() + tensor.nbytes) // PAGE))
        if any(pages.start < other.stop and other.start < pages.stop for other in ranges.values()):
            refused.append(tensor.nbytes)
            return False
        ranges[tensor.data_ptr()] = pages
        return True

    def unpin(tensor):
        return ranges.pop(tensor.data_ptr(), None) is not None

    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", 1 << 40)
    monkeypatch.setattr(management, "pin_memory", pin)
    monkeypatch.setattr(management, "unpin_memory", unpin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: self.data_ptr() in ranges)
    return ranges, refused


def streamed(model) -> int:
    return sum(getattr(m, "comfy_cast_weights", False) for m in model.model.diffusion_model.modules())


@pytest.mark.parametrize("make", [kit.own_model, kit.own_fp8_model])
def test_small_weights_get_pages_of_their_own(pinned, make):
    ranges, refused = pinned
    model = make()
    before = kit.state_bytes(model)
    model.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    count = streamed(model)
    assert count > 10 and len(ranges) >= count and not refused
    model.unpatch_model(torch.device("cpu"))
    assert kit.same_bytes(before, kit.state_bytes(model))
    assert kit.bridge().fork(model).model.diffusion_model.head.head.weight.data_ptr() == (
        model.model.diffusion_model.head.head.weight.data_ptr()
    ), "a fork shares the pages"


def test_large_weights_side_by_side_are_copied_only_where_they_must(pinned, monkeypatch):
    """As in a mapped file of FP8 weights: core fails to pin every second one, and leaves it there."""
    _, refused = pinned
    monkeypatch.setattr(pinning_module(), "SMALL", 0)
    model = kit.own_model()
    net = model.model.diffusion_model
    linears = [m for m in net.modules() if isinstance(m, kit.engine("models.layers").Linear)]
    file = torch.empty(sum(m.weight.numel() for m in linears) + 64)
    at = 1
    for module in linears:
        place = file[at : at + module.weight.numel()].view(module.weight.shape)
        at += place.numel()
        module.weight = torch.nn.Parameter(place.copy_(module.weight), requires_grad=False)
    before = kit.state_bytes(model)
    model.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    streamed_tensors = [
        p for m in net.modules() if getattr(m, "comfy_cast_weights", False) for p in m.parameters(recurse=False)
    ]
    assert refused and all(p.is_pinned() for p in streamed_tensors)
    inside = sum(file.data_ptr() <= m.weight.data_ptr() < file.data_ptr() + file.nbytes for m in linears)
    assert 0 < inside < len(linears)
    assert kit.same_bytes(before, kit.state_bytes(model))


def test_what_a_refused_pin_left_is_taken_back_and_nothing_else(monkeypatch):
    """On cores that leave it; the first launch after a refusal raises it."""
    import comfy.model_management as management

    pinning = pinning_module()
    asked, answer = [], {"pinned": False, "error": ""}

    def zeros(*_, device):
        asked.append(device)
        if answer["error"]:
            raise RuntimeError(answer["error"])

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", 1 << 40)
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(management, "pin_memory", lambda tensor: answer["pinned"])
    pinning.forget_refused_pins()
    pinning.forget_refused_pins()  # once is enough
    weight = torch.ones(3)
    answer["pinned"] = True
    assert management.pin_memory(weight) and not asked
    answer.update(pinned=False, error="CUDA error: part or all of the requested memory range is already mapped\nmore")
    assert not management.pin_memory(weight) and asked == [torch.device("cuda", 0)]
    answer["error"] = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal"):
        management.pin_memory(weight)
    monkeypatch.setattr(management, "pin_memory", plain := lambda tensor: False)
    monkeypatch.setattr(management, "discard_cuda_async_error", lambda: None, raising=False)
    pinning.forget_refused_pins()
    assert management.pin_memory is plain, "a core that does it itself is left as it is"


@pytest.mark.parametrize("refusal", ["operation not permitted", None])
def test_the_warning_says_why(monkeypatch, caplog, refusal):
    import comfy.model_management as management

    pinning = pinning_module()
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", 1 << 30)
    monkeypatch.setattr(management, "TOTAL_PINNED_MEMORY", (1 << 30) - 10, raising=False)
    monkeypatch.setattr(pinning, "_take_refusal_back", lambda device: refusal)
    monkeypatch.setattr(management, "pin_memory", lambda tensor: False)
    pinning.forget_refused_pins()
    model = kit.own_model()
    with caplog.at_level("WARNING", "wan_fp8"):
        model.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    told = "times: operation not permitted" if refusal else "ComfyUI pins 1.0 GiB at most, and 1.0 GiB are"
    assert told in caplog.text
    model.unpatch_model(torch.device("cpu"))
