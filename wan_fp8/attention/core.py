"""The attention call as a module of its own: the one place where a backend is chosen, replaced, windowed or guarded.

B batch, S queries, L keys, N heads, E head width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..hardware import DeviceCaps, device_caps
from ..registry import Backend, KernelRegistry, Resolution
from .guard import Verdict, measure_error
from .sparse.order import BlockLayout
from .sparse.run import SparseRun
from .sparse.setting import Sparsity
from .sparse.share import HeadShare

log = logging.getLogger("wan_fp8")


@dataclass(frozen=True, slots=True)
class AttentionRequest:
    """What a backend is asked to do; refusals are decided from this alone."""

    caps: DeviceCaps
    dtype: torch.dtype
    head_dim: int
    num_queries: int
    num_keys: int


ATTENTION: KernelRegistry[AttentionRequest] = KernelRegistry("attention")
"""``run(q_BSNE, k_BLNE, v_BLNE) -> [B, S, N, E]``: softmax(q k^T / sqrt(E)) v over all keys given, no mask."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where a forward stands in its sampling run."""

    index: int
    total: int
    conditionings: tuple[Hashable, ...] = ()
    """Keys of the conditionings that share the batch, in order; empty: the caller does not say."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Which attention kernel to use, and where an inexact one may be used.

    The last five fields matter for the low-precision backends only (``fa3-fp8``, ``sage``, ``reference-fp8``). Outside
    their window, and in
    cross-attention, the exact backend runs.
    """

    backend: str = "auto"
    """A registered name, or ``auto``: the fastest exact backend that this device, dtype and shape allow."""
    exact: str = "auto"
    """The exact backend beside a low-precision one."""
    skip_first_steps: int = 2
    """Sampling steps at the start that stay exact: they lay down the composition."""
    skip_last_steps: int = 2
    """Sampling steps at the end that stay exact: they draw the detail."""
    skip_first_blocks: int = 1
    skip_last_blocks: int = 1
    bound: float | None = 0.08
    """The guard's limit: relative L2 error of a block's attention on its real q, k and v, measured at its first use in
    a run. Between what FP8
    costs on Gaussian data at 75,600 tokens (0.055) and the failure that a mean in V causes (0.114). None: no guard."""
    sparsity: Sparsity | None = None
    """Self-attention over chosen blocks of keys, in a window of its own; outside it the fields above hold. None: all
    keys, always."""

    def __post_init__(self) -> None:
        register_backends()
        ATTENTION.check_name(self.backend)
        ATTENTION.check_name(self.exact)
        if self.exact != "auto" and not ATTENTION.backend(self.exact).exact:
            raise InputError(f"{self.exact!r} is not exact: it cannot stand in for {self.backend!r} outside its window")
        for name in ("skip_first_steps", "skip_last_steps", "skip_first_blocks", "skip_last_blocks"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} counts steps or blocks from 0; got {getattr(self, name)}")
        if self.bound is not None and not self.bound > 0:
            raise InputError(f"bound is a relative error above 0, or None for no guard; got {self.bound}")

    @property
    def is_exact(self) -> bool:
        """True if no low-precision kernel is asked for."""
        return self.backend == "auto" or ATTENTION.backend(self.backend).exact

    @property
    def needs_step(self) -> bool:
        """Whether a forward must say which step it is."""
        return not self.is_exact or (self.sparsity is not None and self.sparsity.needs_step)

    def allows(self, step: Step | None, block: int, num_blocks: int) -> bool:
        """True inside the window of steps and blocks.

        Raises:
            InputError: there is a window of steps, and the caller did not say which step this is.
        """
        if not self.skip_first_blocks <= block < num_blocks - self.skip_last_blocks:
            return False
        if self.skip_first_steps == self.skip_last_steps == 0:
            return True
        if step is None:
            raise InputError(
                f"attention {self.backend!r} is limited to a window of steps, and this forward does not say its step: "
                "pass ForwardOptions(step=Step(index, total)), or set skip_first_steps and skip_last_steps to 0"
            )
        return self.skip_first_steps <= step.index < step.total - self.skip_last_steps


def register_backends() -> None:
    """Import every backend file; done at first use, so that importing the models stays light."""
    from . import backends

    assert backends.__all__


