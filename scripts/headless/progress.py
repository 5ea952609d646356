"""What a run shows on its way: bars in a terminal, plain lines in a log; and what its nodes say, in both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .convert import Json


class RunProgress:
    """Follows the events of ``Client.run``. This one shows plain lines: a node that starts, tenths of its steps.

    Use it as a context manager around the run.
    """

    def __init__(self, prompt: Mapping[str, Json], console: Console) -> None:
        self.titles = {key: str((n.get("_meta") or {}).get("title") or n["class_type"]) for key, n in prompt.items()}
        self.console = console
        self.done: set[str] = set()
        self._tenths: tuple[str, int, int] = ("", 0, 0)  # node, its number of steps, tenths of them that were told

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def event(self, event: Json) -> None:
        kind, data = event["type"], event["data"]
        if kind == "execution_start":
            self.began()
        elif kind == "execution_cached":
            self._finish(data["nodes"])
        elif kind == "executing" and data["node"] is not None:
            self.node(self._title(data["node"]))
        elif kind == "executed":
            self._finish([data["node"]])
            self._say(data["node"], (data.get("output") or {}).get("text"))
        elif kind == "progress_state":
            self._finish([key for key, state in data["nodes"].items() if state["state"] == "finished"])
        elif kind == "progress" and data["max"] > 1:
            self.step(self._title(data["node"]), data["value"], data["max"])
        elif kind == "execution_success":
            self._finish(self.titles)
            self.ended()

    def began(self) -> None:
        """The server took the prompt off its queue."""

    def node(self, title: str) -> None:
        """A node starts."""
        self._tenths = ("", 0, 0)
        self._line(f"{title} ({len(self.done)} of {len(self.titles)} nodes done)")

    def step(self, title: str, value: int, steps: int) -> None:
        """A node is at step ``value`` of ``steps``, which is more than one; a node may count several times."""
        tenth = int(10 * value / steps)
        told = self._tenths[2] if self._tenths[:2] == (title, steps) else 0
        if tenth != told:  # less: it counts from the start again
            self._line(f"{title}: {value} of {steps} steps")
        self._tenths = (title, steps, tenth)

    def counted(self) -> None:
        """``done`` has changed."""

    def ended(self) -> None:
        """Every node is done."""
        self._line(f"done ({len(self.done)} of {len(self.titles)} nodes)")

    def _title(self, node_id: Any) -> str:
        return self.titles.get(str(node_id), str(node_id))

    def _finish(self, node_ids: Iterable[Any]) -> None:
        self.done |= set(map(str, node_ids)) & set(self.titles)
        self.counted()

    def _say(self, node_id: Any, texts: Any) -> None:
        """Warnings and other text that the editor would show on the node."""
        for text in [texts] if isinstance(texts, str) else texts or []:
            self._line(f"{self._title(node_id)}: {text}")

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


class RunBars(RunProgress):
    """Two bars: nodes of the graph done, and steps of the node that runs."""

    def __init__(self, prompt: Mapping[str, Json], console: Console) -> None:
        super().__init__(prompt, console)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self.bars = Progress(*columns, TimeElapsedColumn(), console=console, transient=False)
        self.nodes = self.bars.add_task("waiting in the queue", total=len(prompt))
        self.steps = self.bars.add_task("", total=1, visible=False)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def began(self) -> None:
        self.bars.update(self.nodes, description="running")

    def node(self, title: str) -> None:
        self.bars.update(self.nodes, description=title)
        self.bars.update(self.steps, visible=False)

    def step(self, title: str, value: int, steps: int) -> None:
        self.bars.update(self.steps, description=f"  {title}", completed=value, total=steps, visible=True)

    def counted(self) -> None:
        self.bars.update(self.nodes, completed=len(self.done))

    def ended(self) -> None:
        self.bars.update(self.nodes, description="done")


def progress_for(prompt: Mapping[str, Json], console: Console) -> RunProgress:
    """Bars where they can be redrawn; lines where standard error is a file, a pipe or a log."""
    redrawn = console.is_terminal and not console.is_dumb_terminal
    return RunBars(prompt, console) if redrawn else RunProgress(prompt, console)
