"""Memory that runs out in the middle of a run: one sentence, nothing lost, and more room for the next run."""

from __future__ import annotations

import bridge_kit as kit
import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfy_core")

GIB = 1 << 30


@pytest.fixture
def gpu(monkeypatch):
    """Figures of a card of 16 GB whose memory lies in pieces."""
    import comfy.model_management as management

    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: int(14.75 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: int(13.75 * GIB))
    monkeypatch.setattr(management, "get_total_memory", lambda *args, **kwargs: 16 * GIB)


def failing(monkeypatch, times: int, error: Exception | None = None):
    block = kit.engine("models.blocks").WanBlock
    forward, left = block.feed_forward, [times]

    def feed_forward(self, *args):
        if left[0]:
            left[0] -= 1
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 432.00 MiB.")
        return forward(self, *args)

    monkeypatch.setattr(block, "feed_forward", feed_forward)


def test_the_sentence_and_the_next_run(monkeypatch, gpu):
    import comfy.model_management as management

    model, shape = kit.own_model(), [1, 16, 2, 4, 4]
    plain, before, told = kit.ksample(model), kit.state_bytes(model), model.model.memory_required(shape)
    failing(monkeypatch, 1)
    with pytest.raises(
        management.OOM_EXCEPTION, match=r"13\.8 of 16\.0 GiB held .*1\.0 GiB lay .*1\.5 GiB more"
    ) as caught:
        kit.ksample(model)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError) and "432.00" in str(caught.value.__cause__)
    net = model.model.diffusion_model
    assert not net._text_cache and not net.caches, "nothing of the run stays"
    assert model.model.memory_required(shape) - told == 3 * GIB // 2
    management.unload_all_models()  # as core does after an error of this type
    assert torch.equal(kit.ksample(model), plain) and kit.same_bytes(before, kit.state_bytes(model))


def test_room_does_not_grow_without_end(monkeypatch, gpu):
    model = kit.own_model()
    for _ in range(4):
        failing(monkeypatch, 1)
        with pytest.raises(torch.OutOfMemoryError, match="run it again"):
            kit.ksample(model)
    assert model.model.diffusion_model.lacked == 4 * GIB


def test_other_errors_stay_what_they_are(monkeypatch, gpu):
    import comfy.model_management as management

    monkeypatch.setattr(management, "OOM_EXCEPTION", Exception)  # an old torch
    failing(monkeypatch, 1, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        kit.ksample(kit.own_model())
