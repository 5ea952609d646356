"""One registry per kind of kernel: each backend says what it can take as data; a refusal always carries its reason.

``resolve(name, request)`` returns the backend asked for or raises with the reason; only ``auto`` chooses, by priority,
and the choice can
be explained afterwards. The shape follows Comfy-Org/comfy-kitchen ``registry.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import BackendUnavailableError, InputError

log = logging.getLogger("wan_fp8")

Request = TypeVar("Request")


@dataclass(frozen=True, slots=True)
class Backend(Generic[Request]):
    """One way to run a kernel."""

    name: str
    run: Callable
    refuse: Callable[[Request], str | None]
    """Returns why this backend cannot serve a request, or None when it can. Must not import anything heavy at module
    import."""
    exact: bool
    """False: an approximation, never chosen by ``auto``."""
    priority: int
    """``auto`` takes the willing backend with the highest priority; 0 and below are never chosen by ``auto``."""
    provider: Callable[[], str] | None = None
    """Whose kernel it is, and why, where more than one can answer under this name; None: there is one only."""

    @property
    def label(self) -> str:
        """The name, and in brackets whose kernel it is where that depends on what is installed."""
        return self.name if self.provider is None else f"{self.name} ({self.provider()})"


@dataclass(frozen=True, slots=True)
class Resolution(Generic[Request]):
    """The backend that serves a request, and why each other one does not."""

    backend: Backend[Request]
    refused: dict[str, str]


class KernelRegistry(Generic[Request]):
    """Backends of one kind of kernel, by name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._backends: dict[str, Backend[Request]] = {}
        self._logged: set[tuple[str, str]] = set()

    def register(
        self,
        name: str,
        *,
        priority: int,
        refuse: Callable[[Request], str | None],
        exact: bool = True,
        provider: Callable[[], str] | None = None,
    ) -> Callable[[Callable], Callable]:
        """Decorator: add ``run`` as backend ``name``."""

        def add(run: Callable) -> Callable:
            assert name not in self._backends and name != "auto", name
            assert exact or priority <= 0, "an approximation is used by name only"
            self._backends[name] = Backend(name, run, refuse, exact, priority, provider)
            return run

        return add

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that ``resolve`` takes; ``auto`` first, then by falling priority."""
        return ("auto", *sorted(self._backends, key=lambda name: -self._backends[name].priority))

    def backend(self, name: str) -> Backend[Request]:
        """The backend of that name (not ``auto``)."""
        return self._backends[name]

    def check_name(self, name: str) -> None:
        """Raise InputError unless ``name`` is ``auto`` or a registered backend."""
        if name not in self.names:
            raise InputError(f"unknown {self.kind} backend {name!r}; choose one of {', '.join(self.names)}")

    def resolve(self, name: str, request: Request) -> Resolution[Request]:
        """The backend for ``request``.

        Raises:
            InputError: no backend has that name.
            BackendUnavailableError: it cannot serve the request (or, for ``auto``, none can), with every reason.
        """
        self.check_name(name)
        if name != "auto":
            backend = self._backends[name]
            reason = backend.refuse(request)
            if reason is not None:
                raise BackendUnavailableError(f"{self.kind} backend {name!r} cannot run here: {reason}")
            return Resolution(backend, {})
        refused: dict[str, str] = {}
        for candidate in self.names[1:]:
            backend = self._backends[candidate]
            reason = backend.refuse(request) if backend.priority > 0 else "never chosen automatically"
            if reason is None:
                self._log_choice(backend.label, refused)
                return Resolution(backend, refused)
            refused[candidate] = reason
        reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in refused.items())
        raise BackendUnavailableError(f"no {self.kind} backend can run here: {reasons}")

    def _log_choice(self, chosen: str, refused: dict[str, str]) -> None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        if (chosen, reasons) not in self._logged:
            self._logged.add((chosen, reasons))
            log.info("%s backend: %s%s", self.kind, chosen, f" (refused: {reasons})" if reasons else "")
