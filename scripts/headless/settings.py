"""The settable inputs of a prompt: what they are called on the command line, what they accept, and how they are set."""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .convert import UPLOADS, WIDGET_TYPES, Json, ObjectInfo, Prompt, input_specs
from .errors import WorkflowError

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
RANDOM = "random"
MAX_SHOWN_CHOICES = 6
FILES = (*UPLOADS, "audio_upload", "file_upload")
ALSO_CALLED = {"length": ("frames",), "noise_seed": ("seed",)}
"""What people say for an input that ComfyUI's own video and sampler nodes call something else."""


@dataclass(frozen=True)
class Setting:
    """One value a user may set.

    ``targets`` are the inputs it goes to, (node id, input name): one, or several when a PrimitiveNode of the editor
    joins them. ``kind`` is ``INT``, ``FLOAT``, ``STRING``, ``BOOLEAN`` or ``COMBO``, ``options`` what the node says
    about it.
    """

    targets: tuple[tuple[str, str], ...]
    title: str
    class_type: str
    kind: str
    options: Json
    value: Any
    alone: bool  # the only settable input of its node, so that the node's title names it too

    @property
    def input_name(self) -> str:
        return self.targets[0][1]

    @property
    def is_file(self) -> bool:
        """Whether it takes a file of the server's input folder, to which a local file can be uploaded."""
        return any(self.options.get(key) for key in FILES)

    def names(self) -> list[str]:
        """Everything it can be called, the shortest first; some may mean another setting too."""
        node_id, name = self.targets[0]
        alone = [self.title] if self.alone else []
        common = ALSO_CALLED.get(name, ())
        return [name, *common, *alone, f"{self.title}.{name}", f"{self.class_type}.{name}", f"#{node_id}.{name}"]

    def allowed(self) -> str:
        """What it accepts, for people."""
        if self.is_file:
            return "a local file, or one in the server's input folder"
        if self.kind == "COMBO":
            choices = [str(c) for c in self.options.get("options", [])]
            more = len(choices) - MAX_SHOWN_CHOICES
            return " | ".join(choices[:MAX_SHOWN_CHOICES]) + (f" | ... {more} more" if more > 0 else "")
        if self.kind in ("INT", "FLOAT"):
            low, high, step = (self.options.get(key) for key in ("min", "max", "step"))
            text = f"{_number(low)} to {_number(high)}" if low is not None and high is not None else "a number"
            text += f", in steps of {step:g}" if self.kind == "INT" and isinstance(step, int) and step > 1 else ""
            return f"{text}, or {RANDOM}" if self.is_seed else text
        return "true | false" if self.kind == "BOOLEAN" else "text"

    @property
    def is_seed(self) -> bool:
        return self.kind == "INT" and bool(self.options.get("control_after_generate"))


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) or abs(value) < 2**32 else f"{value:.3g}"


def settings(prompt: Prompt, info: ObjectInfo) -> list[Setting]:
    """The settable inputs of a prompt, in the order of its nodes: every value that is not a link, and every optional
    one that is left to its default."""
    joined = {target: (title, targets) for title, targets in prompt.shared for target in targets}
    found = []
    for node_id, node in prompt.nodes.items():
        own = [s for s in input_specs(info[node["class_type"]]) if _settable(node, s)]
        for name, kind, options in own:
            title, targets = joined.get((node_id, name), (_title(node), ((node_id, name),)))
            if (node_id, name) == targets[0]:
                value = node["inputs"].get(name, options.get("default"))
                shared = (node_id, name) in joined
                found.append(Setting(targets, title, node["class_type"], kind, options, value, shared or len(own) == 1))
    return found


def _settable(node: Json, spec: tuple[str, Any, Json]) -> bool:
    name, kind, options = spec
    return kind in WIDGET_TYPES and not options.get("forceInput") and not isinstance(node["inputs"].get(name), list)


