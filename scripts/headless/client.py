"""Talking to a ComfyUI server: queue a prompt, follow it, cancel it, fetch what it made."""

from __future__ import annotations

import contextlib
import http.client
import json
import mimetypes
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import websocket

from .convert import Json, ObjectInfo
from .errors import Cancelled, ExecutionFailed, RunError, ServerUnreachable, WorkflowError

END_OF_RUN = ("execution_success", "execution_error", "execution_interrupted")
PATIENCE_S = 15.0
"""How long a lost connection may take to come back, and a cancelled prompt to stop."""


@dataclass(frozen=True)
class Output:
    """A file that a node made, as the server names it."""

    node_id: str
    filename: str
    subfolder: str
    kind: str  # "output", or "temp" for previews


class Client:
    """One user of a server. ``on_event`` of the methods below sees the server's WebSocket messages of this prompt."""

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
        self.id = uuid.uuid4().hex
        self.timeout_s = timeout_s

    # ---------------------------------------------------------------------------------------------------- requests

    def request(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> bytes:
        """GET, or POST when there is a body (JSON unless it is bytes).

        Raises:
            ServerUnreachable: Nothing answers.
            urllib.error.HTTPError: It answers with an error status.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}{path}", data, dict(headers or {"Content-Type": "application/json"})
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServerUnreachable(
                f"No ComfyUI answers at {self.url} ({reason}): check the address and that it runs."
            ) from None

    def get(self, path: str) -> Any:
        try:
            return json.loads(self.request(path))
        except (urllib.error.HTTPError, json.JSONDecodeError) as error:
            raise ServerUnreachable(
                f"{self.url} answers, but not as a ComfyUI does ({path}: {error}): check the address."
            ) from None

    def object_info(self) -> ObjectInfo:
        info = self.get("/object_info")
        assert isinstance(info, dict)
        return info

    def upload(self, path: Path) -> str:
        """Copy a local file into the server's input folder; returns its name there, which differs if that was taken."""
        boundary = uuid.uuid4().hex
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        name = path.name.replace('"', "_")
        disposition = f'Content-Disposition: form-data; name="image"; filename="{name}"'
        head = f"--{boundary}\r\n{disposition}\r\nContent-Type: {kind}\r\n\r\n"
        body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        try:
            answer = json.loads(
                self.request("/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
            )
        except urllib.error.HTTPError as error:
            raise WorkflowError(
                f"The server did not take {path} ({error.code} {error.reason}): see the server's log."
            ) from None
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else str(answer["name"])

    # -------------------------------------------------------------------------------------------------------- runs

    def queue(self, prompt: Mapping[str, Json]) -> str:
        """Queue a prompt and return its id.

        Raises:
            WorkflowError: The server refused any part of it; each node's reasons are in the text. A prompt of which
            only
                a part is valid would run that part and leave out the rest without a word, so it is withdrawn.
        """
        try:
            answer = json.loads(self.request("/prompt", {"prompt": prompt, "client_id": self.id}))
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise ServerUnreachable(
                    f"{self.url} answered {error.code} {error.reason} to the prompt: see the server's log."
                ) from None
            answer = json.loads(error.read())
            raise WorkflowError(_refusal(answer, prompt)) from None
        prompt_id = str(answer["prompt_id"])
        if answer.get("node_errors"):
            self.withdraw(prompt_id)
            raise WorkflowError(_refusal(answer, prompt))
        return prompt_id

    def run(self, prompt: Mapping[str, Json], on_event: Callable[[Json], None] = lambda event: None) -> list[Output]:
        """Queue a prompt, follow it to its end, and return the files it made.

        Interrupting this call (``KeyboardInterrupt``) cancels the prompt on the server, and only this prompt. What a
        lost connection kept from ``on_event`` of the nodes' outputs and of the successful end, it is told at the end.

        Raises:
            WorkflowError: The server refused the prompt.
            ExecutionFailed: A node raised; the text names the node and says what it said.
            Cancelled: The prompt was interrupted.
            ServerUnreachable: The connection was lost and did not come back.
        """
        told: set[str | None] = set()  # nodes whose outputs were passed on; None for the successful end

        def pass_on(event: Json) -> None:
            if event["type"] in ("executed", "execution_success"):
                told.add(event["data"].get("node"))
            on_event(event)

        connection = self._connect()
        try:
            prompt_id = self.queue(prompt)
            try:
                self._follow(connection, prompt_id, pass_on)
            except KeyboardInterrupt:
                self.cancel(prompt_id)
                raise Cancelled("Cancelled.") from None
        finally:
            connection.close()
        entry = self.entry(prompt_id)
        for node_id in (node_id for node_id in entry["outputs"] if node_id not in told):
            data = {"node": node_id, "output": entry["outputs"][node_id], "prompt_id": prompt_id}
            on_event({"type": "executed", "data": data})
        made = _made(entry, prompt)
        if None not in told:
            on_event({"type": "execution_success", "data": {"prompt_id": prompt_id}})
        return made

    @property
    def _socket_address(self) -> str:
        return f"ws{self.url.removeprefix('http')}/ws?clientId={self.id}"

    def _connect(self) -> websocket.WebSocket:
        try:  # a busy server may take seconds to greet; afterwards a second is how often the wait looks around
            connection = websocket.create_connection(
                self._socket_address, timeout=self.timeout_s, enable_multithread=False
            )
            connection.settimeout(1.0)
            return connection
        except (OSError, websocket.WebSocketException, ValueError) as error:
            raise ServerUnreachable(
                f"No ComfyUI answers at {self.url} ({error}): check the address and that it runs."
            ) from None

    def _follow(self, connection: websocket.WebSocket, prompt_id: str, on_event: Callable[[Json], None]) -> None:
        """Pass on events until the prompt ends; its end is also looked up now and then, in case the message was
        lost."""
        asked = time.monotonic()
        while True:
            try:
                message = connection.recv()
            except websocket.WebSocketTimeoutException:
                message = ""
            except (websocket.WebSocketException, OSError):
                if prompt_id in self._history_when_back(prompt_id):
                    return
                time.sleep(0.5)
                with contextlib.suppress(
                    websocket.WebSocketException, OSError
                ):  # then the next recv() brings us back here
                    connection.connect(self._socket_address)
                continue
            event = json.loads(message) if isinstance(message, str) and message else {}
            if (event.get("data") or {}).get("prompt_id") == prompt_id:
                on_event(event)
                if event["type"] in END_OF_RUN:
                    return
            if time.monotonic() - asked > 5.0:
                asked = time.monotonic()
                if prompt_id in self.get(f"/history/{prompt_id}"):
                    return

    def _history_when_back(self, prompt_id: str) -> Json:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                history = self.get(f"/history/{prompt_id}")
                if prompt_id in history or prompt_id in self.waiting():
                    return dict(history)
                raise ServerUnreachable(f"{self.url} was restarted and has forgotten the prompt: run it again.")
            except ServerUnreachable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def waiting(self) -> list[str]:
        """Ids of the prompts that run or wait."""
        queue = self.get("/queue")
        return [item[1] for item in [*queue["queue_running"], *queue["queue_pending"]]]

    def withdraw(self, prompt_id: str) -> None:
        """Take a prompt off the queue, or interrupt it if it runs; others are left alone."""
        self.request("/queue", {"delete": [prompt_id]})
        if any(item[1] == prompt_id for item in self.get("/queue")["queue_running"]):
            self.request("/interrupt", {"prompt_id": prompt_id})

    def cancel(self, prompt_id: str) -> None:
        """Withdraw a prompt and wait until the server has let go of it."""
        self.withdraw(prompt_id)
        deadline = time.monotonic() + PATIENCE_S
        while prompt_id in self.waiting() and time.monotonic() < deadline:
            time.sleep(0.1)

    # ----------------------------------------------------------------------------------------------------- results

    def outcome(self, prompt_id: str, prompt: Mapping[str, Json]) -> list[Output]:
        """The files of a prompt that has ended. Raises ExecutionFailed or Cancelled if it ended that way."""
        return _made(self.entry(prompt_id), prompt)

    def entry(self, prompt_id: str) -> Json:
        """The history entry; it is written a moment after the last message is sent."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if prompt_id in (history := self.get(f"/history/{prompt_id}")):
                return dict(history[prompt_id])
            time.sleep(0.05)
        raise Cancelled("The prompt is no longer known to the server: it was taken off its queue.")

    def download(self, output: Output, folder: Path) -> Path:
        """Save an output below ``folder``; an existing file is kept, and the new one gets a number.

        Raises:
            RunError: It cannot be written; no part of it is left.
        """
        query = urllib.parse.urlencode(
            {"filename": output.filename, "subfolder": output.subfolder, "type": output.kind}
        )
        content = self.request(f"/view?{query}")
        name = Path(output.filename).name
        partial = folder / f".{uuid.uuid4().hex}.part"  # takes its name when it is complete
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            return partial.rename(_free_name(folder / name))
        except OSError as error:
            raise RunError(
                f"{name} ({len(content) / 2**20:.1f} MiB) cannot be saved in {folder} ({error.strerror or error}): "
                "make room there or choose another folder with --output; the server still has it among its outputs."
            ) from None
        finally:
            with contextlib.suppress(OSError):  # nothing there, or no folder to begin with
                partial.unlink()


def _free_name(path: Path) -> Path:
    target, number = path, 1
    while target.exists():
        target = path.with_name(f"{path.stem} ({number}){path.suffix}")
        number += 1
    return target


def _made(entry: Json, prompt: Mapping[str, Json]) -> list[Output]:
    """The files of a history entry. Raises ExecutionFailed or Cancelled if the prompt ended that way."""
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_interrupted":
            raise Cancelled("The prompt was interrupted on the server.")
        if kind == "execution_error":
            node = _node_name(str(data["node_id"]), prompt)
            error = data["exception_type"].rpartition(".")[2]  # a pack's module begins with the path of its folder
            raise ExecutionFailed(f"{node} failed: {data['exception_message'].strip()} ({error})")
    return list(_files(entry["outputs"]))


def _files(outputs: Mapping[str, Json]) -> Iterator[Output]:
    for node_id, made in outputs.items():
        for entries in made.values():
            for entry in entries if isinstance(entries, list) else []:
                if isinstance(entry, dict) and "filename" in entry:
                    yield Output(node_id, entry["filename"], entry.get("subfolder", ""), entry.get("type", "output"))


def _node_name(node_id: str, prompt: Mapping[str, Json]) -> str:
    node = prompt.get(node_id, {})
    title = (node.get("_meta") or {}).get("title") or node.get("class_type") or "Node"
    return f"'{title}' (#{node_id})"


def _refusal(answer: Json, prompt: Mapping[str, Json]) -> str:
    """What the server says is wrong, node by node; values that only name every file it has are cut."""
    reasons = []
    for node_id, entry in (answer.get("node_errors") or {}).items():
        for error in entry["errors"]:
            details = str(error.get("details") or "")
            details = details if len(details) <= 300 else details[:300] + " ..."
            reasons.append(f"{_node_name(node_id, prompt)}: {error['message']}: {details}".rstrip(": "))
    error = answer.get("error") or {}
    if not reasons:
        reasons = [f"{error.get('message', 'no reason given')} {error.get('details', '')}".strip()]
    return "The server refused the prompt. " + "; ".join(dict.fromkeys(reasons))
