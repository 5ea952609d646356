"""torch.compile for the parts of a transformer block; an option, since the fused kernels carry the speed without it.

A block calls its parts (what lies between the attentions) through ``ForwardState.run``. By default that is
``run_plainly``; with a ``Compile`` setting it is a ``CompiledParts``, which belongs to one model and one setting.
Nothing that changes from step to step is an input of a part: no step, prompt, seed or strength can cause another
compilation. What does: a batch of another size, another storage type of the weights, and, with ``dynamic=False``,
another number of tokens. All blocks of a model share what is compiled.
"""

from __future__ import annotations

import functools
import logging
import shutil
import time
import types
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .errors import InputError
from .hardware import device_caps, has_module

if TYPE_CHECKING:
    from .models.wan import WanModel

log = logging.getLogger("wan_fp8")

MODES = ("default", "max-autotune-no-cudagraphs")
BACKENDS = ("inductor", "aot_eager", "eager")

USUAL_LIMIT = 4
"""Graphs of one part (batch sizes, a first block, timesteps per frame) up to which torch's own limit is far."""
LIMIT = 64

Run = Callable[..., Any]
"""Calls a bound method of a block with the arguments that follow it."""

Model = TypeVar("Model", bound="WanModel")


@dataclass(frozen=True, slots=True)
class Compile:
    """How the parts of a block are compiled."""

    mode: str = "default"
    """``default``, or ``max-autotune-no-cudagraphs``: tries several kernels for every matrix product, minutes long."""
    dynamic: bool = True
    """True: one compilation serves every resolution and length. False: each number of tokens gets its own."""
    fullgraph: bool = False
    """True: raise where a part cannot be compiled as one graph (a weight that a host fetches on the way)."""
    backend: str = "inductor"
    """``inductor``; ``aot_eager`` and ``eager`` trace without generating code, for tests."""

    def __post_init__(self) -> None:
        for name, value, allowed in (("mode", self.mode, MODES), ("backend", self.backend, BACKENDS)):
            if value not in allowed:
                raise InputError(f"torch.compile: {name} must be one of {', '.join(allowed)}; got {value!r}")


def run_plainly(part: Callable[..., Any], *args: Any) -> Any:
    """Call a part of a block as it is."""
    return part(*args)


class CompiledParts:
    """A ``Run`` that compiles each part at its first use and counts what was compiled."""

    def __init__(self, setting: Compile) -> None:
        self.setting = setting
        self.graphs = 0
        """Graphs compiled so far."""
        self.seconds = 0.0
        self.announce: Callable[[str], None] = log.info
        """Told before and after each compilation."""
        self._functions: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._graphs_of: Counter[str] = Counter()

    def __call__(self, part: Any, stream: Any, table_R6D: Tensor, state: Any) -> Any:
        function = self._functions.get(part.__func__)
        if function is None:
            function = self._functions[part.__func__] = self._compiled(part.__func__)
        if self.setting.dynamic:
            for tensor, axis in stream.token_axes():
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        if self._graphs_of[part.__name__] < USUAL_LIMIT:
            return function(part.__self__, stream, table_R6D, state)
        # Weights that a host keeps elsewhere or patches on the way make more kinds of block than torch expects of one
        # function; at its limit it would run them uncompiled.
        with torch._dynamo.config.patch(recompile_limit=LIMIT):
            return function(part.__self__, stream, table_R6D, state)

    def _compiled(self, plain: Any) -> Callable[..., Any]:
        # What torch compiled is kept on the code object. One of our own keeps models and settings apart, and is freed
        # with them.
        own = types.FunctionType(
            plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
        )
        return torch.compile(
            own,
            fullgraph=self.setting.fullgraph,
            dynamic=None if self.setting.dynamic else False,
            backend=functools.partial(_backend, weakref.ref(self), plain.__name__),
        )

    def compile_graph(self, part: str, graph: Any, inputs: Any) -> Any:
        """The backend that the setting asks for, with word before and after."""
        self.announce(
            f"torch.compile ({self.setting.mode}): compiling graph {self.graphs + 1} of the transformer block; once "
            "for each model and batch size" + ("" if self.setting.dynamic else ", and for each number of tokens")
        )
        began = time.perf_counter()
        compiled = self._generate(graph, inputs)
        self.graphs += 1
        self._graphs_of[part] += 1
        self.seconds += time.perf_counter() - began
        self.announce(f"torch.compile: {self.graphs} graphs of the transformer block compiled in {self.seconds:.1f} s")
        return compiled

    def _generate(self, graph: Any, inputs: Any) -> Any:
        if self.setting.backend != "inductor":
            return torch._dynamo.lookup_backend(self.setting.backend)(graph, inputs)
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, config_patches=list_mode_options(self.setting.mode))


def _backend(owner: weakref.ref[CompiledParts], part: str, graph: Any, inputs: Any) -> Any:
    """What torch.compile calls. torch keeps every backend that it was ever given; this one keeps nothing alive."""
    parts = owner()
    assert parts is not None, "called by a function that its owner holds"
    return parts.compile_graph(part, graph, inputs)


def compile_blocks(
    model: Model, *, mode: str = "default", dynamic: bool = True, fullgraph: bool = False, backend: str = "inductor"
) -> Model:
    """Compile the blocks of a ``WanModel`` at their first forward. Returns the model; ``remove_compile`` undoes it.

    Args:
        mode, dynamic, fullgraph, backend: See ``Compile``.
    Raises:
        InputError: an unknown mode or backend.
    """
    model.compile_setting = Compile(mode, dynamic, fullgraph, backend)
    return model


def remove_compile(model: Model) -> Model:
    """Run the blocks plainly again, and free what was compiled for this model. Returns the model."""
    model.compile_setting = None
    model.compiled_parts.clear()
    return model


def refusal(device: torch.device) -> str | None:
    """Why torch.compile's inductor backend cannot generate code for ``device``; None when it can."""
    if device.type == "cpu":
        found = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
        return None if found else "it needs a C++ compiler on the path to generate code for the CPU"
    caps = device_caps(device)
    if not has_module("triton"):
        return "Triton is not installed (it comes with torch for CUDA on Linux)"
    if caps.capability is not None and caps.capability < (7, 0):
        return f"it needs compute capability 7.0; {caps.name} has {caps.capability[0]}.{caps.capability[1]}"
    return None