class AttentionCore(nn.Module):
    """Scaled dot-product attention on [B, S, N, E] tensors. It has no parameters, so that others can wrap or replace
    it."""

    def __init__(self, block: int = 0, num_blocks: int = 1, *, always_exact: bool = False) -> None:
        """``always_exact``: cross-attention, whose 512 keys gain nothing from low precision."""
        super().__init__()
        self.block, self.num_blocks, self.always_exact = block, num_blocks, always_exact
        self.setting = Attention()
        self.verdicts: dict[Attention, Verdict] = {}
        """What the guard found in this run, by setting."""
        self.answered: dict[Attention, Counter[str]] = {}
        """Calls of this run by the backend that answered them, for each low-precision setting."""
        self.layout: BlockLayout | None = None
        """Where the tokens of the forward that is running lie; set by the model while its setting is sparse."""
        self.share: HeadShare | None = None
        """Which of the block's heads come here; None: all of them."""
        self.sparse_refusal: str | None = None
        """Why attention cannot be sparse here (its tokens are split); None where it can."""
        self.sparse_runs: dict[Sparsity, SparseRun] = {}
        """What sparse attention did in this run, by setting."""
        self._resolved: dict[tuple[str, AttentionRequest], Resolution[AttentionRequest]] = {}

    def forward(
        self, q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor, setting: Attention | None = None, step: Step | None = None
    ) -> Tensor:
        """Attend to every key given; the caller cuts padding off k and v before the call.

        Args:
            q_BSNE, k_BLNE, v_BLNE: last dimension contiguous.
            setting: For this call, in place of the module's own.
            step: For a setting with a window of steps.
        """
        setting = setting or self.setting
        if setting.sparsity is None or self.always_exact:
            return self._over_all_keys(q_BSNE, k_BLNE, v_BLNE, setting, step)
        run = self.sparse_runs.get(setting.sparsity)
        if run is None:
            run = self.sparse_runs[setting.sparsity] = SparseRun(setting.sparsity, self.block, self.num_blocks)
        if run.wants(step):
            return run.sparse(q_BSNE, k_BLNE, v_BLNE, step, self.layout, self.share)
        return run.dense(lambda: self._over_all_keys(q_BSNE, k_BLNE, v_BLNE, setting, step), q_BSNE.device)

    def _over_all_keys(
        self, q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor, setting: Attention, step: Step | None
    ) -> Tensor:
        if setting.is_exact or self.always_exact:
            name = setting.backend if setting.is_exact else setting.exact
            return self.resolve(q_BSNE, k_BLNE, name).backend.run(q_BSNE, k_BLNE, v_BLNE)
        backend, out = self._windowed(q_BSNE, k_BLNE, v_BLNE, setting, step)
        self.answered.setdefault(setting, Counter())[backend.label] += 1
        return out

    def _windowed(
        self, q_BSNE: Tensor, k_BLNE: Tensor, v_BLNE: Tensor, setting: Attention, step: Step | None
    ) -> tuple[Backend[AttentionRequest], Tensor]:
        """The low-precision backend inside its window and while the guard trusts it, else the exact one."""
        exact = self.resolve(q_BSNE, k_BLNE, setting.exact).backend
        if not setting.allows(step, self.block, self.num_blocks):
            return exact, exact.run(q_BSNE, k_BLNE, v_BLNE)
        fast = self.resolve(q_BSNE, k_BLNE, setting.backend).backend
        if setting.bound is None:
            return fast, fast.run(q_BSNE, k_BLNE, v_BLNE)
        verdict = self.verdicts.get(setting)
        if verdict is not None:
            trusted = fast if verdict.accepted else exact
            return trusted, trusted.run(q_BSNE, k_BLNE, v_BLNE)
        out = fast.run(q_BSNE, k_BLNE, v_BLNE)
        verdict = Verdict(measure_error(out, q_BSNE, k_BLNE, v_BLNE), setting.bound)
        self.verdicts[setting] = verdict
        if verdict.accepted:
            return fast, out
        log.warning(
            "attention %s refused in block %d: relative error %.3f on this run's own q, k and v, the bound is %.3f; "
            "%s takes over in that block",
            setting.backend, self.block, verdict.error, verdict.bound, exact.label,
        )  # fmt: skip
        del out
        return exact, exact.run(q_BSNE, k_BLNE, v_BLNE)

    @staticmethod
    def request(q_BSNE: Tensor, k_BLNE: Tensor) -> AttentionRequest:
        """What a backend is asked to do for tensors like these."""
        caps = device_caps(q_BSNE.device)
        return AttentionRequest(caps, q_BSNE.dtype, q_BSNE.shape[-1], q_BSNE.shape[1], k_BLNE.shape[1])

    def resolve(self, q_BSNE: Tensor, k_BLNE: Tensor, name: str | None = None) -> Resolution[AttentionRequest]:
        """The backend for tensors like these, with the reasons why others were refused."""
        key = (self.setting.backend if name is None else name, self.request(q_BSNE, k_BLNE))
        if key not in self._resolved:
            register_backends()
            self._resolved[key] = ATTENTION.resolve(*key)
        return self._resolved[key]

    def backends_of(self, name: str) -> set[str]:
        """Backends that calls under this name were given in this run, each with whose kernel it is where it has
        several."""
        return {resolution.backend.label for (asked, _), resolution in self._resolved.items() if asked == name}


def set_attention(model: nn.Module, attention: Attention | None) -> nn.Module:
    """Choose the attention backend of every attention in ``model``; None goes back to ``auto``. Returns the model."""
    for module in attention_cores(model):
        module.setting = attention or Attention()
    reset_guard(model)
    return model


def attention_cores(model: nn.Module) -> list[AttentionCore]:
    """Every attention in ``model``."""
    return [module for module in model.modules() if isinstance(module, AttentionCore)]


def reset_guard(model: nn.Module) -> None:
    """Forget the guard's findings, the counts and who answered: a new run has other q, k and v."""
    for module in attention_cores(model):
        module.verdicts.clear()
        module.answered.clear()
        module.sparse_runs.clear()
        module._resolved.clear()
