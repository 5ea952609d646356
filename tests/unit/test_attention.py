"""Windows, guard and FP8 attention, on the backends that run everywhere."""

from __future__ import annotations

import logging

import pytest
import torch
from test_model_parity import inputs, relative, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from wan_fp8 import Attention, set_attention
from wan_fp8.attention import ATTENTION, AttentionCore, Step, attention_cores, reset_guard
from wan_fp8.attention.backends.fp8_reference import attend
from wan_fp8.attention.core import register_backends
from wan_fp8.attention.guard import measure_error, sampled_share
from wan_fp8.errors import InputError
from wan_fp8.kernels import attention_cast
from wan_fp8.models.blocks import ForwardOptions


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def qkv(tokens: int = 300, heads: int = 2, v_mean: float = 0.0):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, 128, generator=generator) for _ in range(3))
    return q, k, v + v_mean


def run(name: str, *tensors: torch.Tensor) -> torch.Tensor:
    register_backends()
    return ATTENTION.backend(name).run(*tensors)


def test_fp8_reference_errs_as_e4m3_must() -> None:
    q, k, v = qkv()
    error = relative(run("reference-fp8", q, k, v), run("reference", q, k, v))
    assert 0.02 < error < 0.06, "below: the casts did not happen; above: scales or means are wrong"


def test_means_are_taken_out_and_given_back() -> None:
    """With a mean in V the rounding of e4m3 scales with the mean unless it is taken out; the result keeps the mean."""
    q, k, v = qkv(v_mean=20.0)
    exact = run("reference", q, k, v)
    smooth = attend(attention_cast.eager(q, k, v))
    rough = attend(attention_cast.eager(q, k, v, smooth=False))
    assert relative(smooth - 20, exact - 20) < 0.06
    assert relative(rough - 20, exact - 20) > 3 * relative(smooth - 20, exact - 20)
    k = k + 5.0
    assert relative(attend(attention_cast.eager(q, k, v)) - 20, exact - 20) < 0.06, (
        "a shift of all keys changes nothing"
    )


def test_guard_measures_what_it_says() -> None:
    q, k, v = qkv()
    exact = run("reference", q, k, v)
    assert measure_error(exact, q, k, v) < 1e-5
    assert measure_error(exact * 1.1, q, k, v) == pytest.approx(0.1, rel=1e-3)
    one_head = exact.clone()
    one_head[:, :, 1] *= 1.5
    assert measure_error(one_head, q, k, v) == pytest.approx(0.5, rel=1e-3), "the worst head decides"
    assert measure_error(exact * float("nan"), q, k, v) == float("inf")


@pytest.mark.parametrize(("tokens", "heads"), [(700, 20), (100, 3)])
def test_what_the_guard_computes_again(tokens: int, heads: int) -> None:
    """Products of its look, counted while it looks, beside those of the attention."""
    q, k, v = qkv(tokens, heads)
    with FlopCounterMode(display=False) as look:
        measure_error(q, q, k, v)
    with FlopCounterMode(display=False) as whole:
        run("reference", q, k, v)
    assert look.get_total_flops() / whole.get_total_flops() == pytest.approx(sampled_share(tokens, heads))


def counted(monkeypatch: pytest.MonkeyPatch, name: str, result=None) -> list[int]:
    register_backends()
    calls: list[int] = []
    backend = ATTENTION.backend(name)

    def spy(q, k, v):
        calls.append(q.shape[1])
        return (backend.run(q, k, v)) if result is None else result(backend.run(q, k, v))

    monkeypatch.setitem(
        ATTENTION._backends, name, type(backend)(name, spy, backend.refuse, backend.exact, backend.priority)
    )
    return calls


def test_guard_refuses_once_and_the_exact_backend_takes_over(monkeypatch, caplog) -> None:
    fast = counted(monkeypatch, "reference-fp8", result=lambda out: out + 1)
    core = set_attention(AttentionCore(), Attention("reference-fp8", "reference", 0, 0, 0, 0))
    q, k, v = qkv()
    exact = run("reference", q, k, v)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(core(q, k, v), exact)
        assert torch.equal(core(q, k, v), exact)
    assert len(fast) == 1
    assert [r.getMessage() for r in caplog.records if "refused in block 0" in r.getMessage()]
    reset_guard(core)
    core(q, k, v)
    assert len(fast) == 2, "a new run is measured anew"


def test_guard_accepts_and_looks_once(monkeypatch) -> None:
    looks = []
    monkeypatch.setattr("wan_fp8.attention.core.measure_error", lambda *a: looks.append(1) or measure_error(*a))
    fast = counted(monkeypatch, "reference-fp8")
    core = set_attention(AttentionCore(), Attention("reference-fp8", "reference", 0, 0, 0, 0))
    for _ in range(3):
        core(*qkv())
    assert (len(fast), len(looks)) == (3, 1)
    assert 0.02 < next(iter(core.verdicts.values())).error < 0.06


def test_window_of_steps_and_blocks(monkeypatch) -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v")
    fast = counted(monkeypatch, "reference-fp8")
    set_attention(
        model,
        Attention("reference-fp8", skip_first_steps=1, skip_last_steps=2, skip_first_blocks=1, skip_last_blocks=0),
    )
    used = []
    for index in range(6):
        before = len(fast)
        model(x, torch.tensor([500]), context, options=ForwardOptions(step=Step(index, 6)))
        used.append(len(fast) - before)
    assert used == [0, 1, 1, 1, 0, 0], "self-attention of the second of two blocks, in steps 1 to 3"
    with pytest.raises(InputError, match="does not say its step"):
        model(x, torch.tensor([500]), context)


def test_setting_of_one_forward_leaves_the_model_alone(monkeypatch) -> None:
    model = tiny_model("t2v")
    x, context = inputs("t2v")
    plain = model(x, torch.tensor([500]), context)
    fast = counted(monkeypatch, "reference-fp8")
    option = ForwardOptions(attention=Attention("reference-fp8", "auto", 0, 0, 0, 0))
    changed = model(x, torch.tensor([500]), context, options=option)
    assert len(fast) == 2
    assert 1e-5 < relative(changed, plain) < 0.05
    assert torch.equal(model(x, torch.tensor([500]), context), plain)
    assert all(core.setting.is_exact for core in attention_cores(model))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"backend": "fa9"}, "choose one of auto"),
        ({"backend": "fa3-fp8", "exact": "reference-fp8"}, "is not exact"),
        ({"skip_first_steps": -1}, "from 0"),
        ({"bound": 0.0}, "above 0"),
    ],
)
def test_wrong_settings_get_a_sentence(fields, words) -> None:
    with pytest.raises(InputError, match=words):
        Attention(**fields)


def test_auto_never_takes_an_approximation() -> None:
    register_backends()
    inexact = {name for name, backend in ATTENTION._backends.items() if not backend.exact}
    assert inexact == {"fa3-fp8", "sage", "reference-fp8"}
    assert all(ATTENTION.backend(name).priority <= 0 for name in inexact)
