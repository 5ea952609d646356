"""One visible line from a node: in the log, under the node while it is on screen, and in the prompt's history."""

from __future__ import annotations

import logging
import sys
from typing import Any

from comfy_api.latest import io, ui

logger = logging.getLogger("wan_fp8")


def node_id(cls: type[io.ComfyNode]) -> str | None:
    """The id of the node that runs; None when its class is called outside a prompt. Needs the hidden input
    ``unique_id``."""
    return getattr(cls.hidden, "unique_id", None)


def notice(node_id: str | None, lines: list[str], *, level: int = logging.INFO) -> Any:
    """Show ``lines`` to the user.

    Args:
        node_id: From ``node_id(cls)``.
    Returns:
        What to pass as ``ui`` of the node's output; None when there is nothing to say.
    """
    if not lines:
        return None
    for line in lines:
        logger.log(level, line)
    text = "\n".join(lines)
    show_on_node(node_id, text)
    return ui.PreviewText(text)


def extended(shown: Any, lines: list[str]) -> Any:
    """What ``notice`` returned, with lines after it that were logged and shown elsewhere."""
    if not lines:
        return shown
    return ui.PreviewText("\n".join([*([] if shown is None else [shown.value]), *lines]))


def show_on_node(node_id: str | None, text: str) -> None:
    """Put ``text`` on a node.

    The host draws progress text on a node of any class; a frontend too old for it leaves the log line and the history.
    """
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    send = getattr(server, "send_progress_text", None)
    if node_id is not None and send is not None:
        send(text, node_id)
