"""Cases for the fused kernels against float64 closed forms; run by pytest, by Triton's interpreter, and on a GPU.

Tolerances are relative L2: fp32 outputs 2e-6, bf16 outputs 2.5e-3 (bf16 rounding alone is 1.7e-3), and an error far
below rounding would mean that nothing was computed in the type asked for.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from wan_fp8.attention.backends.fp8_reference import attend
from wan_fp8.kernels import attention_cast, low_rank, parts, quantize, residual_norm, rms_rope
from wan_fp8.kernels.quantize import Cast, Granularity, QuantizedActivation
from wan_fp8.kernels.residual_norm import NormTable
from wan_fp8.models import functional as wan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {
    torch.float32: (0.0, 2e-6),
    # Triton's interpreter truncates to bf16 where a GPU rounds: twice the error
    torch.bfloat16: (8e-4, 5e-3 if INTERPRETED else 2.5e-3),
    torch.float16: (1e-4, 3.2e-4),
}


def check(ours: Tensor, exact: Tensor, what: str) -> None:
    error = float((ours.double().cpu() - exact.cpu()).norm() / exact.cpu().norm())
    low, high = TOLERANCE[ours.dtype]
    assert low <= error <= high, f"{what}: relative error {error:.2e} is outside {low:.0e}..{high:.0e}"


def values(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) + 0.3).to(dtype).to(device)


def exact_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * scale + shift


def residual_and_norm(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """Every combination: rows per sample or per token, gated or plain or no branch, modulated or affine or no norm."""
    batch, tokens, dim, eps = 2, 5, 384, 1e-6
    run = residual_norm.fused if fused else residual_norm.eager
    for stream, per_token, branch_kind, norm_kind in itertools.product(
        {dtype, torch.float32}, (False, True), ("gated", "plain", "none"), ("modulated", "affine", "none")
    ):
        if branch_kind == norm_kind == "none":
            continue
        x = values(batch, tokens, dim, dtype=stream, device=device, seed=0)
        branch = values(batch, tokens, dim, dtype=dtype, device=device, seed=1) if branch_kind != "none" else None
        tables = values(3 if per_token else batch, 6, dim, dtype=torch.float32, device=device, seed=2)
        gate, scale, shift = tables[:, 2], tables[:, 1], tables[:, 0]
        rows = torch.tensor([[0, 2, 1, 1, 0], [2, 2, 0, 1, 2]], device=device) if per_token else None
        of_token = rows if per_token else torch.arange(batch, device=device)[:, None].expand(batch, tokens)
        table = None
        if norm_kind == "modulated":
            table = NormTable(scale, shift, modulated=True)
        elif norm_kind == "affine":
            table = NormTable(scale[:1], shift[:1], modulated=False)
        before = x.clone()
        for in_place in (False, True):
            new, out = run(
                x,
                branch,
                gate if branch_kind == "gated" else None,
                table,
                rows,
                eps=eps,
                out_dtype=dtype,
                in_place=in_place,
            )
            expected = before.double()
            if branch is not None:
                expected = expected + branch.double() * (gate[of_token].double() if branch_kind == "gated" else 1)
                check(new, expected, f"sum {branch_kind} {stream}")
                expected = new.double()
            else:
                assert new is x
            if not in_place:
                assert torch.equal(x, before), "the caller's stream was written over"
            if table is None:
                assert out is None
            elif norm_kind == "modulated":
                want = exact_norm(expected, 1 + scale[of_token].double(), shift[of_token].double(), eps)
                check(out, want, f"norm {norm_kind} per_token={per_token}")
            else:
                check(out, exact_norm(expected, scale[0].double(), shift[0].double(), eps), "affine norm")
            assert out is None or out.dtype == dtype


def norm_of_a_large_mean(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """Statistics of a row whose mean is far larger than its spread: one-pass variances fail here."""
    run = residual_norm.fused if fused else residual_norm.eager
    x = 1000 + values(1, 3, 384, dtype=torch.float32, device=device, seed=3)
    one, zero = torch.ones(1, 384, device=device), torch.zeros(1, 384, device=device)
    _, out = run(x, None, None, NormTable(one, zero, False), None, eps=1e-6, out_dtype=dtype, in_place=False)
    exact = exact_norm(x.double(), one.double(), zero.double(), 1e-6)
    error = float((out.double() - exact).norm() / exact.norm())
    assert error < (1e-4 if dtype == torch.float32 else TOLERANCE[dtype][1]), error


def rms_norm_and_rope(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """Full-width RMSNorm with a rotary turn of 128-wide heads, and without one; widths that are no power of two."""
    for heads, grid, batch in ((3, (2, 3, 2), 2), (1, (1, 1, 1), 1), (4, (3, 1, 5), 1)):
        dim, tokens = heads * 128, grid[0] * grid[1] * grid[2]
        cos, sin = wan.rope_table(wan.grid_positions(grid), 128, torch.float32)
        weight = values(dim, dtype=dtype, device=device, seed=4)
        for rope in (None, (cos.to(device), sin.to(device))):
            x = values(batch, tokens, dim, dtype=dtype, device=device, seed=5)
            exact = x.double() / torch.sqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()
            if rope is not None:
                angle = wan.rope_table(wan.grid_positions(grid), 128, torch.float64)
                turn = torch.complex(*angle).to(device)[None, :, None]
                pairs = torch.view_as_complex(exact.reshape(batch, tokens, heads, 64, 2))
                exact = torch.view_as_real(pairs * turn).flatten(2)
            ours = (rms_rope.fused_ if fused else rms_rope.eager)(x, weight, rope, head_dim=128, eps=1e-6)
            check(ours, exact, f"rms heads={heads} grid={grid} rope={rope is not None}")
            assert ours.dtype == dtype
            assert not fused or ours.data_ptr() == x.data_ptr()
            if heads == 1:
                continue
            x = values(batch, tokens, dim, dtype=dtype, device=device, seed=5)
            cut = (rms_rope.fused_ if fused else rms_rope.eager)(x, weight, rope, head_dim=128, eps=1e-6, parts=heads)
            assert cut.is_contiguous() and cut.shape == (batch, heads, tokens, 128)
            assert torch.equal(cut.transpose(1, 2).flatten(2), ours), "the same values in another order"
            order = [(2 * n + 1) % heads if heads % 2 else heads - 1 - n for n in range(heads)]
            index, parts = torch.tensor(order, device=device), heads if heads % 2 else heads // 2
            x = values(batch, tokens, dim, dtype=dtype, device=device, seed=5)
            moved = (rms_rope.fused_ if fused else rms_rope.eager)(
                x, weight, rope, head_dim=128, eps=1e-6, parts=parts, heads=index
            )
            assert moved.is_contiguous() and moved.shape == (batch, parts, tokens, dim // parts)
            check(
                moved.transpose(1, 2).flatten(2), exact.unflatten(2, (heads, 128))[:, :, order].flatten(2),
                f"rms heads={heads} in the order {order}, {parts} parts",
            )  # fmt: skip


def heads_to_ranks(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """Where every head of every token lies, said by a loop; and back again, to the same bits."""
    for heads, ranks, batch, tokens in ((6, 2, 2, 5), (3, 3, 1, 7), (8, 4, 1, 1)):
        x = values(batch, tokens, heads * 128, dtype=dtype, device=device, seed=10)
        for order in (None, [(5 * n + 2) % heads if heads % 5 else heads - 1 - n for n in range(heads)]):
            index = None if order is None else torch.tensor(order, device=device)
            out = parts.cut(x, ranks, index, head_dim=128, fused=fused)
            assert out.is_contiguous() and out.shape == (batch, ranks, tokens, heads // ranks * 128)
            assert sorted(order or range(heads)) == list(range(heads))
            for place, head in enumerate(order or range(heads)):
                rank, slot = divmod(place, heads // ranks)
                theirs = out[:, rank, :, slot * 128 : (slot + 1) * 128]
                assert torch.equal(theirs, x[..., head * 128 : (head + 1) * 128]), f"head {head} of the order {order}"
            assert torch.equal(parts.join(out, index, head_dim=128, fused=fused), x)


def cast_for_fp8_attention(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """Scales and means against float64; values within half a step of e4m3; padding views; more tokens than one program
    takes."""
    many = 300 if INTERPRETED else 1100  # it takes milliseconds for every token
    for batch, tokens, heads, kept in ((2, 40, 3, 37), (1, many, 1, many)):
        q, k, v = (
            values(batch, tokens, heads, 128, dtype=dtype, device=device, seed=seed)[:, :kept] for seed in (6, 7, 8)
        )
        q[:, 3, 0, 5] = 900.0
        cast = (attention_cast.fused if fused else attention_cast.eager)(q, k, v)
        triples = (("q", q, cast.q, cast.q_scale), ("k", k, cast.k, cast.k_scale), ("v", v, cast.v, cast.v_scale))
        for name, given, data, scale in triples:
            exact = given.double() - (given.double().mean(1, keepdim=True) if name != "q" else 0)
            want = exact.abs().amax(dim=(1, 3)) / 448
            assert torch.allclose(scale.double(), want, rtol=1e-5), name
            assert data.dtype == torch.float8_e4m3fn and data.is_contiguous()
            back = data.double() * scale.double()[:, None, :, None]
            error = float((back - exact).norm() / exact.norm())
            assert error < 0.1 if INTERPRETED else 0.001 < error < 0.03, f"{name}: {error}"
        assert torch.allclose(cast.v_mean_BNE.double(), v.double().mean(1), atol=1e-5)
        out = torch.zeros(batch, kept, heads, 128, dtype=dtype, device=device)
        attention_cast.add_mean_(out, cast.v_mean_BNE, use_triton=fused)
        assert torch.allclose(out.double(), v.double().mean(1, keepdim=True).expand_as(out), rtol=1e-2, atol=1e-4)


def scale_of_many_queries(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """From a sixteenth of them, with headroom that costs no precision; one beyond it is clamped, by itself."""
    with mock.patch.object(attention_cast, "SAMPLED_FROM", 256 if INTERPRETED else attention_cast.SAMPLED_FROM):
        _scale_of_many_queries(device, dtype, fused)


def _scale_of_many_queries(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    tokens = attention_cast.SAMPLED_FROM + 4
    q, k, v = (values(1, tokens, 1, 128, dtype=dtype, device=device, seed=seed) for seed in (6, 7, 8))
    q[:, 5, 0, 7] = 900.0
    cast = (attention_cast.fused if fused else attention_cast.eager)(q, k, v)
    sampled = q[:, :: attention_cast.SAMPLE_STEP].double().abs().amax()
    assert torch.allclose(cast.q_scale.double().flatten(), attention_cast.HEADROOM * sampled / 448, rtol=1e-5)
    back = cast.q.double() * cast.q_scale.double()[:, None, :, None]
    assert torch.allclose(back[0, 5, 0, 7], attention_cast.HEADROOM * sampled, rtol=1e-5)
    q[:, 5, 0, 7] = back[:, 5, 0, 7] = 0
    error = float((back - q.double()).norm() / q.double().norm())
    assert error < 0.1 if INTERPRETED else 0.02 < error < 0.03, error


def nan_into_fp8_attention(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """A NaN in q or k comes out of the cast as one, and so out of the attention: e4m3 has a NaN, and a clamp may lose
    it."""
    if fused and INTERPRETED:
        return  # its cast has no NaN; test_kernels_compile.py reads the instruction
    for broken in range(3):
        qkv = [values(1, 40, 2, 128, dtype=dtype, device=device, seed=seed) for seed in (6, 7, 8)]
        qkv[broken][0, 11, 1, 5] = float("nan")
        cast = (attention_cast.fused if fused else attention_cast.eager)(*qkv)
        data, scale = ((cast.q, cast.q_scale), (cast.k, cast.k_scale), (cast.v, cast.v_scale))[broken]
        assert (data[0, 11, 1, 5].float() * scale[0, 1]).isnan(), "qkv"[broken]
        out = attend(cast)
        assert out[0, 11, 1].isnan().any() if broken == 0 else out[0, :, 1].isnan().any(dim=1).all(), "qkv"[broken]
        assert not out[0, :, 0].isnan().any(), "the other head has none"


def casts(device: torch.device, exact: Tensor) -> list[Cast]:
    """Every way of storing a result; static scales that fit, and maxima collected."""
    cell = torch.zeros(1, device=device)
    multiplier = quantize.current_multiplier(exact.abs().amax().float().reshape(1))
    return [
        Cast(Granularity.ROW),
        Cast(Granularity.TENSOR, multiplier=multiplier, dequant=1 / multiplier),
        Cast(Granularity.TENSOR, multiplier=multiplier, dequant=1 / multiplier, amax=cell),
        Cast(Granularity.BLOCK),
        Cast(Granularity.BLOCK, power_of_2=True),
    ]


def check_quantized(ours: QuantizedActivation, exact: Tensor, cast: Cast, what: str) -> None:
    """Values rounded to nearest in e4m3 (the interpreter truncates: up to a whole step); scales against float64; the
    maximum."""
    assert ours.qdata.dtype == torch.float8_e4m3fn and ours.granularity is cast.granularity
    rows = exact.flatten(0, -2)
    assert ours.scale.dtype == torch.float32
    groups = {"row": rows, "tensor": rows.flatten()[None], "block": rows.unflatten(1, (-1, 128))}[cast.granularity]
    want = groups.abs().amax(-1) / 448
    if cast.power_of_2:
        want = torch.exp2(torch.ceil(torch.log2(want)))
    want = want.t() if cast.granularity is Granularity.BLOCK else want.reshape(ours.scale.shape)
    assert ours.scale.shape == want.shape, what
    assert torch.allclose(ours.scale.double(), want, rtol=1e-2 if INTERPRETED else 1e-4), what
    error = float((ours.dequantized(torch.float64) - exact).norm() / exact.norm())
    assert 0.02 < error < (0.1 if INTERPRETED else 0.029), f"{what}: relative error {error:.3f}"
    if cast.amax is not None:
        assert torch.allclose(cast.amax.double(), rows.abs().amax(), rtol=1e-4), what


def quantised_activations(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """Every granularity, with and without a GELU in front; a width that is no power of two; a row of zeros."""
    for gelu in (False, True):
        x = values(2, 7, 384, dtype=dtype, device=device, seed=9)
        exact = x.double()
        if gelu:
            exact = torch.nn.functional.gelu(exact, approximate="tanh")
        for cast in casts(device, exact):
            ours = quantize.quantize(x, cast, gelu=gelu, fused=fused)
            check_quantized(ours, exact, cast, f"{cast.granularity} gelu={gelu} pow2={cast.power_of_2}")
        cell = torch.zeros(1, device=device)
        ours = quantize.quantize_current(x, gelu=gelu, amax=cell, fused=fused)
        check_quantized(ours, exact, Cast(Granularity.TENSOR, amax=cell), f"current gelu={gelu}")
        assert torch.equal(quantize.collect_amax(x, gelu=gelu, fused=fused), cell)
    zeros = torch.zeros(1, 3, 256, dtype=dtype, device=device)
    for granularity in (Granularity.ROW, Granularity.BLOCK):
        ours = quantize.quantize(zeros, Cast(granularity), fused=fused)
        assert torch.equal(ours.dequantized(), zeros.float()), "zeros stay zeros"


def quantised_outliers(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """What exceeds a scale from before is clamped, never NaN; what is NaN stays NaN."""
    x = values(1, 4, 256, dtype=dtype, device=device, seed=10)
    x[0, 1, 7], x[0, 2, 9] = 1e4, -1e4
    one = torch.ones(1, device=device)
    ours = quantize.quantize(x, Cast(Granularity.TENSOR, multiplier=one, dequant=one), fused=fused).qdata.float()
    assert not ours.isnan().any() and ours[0, 1, 7] == 448 and ours[0, 2, 9] == -448
    for granularity in (Granularity.ROW, Granularity.BLOCK):
        ours = quantize.quantize(x, Cast(granularity), fused=fused).dequantized()
        assert torch.allclose(ours[0, 1, 7], torch.tensor(1e4, device=device), rtol=0.1 if INTERPRETED else 0.01), (
            "the outlier itself is kept"
        )
        # a shared block of the outlier's row suffers; every other row does not
        clean = float((ours[0, 0] - x[0, 0].float()).norm() / x[0, 0].float().norm())
        assert clean < (0.1 if INTERPRETED else 0.03), clean
    if INTERPRETED:
        return  # its cast has no NaN
    x[0, 3, 0] = float("nan")
    ours = quantize.quantize(x, Cast(Granularity.TENSOR, multiplier=one, dequant=one), fused=fused).qdata.float()
    assert ours[0, 3, 0].isnan() and ours.isnan().sum() == 1


def norm_into_fp8(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """The norm's result cast in the same pass, or its maximum collected beside it."""
    batch, tokens, dim = 2, 5, 384
    run = residual_norm.fused if fused else residual_norm.eager
    x = values(batch, tokens, dim, dtype=torch.float32, device=device, seed=11)
    branch = values(batch, tokens, dim, dtype=dtype, device=device, seed=12)
    tables = values(batch, 3, dim, dtype=torch.float32, device=device, seed=13)
    gate, table = tables[:, 0], NormTable(tables[:, 1], tables[:, 2], modulated=True)
    exact = exact_norm(
        x.double() + branch.double() * gate[:, None].double(),
        1 + table.scale_RD[:, None].double(),
        table.shift_RD[:, None].double(),
        1e-6,
    )
    for cast in casts(device, exact):
        _, ours = run(x, branch, gate, table, None, eps=1e-6, out_dtype=dtype, in_place=False, cast=cast)
        check_quantized(ours, exact, cast, f"norm into {cast.granularity}")
        assert ours.dtype == dtype
    cell = torch.zeros(1, device=device)
    _, ours = run(x, branch, gate, table, None, eps=1e-6, out_dtype=dtype, in_place=False, cast=Cast(None, amax=cell))
    check(ours, exact, "norm with its maximum")
    assert torch.equal(cell, ours.float().abs().amax().reshape(1))


