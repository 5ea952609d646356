"""A function that runs undisturbed while somebody else answers its questions: how one sampler serves several models.

Core's samplers are functions that loop over the schedule and keep their history (previous estimates, noise trees) in
local variables. To change the expert in the middle without losing that history, nor the exact latents, the function
runs as a coroutine: in a thread of its own that is only ever awake while its driver waits. Every model call and every
progress callback goes to the driver, which is the thread that ComfyUI executes nodes in.
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Call:
    """The coroutine asks its driver to do something and waits for ``Coroutine.resume``."""

    kind: str
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The coroutine returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class Coroutine:
    """Runs ``body`` in a thread that alternates with its driver; never both at once.

    ``start`` and ``resume`` return the next ``Call`` or ``Finished``, and raise what ``body`` raised. Inside ``body``,
    ``ask(kind, *args)`` hands a call to the driver and returns its answer. The thread has the driver's inference mode,
    grad mode, CUDA device and stream, and context variables. ``close`` ends it from any state.
    """

    def __init__(self, body: Callable[[], Any], name: str) -> None:
        self._body = body
        self._to_driver: queue.SimpleQueue[Call | Finished | _Failed] = queue.SimpleQueue()
        self._to_body: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), name=name, daemon=True
        )
        self._settings = _ThreadSettings.current()
        self._ended = False

    def start(self) -> Call | Finished:
        """Run ``body`` up to its first call."""
        self._thread.start()
        return self._next()

    def resume(self, answer: Any) -> Call | Finished:
        """Answer the pending call and run up to the next one."""
        self._to_body.put(lambda: answer)
        return self._next()

    def throw(self, error: BaseException) -> Call | Finished:
        """Raise ``error`` where ``body`` waits, and run up to the next call."""

        def raise_it() -> None:
            raise error

        self._to_body.put(raise_it)
        return self._next()

    def ask(self, kind: str, *args: Any) -> Any:
        """Called by ``body``: hand a call to the driver, wait for the answer."""
        self._to_driver.put(Call(kind, args))
        return self._to_body.get()()

    def close(self) -> None:
        """End ``body`` if it still runs, by raising GeneratorExit at its pending call, and wait for its thread."""
        while self._thread.ident is not None and not self._ended:
            with contextlib.suppress(GeneratorExit):
                self.throw(GeneratorExit())
        if self._thread.ident is not None:
            self._thread.join()

    def _next(self) -> Call | Finished:
        message = self._to_driver.get()
        if isinstance(message, Call):
            return message
        self._ended = True
        if isinstance(message, _Failed):
            raise message.error
        return message

    def _run(self) -> None:
        message: Finished | _Failed
        try:
            with self._settings.applied():
                message = Finished(self._body())
        except BaseException as error:
            message = _Failed(error)
        self._to_driver.put(message)


@dataclass(frozen=True, slots=True)
class _ThreadSettings:
    """What torch keeps per thread and a sampler relies on."""

    inference: bool
    grad: bool
    stream: Any

    @classmethod
    def current(cls) -> _ThreadSettings:
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(
            torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.cuda.current_stream() if cuda else None
        )

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.stream is not None:
                stack.enter_context(torch.cuda.device(self.stream.device))
                stack.enter_context(torch.cuda.stream(self.stream))
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            yield
