"""What the headless runner tells and saves, without a server: progress, texts of nodes, failures, downloads."""

from __future__ import annotations

import errno
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from headless.client import Client, Output
from headless.errors import ExecutionFailed, RunError
from headless.progress import RunBars, RunProgress, progress_for
from rich.console import Console

PACK = Path(__file__).resolve().parents[2]
PROMPT: dict[str, Any] = {
    "1": {"class_type": "Encode", "inputs": {}, "_meta": {"title": "Prompt"}},
    "2": {"class_type": "Sample", "inputs": {}},
    "3": {"class_type": "SaveVideo", "inputs": {}, "_meta": {"title": "Save Video"}},
}
LOST = "'prompt': 88 of 600 tokens lost"
FILE = {"filename": "a.mp4", "subfolder": "", "type": "output"}
DONE: dict[str, Any] = {
    "status": {"messages": []},
    "outputs": {"1": {"text": [LOST]}, "3": {"images": [FILE]}},
}


def event(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": {"prompt_id": "p", **data}}


class Scripted(Client):
    """A client whose server sends ``events``, then has ``entry`` in its history and ``content`` for every file."""

    def __init__(self, events: list[dict] | None = None, entry: Any = None, content: bytes = b"") -> None:
        super().__init__("http://nowhere")
        self.events, self.found, self.content = events or [], entry, content

    def _connect(self) -> Any:
        return io.BytesIO()

    def queue(self, prompt: Any) -> str:
        return "p"

    def _follow(self, connection: Any, prompt_id: str, on_event: Callable[[dict], None]) -> None:
        for one in self.events:
            on_event(one)

    def entry(self, prompt_id: str) -> Any:
        return self.found

    def request(self, path: str, body: Any = None, headers: Any = None) -> bytes:
        return self.content


def console(**more: Any) -> Console:
    return Console(file=io.StringIO(), width=200, highlight=False, **more)


def shown(by: RunProgress) -> str:
    assert isinstance(by.console.file, io.StringIO)
    return by.console.file.getvalue()


# ---------------------------------------------------------------------------------------------------------- progress


def test_a_log_gets_a_line_per_node_and_per_tenth_of_its_steps() -> None:
    with progress_for(PROMPT, console()) as lines:
        assert not isinstance(lines, RunBars)
        lines.event(event("executing", node="2"))
        for value in range(1, 41):
            lines.event(event("progress", node="2", value=value, max=40))
        for value in (1, 2, 1, 2):  # a node that counts twice more
            lines.event(event("progress", node="2", value=value, max=2))
        lines.event(event("executing", node=None))
    expected = ["Sample (0 of 3 nodes done)", *(f"Sample: {n} of 40 steps" for n in range(4, 41, 4))]
    assert shown(lines).splitlines() == [*expected, *(f"Sample: {n} of 2 steps" for n in (1, 2, 1, 2))]


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
def test_what_nodes_say_is_shown_under_their_titles(terminal: bool) -> None:
    with progress_for(PROMPT, console(force_terminal=terminal)) as progress:
        assert isinstance(progress, RunBars) == terminal
        progress.event(event("executed", node="1", output={"text": [LOST, "[second]"]}))
        progress.event(event("executed", node="2", output={"text": "plain"}))
        progress.event(event("executed", node="3", output=None))
    for line in (f"Prompt: {LOST}", "Prompt: [second]", "Sample: plain"):
        assert line in shown(progress)


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
def test_a_successful_run_ends_with_done_whatever_messages_were_lost(terminal: bool) -> None:
    client = Scripted([event("execution_start"), event("executing", node="3")], DONE)
    with progress_for(PROMPT, console(force_terminal=terminal)) as progress:
        assert client.run(PROMPT, progress.event) == [Output("3", "a.mp4", "", "output")]
    assert f"Prompt: {LOST}" in shown(progress)
    if isinstance(progress, RunBars):
        task = progress.bars.tasks[0]
        assert (task.description, task.completed, task.total) == ("done", 3, 3)
    else:
        assert shown(progress).splitlines()[-1] == "done (3 of 3 nodes)"


def test_nothing_is_told_twice() -> None:
    events = [event("executed", node=node, output=made) for node, made in DONE["outputs"].items()]
    events.append(event("execution_success"))
    told: list[dict] = []
    Scripted(events, DONE).run(PROMPT, told.append)
    assert told == events


# ---------------------------------------------------------------------------------------------------------- failures


def test_a_failure_names_the_error_without_the_folder_of_its_pack() -> None:
    data = {"node_id": "2", "exception_message": "no\n", "exception_type": "/anywhere/custom_nodes/pack.a.errors.Bad"}
    client = Scripted(entry={"status": {"messages": [["execution_error", data]]}, "outputs": {}})
    told: list[dict] = []
    with pytest.raises(ExecutionFailed) as error:
        client.run(PROMPT, told.append)
    assert str(error.value) == "'Sample' (#2) failed: no (Bad)"
    assert told == [], "a failed run is not told as done"


def test_our_errors_show_a_short_module_wherever_the_pack_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{PACK}.wan_fp8.errors"  # as ComfyUI names it
    spec = importlib.util.spec_from_file_location(name, PACK / "wan_fp8" / "errors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    ours = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(ours) >= 6 and {kind.__module__ for kind in ours} == {"wan_fp8.errors"}


# --------------------------------------------------------------------------------------------------------- downloads


def test_a_download_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"old")
    output = Output("3", "a.mp4", "", "output")
    paths = [Scripted(content=b"new").download(output, tmp_path) for _ in range(2)]
    assert [path.name for path in paths] == ["a (1).mp4", "a (2).mp4"]
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [b"new", b"new", b"old"]


def test_a_full_disk_is_one_sentence_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.write_bytes

    def full(path: Path, data: Any) -> int:
        whole(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError) as error:
        Scripted(content=bytes(3 * 2**20)).download(Output("3", "a.mp4", "", "output"), tmp_path)
    assert error.value.exit_code == 1 and list(tmp_path.iterdir()) == []
    assert str(error.value).startswith(f"a.mp4 (3.0 MiB) cannot be saved in {tmp_path} (No space left on device): make")
    assert "--output" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError, match=r"a\.mp4 .* cannot be saved in .*file"):
        Scripted(content=b"x").download(Output("3", "a.mp4", "", "output"), tmp_path / "file" / "made")