def low_rank_branch(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    """Both products: from FP8 of every granularity and from high precision; ranks of one tile, of several and odd
    ones; rows and columns that no tile divides; nothing but ``y`` is written."""
    if INTERPRETED and dtype == torch.bfloat16:
        dtype = torch.float16  # its products take the bits of bf16 for integers
    for tokens, dim, width, rank in ((70, 384, 272, 16), (131, 128, 128, 48), (5, 256, 144, 192)):
        x = values(2, tokens, dim, dtype=dtype, device=device, seed=14)
        down = values(rank, dim, dtype=dtype, device=device, seed=15) / dim**0.5
        up = values(width, rank, dtype=dtype, device=device, seed=16)
        given = [x, *(quantize.quantize(x, cast, fused=False) for cast in casts(device, x.double()))]
        for one in given:
            real = one.double() if isinstance(one, Tensor) else one.dequantized(torch.float64)
            hidden = low_rank.project(one, down, fused=fused)
            assert hidden.shape == (2 * tokens, rank)
            what = "plain" if isinstance(one, Tensor) else one.granularity
            check(hidden, real.flatten(0, 1) @ down.double().t(), f"project {what} {tokens}x{dim} rank {rank}")
        y = values(2, tokens, width, dtype=dtype, device=device, seed=17)
        before, kept = y.double(), hidden.clone()
        assert low_rank.add_(y, hidden, up, fused=fused) is y and torch.equal(hidden, kept)
        check(y, before + (hidden.double() @ up.double().t()).view(before.shape), f"add {tokens}x{width} rank {rank}")


CASES = [
    residual_and_norm,
    norm_of_a_large_mean,
    rms_norm_and_rope,
    heads_to_ranks,
    cast_for_fp8_attention,
    scale_of_many_queries,
    nan_into_fp8_attention,
    quantised_activations,
    quantised_outliers,
    norm_into_fp8,
    low_rank_branch,
]

if __name__ == "__main__":
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for one_case, one_dtype in itertools.product(CASES, (torch.float32, torch.bfloat16, torch.float16)):
        one_case(where, one_dtype, fused=True)
        print("ok", one_case.__name__, one_dtype)
