"""TF32 for one forward and nothing else; the residual stream's type as an option of one forward."""

from __future__ import annotations

import pytest
import torch
from test_model_parity import inputs, relative, tiny_model

from wan_fp8.models.blocks import ForwardOptions, ResidualStream
from wan_fp8.precision import fp32_products

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def flags():
    """Puts the process's own choice back."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


def state() -> tuple[str, str]:
    """Both of torch's interfaces; reading the older one fails while they disagree."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "disagrees"
    return older, MATMUL.fp32_precision


STARTS = {
    "untouched": lambda: None,
    "older, on": lambda: setattr(MATMUL, "allow_tf32", True),
    "older, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "newer, on": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "newer, off": lambda: setattr(MATMUL, "fp32_precision", "ieee"),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("tf32", [True, False])
def test_is_in_force_inside_and_put_back(flags, start: str, tf32: bool) -> None:
    STARTS[start]()
    before = state()
    with fp32_products(tf32):
        assert MATMUL.allow_tf32 is tf32
        assert state()[1] == ("tf32" if tf32 else "ieee")
    assert state() == before
    with pytest.raises(ZeroDivisionError), fp32_products(tf32):
        _ = 1 // 0
    assert state() == before
    with fp32_products(None):
        assert state() == before


def test_covers_the_whole_forward_and_nothing_after(flags) -> None:
    model = tiny_model("t2v")
    seen: dict[str, bool] = {}
    for name in ("patch_embedding", "time_embedding.0", "blocks.1.ffn.2", "head.head"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, MATMUL.allow_tf32)
        )
    x, context = inputs("t2v")
    model(x, torch.tensor([900.0]), context, options=ForwardOptions(tf32=True))
    assert len(seen) == 4 and all(seen.values())
    assert not MATMUL.allow_tf32
    model(x, torch.tensor([900.0]), context)
    assert not any(seen.values())


def test_text_of_one_precision_is_not_used_for_the_other() -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v")
    rows: list[int] = []
    model.blocks[0].cross_attn.k.register_forward_pre_hook(lambda _, args: rows.append(1))
    for tf32 in (True, False, True, False):
        model(x, torch.tensor([900.0]), context, options=ForwardOptions(text_key="p", tf32=tf32))
    assert len(rows) == 2


def test_stream_type_of_one_forward(monkeypatch) -> None:
    model = tiny_model("t2v", torch.bfloat16)
    x, context = (t.bfloat16() for t in inputs("t2v"))
    timestep = torch.tensor([900.0])
    exact = tiny_model("t2v", torch.float64)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    truth = exact(x.double(), timestep, context.double())
    types: list[torch.dtype] = []
    settled = ResidualStream.settled

    def spy(self):
        out = settled(self)
        types.append(out.dtype)
        return out

    monkeypatch.setattr(ResidualStream, "settled", spy)
    default = model(x, timestep, context)
    half = model(x, timestep, context, options=ForwardOptions(stream_dtype=torch.bfloat16))
    assert types == [torch.float32, torch.bfloat16]
    assert torch.equal(model(x, timestep, context), default)
    assert default.dtype == half.dtype == torch.float32
    assert relative(default, truth) < relative(half, truth) < 0.05
