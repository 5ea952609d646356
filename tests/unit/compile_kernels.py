"""Compile the Triton kernels for GPUs that are not here, with arguments of the types that torch.compile gives them.

Run by ``test_kernels_compile.py`` in a process of its own, where Triton can be imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from wan_fp8.kernels._quantize_triton import quantize_kernel
from wan_fp8.kernels._residual_norm_triton import residual_norm_kernel
from wan_fp8.kernels._rms_rope_triton import rms_rope_kernel

CAPABILITIES = (89, 90, 100, 120)
"""Those that multiply in FP8."""
POINTERS = {"x_ptr": "fp32", "branch_ptr": "bf16", "row_ptr": "i32", "x_out_ptr": "fp32"}
KERNELS = {
    residual_norm_kernel: dict(
        EPS=1e-6, ADD=True, GATED=True, NORM=True, MODULATED=True, HAS_ROWS=False, MODE=1, POWER_OF_2=False,
        COLLECT=False, HEAD=4096, TAIL=1024,
    ),
    rms_rope_kernel: dict(EPS=1e-6, HEAD_DIM=128, ROPE=True, PARTS=1, BLOCK=8192),
    quantize_kernel: dict(GELU=True, MODE=1, POWER_OF_2=False, COLLECT=False, WIDTH=16384),
}  # fmt: skip


def compile_for(kernel, constants: dict[str, object], capability: int) -> str:
    """The kernel's PTX."""
    names = kernel.arg_names
    unknown = set(constants) - set(names)
    assert not unknown, f"{kernel.__name__} has no {unknown}"
    quantised = constants.get("MODE") == 1
    types = {}
    for name in names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            default = "bf16" if kernel is not residual_norm_kernel and name == "x_ptr" else POINTERS.get(name, "fp32")
            types[name] = "*" + (
                "fp8e4nv" if name == "out_ptr" and quantised else "bf16" if name == "out_ptr" else default
            )
        elif name.isupper():
            raise AssertionError(f"{kernel.__name__}: say what {name} is")
        else:
            types[name] = "i64"  # sizes that torch.compile keeps open
    source = ASTSource(fn=kernel, signature=types, constexprs={(names.index(n),): v for n, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]


def main() -> None:
    for kernel, constants in KERNELS.items():
        for capability in CAPABILITIES:
            ptx = compile_for(kernel, constants, capability)
            assert ".f64" not in ptx, f"{kernel.__name__} computes in float64 for {capability}"
            print("ok", kernel.__name__, capability, flush=True)


if __name__ == "__main__":
    main()
