"""Block-sparse attention on a real GPU: kernels against dense attention in float64, selection without a look at the
host, a model over all blocks against the dense one."""

from __future__ import annotations

import itertools

import pytest
import sparse_cases
import torch
from test_model_parity import relative, tiny_model

from wan_fp8 import Attention, set_attention
from wan_fp8.attention import Step, attention_cores
from wan_fp8.attention.sparse import BLOCK, SPARSE, Selection, SparseRequest, Sparsity, token_order
from wan_fp8.attention.sparse.registry import query_rows, register_backends
from wan_fp8.attention.sparse.run import SparseRun
from wan_fp8.hardware import device_caps
from wan_fp8.models.blocks import ForwardOptions

CUDA = torch.device("cuda")
EVERYWHERE = {"skip_first": 0.0, "skip_last": 0.0, "skip_first_blocks": 0, "skip_last_blocks": 0}


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", sparse_cases.CASES, ids=lambda case: case.__name__)
def test_triton_kernels(case, dtype: torch.dtype) -> None:
    case(CUDA, dtype, fused=True)


def usable(name: str, width: int = 128) -> None:
    register_backends()
    reason = SPARSE.backend(name).refuse(SparseRequest(device_caps(CUDA), torch.bfloat16, width, 640, 640))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ["fa4", "triton"])
def test_backends(name: str, width: int) -> None:
    """Odd lengths, one block, batch 2, padded queries, empty rows, everything kept; float64 says what is right."""
    usable(name, width)
    if query_rows(name, device_caps(CUDA)) != BLOCK:
        pytest.skip("the cases have blocks of 128 queries")
    sparse_cases.attention(CUDA, torch.bfloat16, name, width)


@pytest.mark.parametrize("name", ["fa4", "triton"])
def test_dropped_blocks_by_their_means(name: str) -> None:
    usable(name, 128)
    if query_rows(name, device_caps(CUDA)) != BLOCK:
        pytest.skip("the cases have blocks of 128 queries")
    sparse_cases.what_was_dropped_counts_by_its_mean(CUDA, torch.bfloat16, True, name, 128)


@pytest.mark.parametrize("name", ["fa4", "triton"])
def test_everything_kept_is_the_dense_kernel(name: str) -> None:
    usable(name)
    tokens = 40 * BLOCK - 48
    q, k, v = sparse_cases.qkv(1, tokens, 4, 128, torch.bfloat16, CUDA, 48)
    rows = query_rows(name, device_caps(CUDA))
    mask = torch.ones(1, 4, -(-q.shape[1] // rows), 40, dtype=torch.bool, device=CUDA)
    ours = SPARSE.backend(name).run(q, k, v, Selection.of_mask(mask, q.shape[1], tokens, rows))
    scaled = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    assert relative(ours, scaled) < 3e-3, "both round once to bf16"


@pytest.mark.parametrize("policy", ["coverage", "density", "window", "coverage with means"])
def test_nothing_waits_for_the_gpu(policy: str) -> None:
    """Choosing, attending, measuring and learning, from the second call of a run on."""
    order = token_order((5, 12, 16), 0, True, CUDA)
    q, k, v = sparse_cases.qkv(1, order.layout.num_tokens, 4, 128, torch.bfloat16, CUDA)
    chosen, _, means = policy.partition(" ")
    run = SparseRun(Sparsity(policy=chosen, remainder=bool(means), **EVERYWHERE), 0, 1)
    for step in range(2):
        run.sparse(q, k, v, Step(step, 8), order.layout)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 5):
            run.sparse(q, k, v, Step(step, 8), order.layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(run.calls) == 5


def test_choices_are_those_of_the_eager_path() -> None:
    order = token_order((5, 12, 16), 0, True, CUDA)
    q, k, v = sparse_cases.qkv(2, order.layout.num_tokens, 4, 128, torch.bfloat16, CUDA)
    masks = []
    for device in ("cuda", "cpu"):
        given = token_order((5, 12, 16), 0, True, torch.device(device))
        run = SparseRun(Sparsity(policy="density", density=0.4, bound=None, **EVERYWHERE), 0, 1)
        _, selection = run.selected(*(t.to(device) for t in (q, k, v)), None, given.layout)
        masks.append(selection.mask().cpu())
    assert float((masks[0] != masks[1]).float().mean()) < 0.005, "but for equal scores"


@pytest.mark.parametrize("name", ["t2v", "ti2v"])
def test_a_model_over_all_blocks_is_the_dense_model(name: str) -> None:
    from test_model_parity import inputs

    model = tiny_model(name, torch.bfloat16).to(CUDA)
    x, context = (t.to(CUDA, torch.bfloat16) for t in inputs(name, batch=2, frames=4, rows=16, columns=24))
    timestep = torch.tensor([[0.0, 650.0, 650.0, 650.0]] * 2 if name == "ti2v" else [900.0, 30.0], device=CUDA)
    plain = model(x, timestep, context)
    setting = Attention(sparsity=Sparsity(policy="density", density=1.0, bound=None, **EVERYWHERE))
    for given, step in itertools.product((setting,), (None, Step(3, 10))):
        set_attention(model, given)
        assert relative(model(x, timestep, context, options=ForwardOptions(step=step)), plain) < 0.02
        runs = [run for core in attention_cores(model) for run in core.sparse_runs.values()]
        assert len(runs) == 2 and all(float(c.found.error.max()) < 0.01 for run in runs for c in run.calls)
