"""A training loop that ends by the clock: learning rate, averaged weights, losses, and a clean end on SIGTERM."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_stopping = False


def stop_on_signal() -> None:
    """From now on SIGTERM and Ctrl-C end the stage that runs after its step; what it learned is kept."""

    def stop(number: int, frame: Any) -> None:
        del number, frame
        global _stopping
        _stopping = True
        print("told to stop: keeping what is there", flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def stopping() -> bool:
    """Whether a signal came."""
    return _stopping


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How long a stage trains: until the first of the two is used up."""

    minutes: float = math.inf
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is None and not math.isfinite(self.minutes):
            raise ValueError("a budget needs minutes, steps, or both")


class Average:
    """Exponential average of a module's weights, younger at the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in module.named_parameters()}
        self._source = [p for _, p in module.named_parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), [p.detach() for p in self._source], weight)


@dataclass
class Log:
    """Losses of one stage, averaged between prints."""

    stage: str
    every: int = 50
    losses: list[list[float]] = field(default_factory=list)
    """[step, seconds, loss]"""
    steps: int = 0
    seconds: float = 0.0
    _sum: Tensor | None = None
    _count: int = 0

    def add(self, loss: Tensor, step: int, seconds: float, rate: float, extra: str = "") -> None:
        """Keep the loss on its device; it is read, and printed, at every ``every``-th step only."""
        self._sum = loss.detach().float() if self._sum is None else self._sum + loss.detach().float()
        self._count += 1
        self.steps = step + 1
        if self.steps % self.every and self.steps != 10:
            return
        mean = float(self._sum) / self._count
        self._sum, self._count = None, 0
        self.seconds = seconds
        self.losses.append([self.steps, round(seconds, 2), round(mean, 6)])
        print(f"{self.stage} step {self.steps} {seconds:.1f} s loss {mean:.5f} lr {rate:.2e} {extra}", flush=True)
        if not math.isfinite(mean):
            raise RuntimeError(f"{self.stage}: the loss is {mean} at step {self.steps}; take a smaller learning rate")


Compute = Callable[..., Tensor]
"""The loss of one batch, from tensors on the device that trains."""
PLAIN_STEPS = 8
"""Before a step is recorded: kernels are chosen and tables are built in them."""


class Trainer:
    """Optimizer, learning rate and averaged weights of one module.

    The rate rises over the first ``warmup`` steps and falls along a cosine with the share of the budget that is used.
    On a GPU a step (forward, backward, clipping, optimizer) is recorded once as a CUDA graph and replayed: models this
    small take ten times as long to launch as to compute.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        stage: str,
        budget: Budget,
        rate: float,
        warmup: int = 100,
        final: float = 0.02,
        decay: float = 0.998,
        weight_decay: float = 0.01,
        clip: float = 1.0,
        log_every: int = 50,
        graphs: bool = True,
    ) -> None:
        self.module, self.budget = module, budget
        self.rate, self.warmup, self.final, self.clip = rate, warmup, final, clip
        self.parameters = [p.requires_grad_(True) for p in module.parameters()]
        matrices = [p for p in self.parameters if p.ndim >= 2]
        vectors = [p for p in self.parameters if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        fused = self.parameters[0].is_cuda
        self.graphs = graphs and fused
        # A recorded step reads its rate from the GPU.
        first = torch.tensor(rate, device=self.parameters[0].device) if self.graphs else rate
        self.optimizer = torch.optim.AdamW(groups, lr=first, betas=(0.9, 0.98), fused=fused, capturable=self.graphs)
        self._recorded: tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor] | None = None
        self._learned = 0
        self.average = Average(module, decay)
        self.log = Log(stage, log_every)
        self.first_step = 0
        self._offset = 0.0

    def steps(self) -> Iterator[tuple[int, float]]:
        """Step numbers and the share of the budget that is used; the caller trains one batch at each.

        Minutes count from the step at which kernels are chosen, and compiled: that takes as long as it takes.
        """
        began = time.perf_counter() - self._offset
        step = self.first_step
        while not stopping():
            if step == self.first_step + PLAIN_STEPS:
                self._finish()
                began = time.perf_counter() - self._offset
            seconds = time.perf_counter() - began
            used = seconds / (60 * self.budget.minutes)
            if self.budget.steps is not None:
                used = max(used, step / self.budget.steps)
            if used >= 1:
                break
            self._seconds = seconds
            yield step, used
            step += 1
        self.log.steps, self.log.seconds = step, time.perf_counter() - began

    def _finish(self) -> None:
        """Wait for the device."""
        if self.parameters[0].is_cuda:
            torch.cuda.synchronize()

    def learn(self, compute: Compute, inputs: tuple[Tensor, ...], step: int, used: float, extra: str = "") -> None:
        """Backward, clip, one optimizer step, one update of the average.

        Args:
            compute: Always the same function; it makes no decision from values and waits for none of them.
            inputs: What ``compute`` takes, of the same shapes at every step.
        """
        rate = self.rate * min(1.0, (step + 1) / self.warmup)
        rate *= self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(used, 1.0)))
        for group in self.optimizer.param_groups:
            if self.graphs:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if not self.graphs:
            loss = self._once(compute, inputs)
        elif self._learned < PLAIN_STEPS:
            loss = self._aside(compute, inputs)
        else:
            loss = self._replay(compute, inputs)
        self._learned += 1
        self.average.update(step)
        self.log.add(loss, step, self._seconds, rate, extra)

    def _once(self, compute: Compute, inputs: tuple[Tensor, ...]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = compute(*inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return loss.detach()

    def _aside(self, compute: Compute, inputs: tuple[Tensor, ...]) -> Tensor:
        """On a stream of its own, as the steps before a recording have to be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._once(compute, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _replay(self, compute: Compute, inputs: tuple[Tensor, ...]) -> Tensor:
        if self._recorded is None:
            kept = tuple(tensor.clone() for tensor in inputs)
            graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                loss = self._once(compute, kept)
            self._recorded = graph, kept, loss
        graph, kept, loss = self._recorded
        torch._foreach_copy_(list(kept), list(inputs))
        graph.replay()
        return loss.clone()

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights, float32."""
        return {name: tensor.clone() for name, tensor in self.average.tensors.items()}

    # ---- an interrupted stage goes on where it was -------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Everything that ``restore`` needs, complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        state = {
            "module": self.module.state_dict(),
            "average": self.average.tensors,
            "optimizer": self.optimizer.state_dict(),
            "step": self.log.steps,
            "seconds": self.log.seconds,
            "losses": self.log.losses,
        }
        torch.save(state, partial)
        partial.rename(path)

    def restore(self, path: Path) -> None:
        """Go on from ``save``; the seconds and steps that were used count."""
        device = self.parameters[0].device
        state = torch.load(path, map_location=device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, tensor in state["average"].items():
            self.average.tensors[name].copy_(tensor)
        self.first_step, self._offset = state["step"], state["seconds"]
        self.log.losses, self.log.steps, self.log.seconds = state["losses"], state["step"], state["seconds"]


def batches(count: int, size: int, seed: int, device: torch.device | str) -> Iterable[Tensor]:
    """Endless batches of indices 0..count-1 in random order, each index once before any comes again."""
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64, device=device)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator, device=device)])
        yield order[:size]
        order = order[size:]
