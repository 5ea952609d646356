"""The headless runner against a real server: results, progress, cancelling, failures, uploads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from headless.client import Client
from headless.errors import Cancelled, ExecutionFailed, ServerUnreachable, WorkflowError

PACK = Path(__file__).resolve().parents[2]


def picture(prefix: str, color: int = 255) -> dict[str, Any]:
    """A prompt that saves one small picture."""
    inputs = {"width": 32, "height": 32, "batch_size": 1, "color": color}
    return {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def waiting(steps: int, tag: str, message: str = "") -> dict[str, Any]:
    """A prompt that takes ``steps`` times 0.02 s, then fails with ``message`` if there is one."""
    return {
        "7": {"class_type": "TestWait", "inputs": {"steps": steps, "tag": tag}, "_meta": {"title": "Wait"}},
        "8": {"class_type": "TestFail", "inputs": {"message": message, "after": ["7", 0]}, "_meta": {"title": "End"}},
    }


def until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def run_script(workflow: Path, *arguments: str, url: str) -> subprocess.Popen[str]:
    script = PACK / "scripts" / "run_workflow.py"
    command = [sys.executable, str(script), str(workflow), "--server", url, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_outputs_and_events(client: Client, server: Any, tmp_path: Path) -> None:
    events: list[dict] = []
    made = client.run(picture("headless/events"), events.append)
    assert [(o.node_id, o.subfolder, o.kind) for o in made] == [("2", "headless", "output")]
    assert (server.output / "headless" / made[0].filename).is_file()
    kinds = [event["type"] for event in events]
    assert kinds[0] == "execution_start" and kinds[-1] == "execution_success" and "executed" in kinds
    first, second = (client.download(made[0], tmp_path) for _ in range(2))
    assert first != second and first.read_bytes() == second.read_bytes() != b""


def test_an_unchanged_prompt_still_has_its_outputs(client: Client) -> None:
    prompt = picture("headless/again", color=77)
    assert client.run(prompt) == client.run(prompt) != []


def test_progress_of_a_node(client: Client) -> None:
    events: list[dict] = []
    client.run(waiting(5, "progress"), events.append)
    steps = [e["data"]["value"] for e in events if e["type"] == "progress" and e["data"]["node"] == "7"]
    assert steps == [1, 2, 3, 4, 5]


def test_a_failing_node_is_named_with_what_it_said(client: Client) -> None:
    with pytest.raises(ExecutionFailed, match=r"'End' \(#8\) failed: the reason \(ValueError\)"):
        client.run(waiting(1, "fails", "the reason"))
    assert client.run(picture("headless/after")), "the server must go on"


def test_a_partly_valid_prompt_is_refused_and_withdrawn(client: Client) -> None:
    prompt = picture("headless/partly") | waiting(2000, "partly")
    prompt["2"]["inputs"]["images"] = ["7", 0]  # a number is no picture
    with pytest.raises(WorkflowError) as error:
        client.queue(prompt)
    assert "#2" in str(error.value) and "images" in str(error.value)
    until(lambda: client.waiting() == [])


def test_an_invalid_prompt_says_what_is_wrong_where(client: Client) -> None:
    prompt = picture("headless/invalid")
    prompt["1"]["inputs"]["width"] = -5
    prompt["1"]["_meta"] = {"title": "My picture"}
    with pytest.raises(
        WorkflowError, match=r"refused the prompt\. 'My picture' \(#1\): Value -5 smaller than min of 1"
    ):
        client.run(prompt)


def cancel_when(client: Client, event: str) -> tuple[Any, list[float]]:
    """An event handler that raises as Ctrl-C would at the first ``event``, and when it did."""
    raised: list[float] = []

    def handler(message: dict[str, Any]) -> None:
        if message["type"] == event and not raised:
            raised.append(time.monotonic())
            raise KeyboardInterrupt

    return handler, raised


def test_cancelling_stops_the_prompt_and_only_it(client: Client, server: Any) -> None:
    other = Client(server.url)
    handler, raised = cancel_when(client, "progress")
    behind: list[str] = []

    def then(message: dict[str, Any]) -> None:
        if message["type"] == "progress" and not behind:
            behind.append(other.queue(picture("headless/behind", color=3)))
        handler(message)

    with pytest.raises(Cancelled):
        client.run(waiting(5000, "cancelled"), then)
    assert time.monotonic() - raised[0] < 3.0
    until(lambda: other.waiting() == [])
    assert other.outcome(behind[0], {}), "the prompt behind the cancelled one must run"


def test_cancelling_a_prompt_that_waits_leaves_the_running_one_alone(client: Client, server: Any) -> None:
    other = Client(server.url)
    running = other.queue(waiting(100, "in front"))
    until(lambda: running in other.waiting())
    second = client.queue(waiting(5000, "behind"))
    client.cancel(second)
    assert other.waiting() == [running]
    until(lambda: other.waiting() == [])
    assert other.outcome(running, {}) == []
    assert client.get(f"/history/{second}") == {}


def test_a_prompt_interrupted_by_somebody_else_is_cancelled(client: Client, server: Any) -> None:
    threading.Timer(0.5, Client(server.url).request, ("/interrupt", {})).start()
    with pytest.raises(Cancelled):
        client.run(waiting(5000, "interrupted"))


def test_uploads(client: Client, server: Any, tmp_path: Path) -> None:
    source = tmp_path / "uploaded picture.png"
    made = client.run(picture("headless/source", color=9))
    source.write_bytes((server.output / "headless" / made[0].filename).read_bytes())
    name = client.upload(source)
    assert name == source.name and (server.base / "input" / name).read_bytes() == source.read_bytes()
    source.write_bytes(source.read_bytes() + b"changed")
    other = client.upload(source)
    assert other != name, "another file of the same name must not replace it"
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "headless/upload"}},
    }
    assert client.run(prompt)


def test_a_server_that_goes_away_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(ServerUnreachable, match="No ComfyUI answers"):
        Client("http://127.0.0.1:1").object_info()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_the_command_cancels_on_the_server(stop: signal.Signals, client: Client, server: Any, tmp_path: Path) -> None:
    workflow = tmp_path / "long.json"
    workflow.write_text(json.dumps(waiting(5000, f"command {stop}")))
    process = run_script(workflow, "--set", "steps=4000", url=server.url)
    until(lambda: client.waiting() != [])
    time.sleep(0.3)
    os.kill(process.pid, stop)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Cancelled." in errors and "Traceback" not in errors
    assert client.waiting() == []


def test_the_command_prints_paths_and_exits_by_what_happened(server: Any, tmp_path: Path) -> None:
    workflow, failing = tmp_path / "picture.json", tmp_path / "failing.json"
    workflow.write_text(json.dumps(picture("headless/command")))
    failing.write_text(json.dumps(waiting(1, "command fails", "no way")))
    process = run_script(workflow, "--set", "color=5", "--output", str(tmp_path / "made"), url=server.url)
    paths, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert [Path(line).is_file() for line in paths.splitlines()] == [True]
    process = run_script(failing, url=server.url)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "no way" in errors and "Traceback" not in errors
    process = run_script(workflow, "--help", url=server.url)
    table, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "batch_size" in table and "filename_prefix" in table


def test_without_a_terminal_the_command_prints_lines_and_what_nodes_say(server: Any, tmp_path: Path) -> None:
    workflow = tmp_path / "text.json"
    wait = waiting(20, "command text")["7"]
    show = {"class_type": "PreviewAny", "inputs": {"source": ["7", 0]}, "_meta": {"title": "[bold]Shown"}}
    workflow.write_text(json.dumps({"7": wait, "8": show}))
    for cached in (False, True):  # the second time from the server's cache
        process = run_script(workflow, url=server.url)
        paths, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and paths == "", errors
        lines = errors.splitlines()
        assert "[bold]Shown: 20" in lines and lines[-1] == "done (2 of 2 nodes)"
        if not cached:
            assert "Wait (0 of 2 nodes done)" in lines and "[bold]Shown (1 of 2 nodes done)" in lines
            assert [line for line in lines if "steps" in line] == [f"Wait: {n} of 20 steps" for n in range(2, 21, 2)]