def _title(node: Json) -> str:
    return str((node.get("_meta") or {}).get("title") or node["class_type"])


def unique_names(all_settings: Iterable[Setting]) -> dict[str, Setting]:
    """Every name that means exactly one setting."""
    meanings: dict[str, list[Setting]] = {}
    for setting in all_settings:
        for name in dict.fromkeys(setting.names()):
            meanings.setdefault(name, []).append(setting)
    return {name: meant[0] for name, meant in meanings.items() if len(meant) == 1}


def shortest_name(setting: Setting, names: dict[str, Setting]) -> str:
    return next(name for name in setting.names() if names.get(name) is setting)


def apply(prompt: Prompt, info: ObjectInfo, assignments: Iterable[str], upload: Callable[[Path], str]) -> None:
    """Set ``NAME=VALUE`` assignments in a prompt, in place. Everything is checked before the first file is uploaded.

    Args:
        upload: Takes a local file to the server and returns its name there.
    Raises:
        WorkflowError: No such setting, one that could mean several, or a value it does not accept.
    """
    available = settings(prompt, info)
    names = unique_names(available)
    files: list[tuple[Setting, Path]] = []
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise WorkflowError(f"--set takes NAME=VALUE; got '{assignment}'.")
        setting = _find(name.strip(), available, names)
        if setting.is_file and Path(text).expanduser().is_file():
            files.append((setting, Path(text).expanduser()))
        else:
            _assign(prompt, setting, parse(setting, text))
    for setting, path in files:
        _assign(prompt, setting, upload(path))


def _assign(prompt: Prompt, setting: Setting, value: Any) -> None:
    for node_id, name in setting.targets:
        prompt.nodes[node_id]["inputs"][name] = value


def _find(name: str, available: list[Setting], names: dict[str, Setting]) -> Setting:
    if name in names:
        return names[name]
    several = [s for s in available if name in s.names()]
    if several:
        better = ", ".join(f"'{shortest_name(s, names)}'" for s in several)
        raise WorkflowError(f"'{name}' could be any of {len(several)} inputs: say which, as {better}.")
    short = [shortest_name(s, names) for s in available]
    close = difflib.get_close_matches(name, [*short, *names], n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(repr(c) for c in dict.fromkeys(close))}?"
        if close
        else f"it has {', '.join(short)}."
    )
    raise WorkflowError(f"This workflow has no setting '{name}'; {hint}")


def parse(setting: Setting, text: str) -> Any:
    """The value that ``text`` stands for. WorkflowError if the setting does not accept it."""
    if setting.kind == "STRING":
        return text
    if setting.is_seed and text == RANDOM:
        return random.randrange(2**53)  # what the editor can hold exactly
    if setting.kind == "BOOLEAN":
        if text.lower() in (*TRUE, *FALSE):
            return text.lower() in TRUE
    elif setting.kind == "COMBO":
        if (choice := _choice(setting, text)) is not None:
            return choice
    else:
        try:
            number = int(text) if setting.kind == "INT" else float(text)
        except ValueError:
            raise _refused(setting, text) from None
        low, high = setting.options.get("min", number), setting.options.get("max", number)
        if low <= number <= high:  # also false for nan
            return number
    raise _refused(setting, text)


def _choice(setting: Setting, text: str) -> Any:
    """The choice spelled ``text``; choices may be numbers or truth values as well."""
    return next((c for c in setting.options.get("options", []) if str(c) == text), None)


def _refused(setting: Setting, text: str) -> WorkflowError:
    close = difflib.get_close_matches(text, [str(c) for c in setting.options.get("options", [])], n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    if setting.is_file:
        return WorkflowError(f"{setting.input_name} takes {setting.allowed()}; there is no file '{text}'.{hint}")
    return WorkflowError(
        f"{setting.input_name} takes {setting.allowed() or 'nothing, its list is empty'}; got '{text}'.{hint}"
    )
