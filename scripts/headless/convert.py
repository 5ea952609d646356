"""From a workflow file to the prompt that ComfyUI's server takes.

Two kinds of JSON go by the name of workflow. The *API format* is the prompt itself: node id -> class, inputs. The *UI
format* is what the editor saves and what is dragged onto it: nodes with widget values by position, links by number, and
nodes that exist in the editor alone. This module does what the editor does when its Run button is pressed, with the
same result; ``tests/ui`` compares the two in a real browser.

Nodes of a subgraph get the editor's ids: ``"116:84"`` is node 84 inside the subgraph node 116.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import WorkflowError

Json = dict[str, Any]
ObjectInfo = Mapping[str, Json]
"""The server's answer to ``/object_info``: node class -> inputs, outputs, names."""

MUTED, BYPASSED = 2, 4
NOTES = ("Note", "MarkdownNote")
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20  # ids of the two ends of a subgraph, in its own list of links
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEEDS = ("seed", "noise_seed")
UPLOADS = ("image_upload", "animated_image_upload", "video_upload")


@dataclass(frozen=True)
class Prompt:
    """A workflow in API format.

    ``nodes`` is what the server executes. ``shared`` lists the inputs that one PrimitiveNode of the editor sets
    together: its title and (node id, input name) of each.
    """

    nodes: dict[str, Json]
    shared: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()


def to_prompt(workflow: Any, info: ObjectInfo) -> Prompt:
    """Convert a workflow of either format, read from JSON.

    Raises:
        WorkflowError: It is neither format, has nodes that the server does not know, or an input kind that only the
            editor can turn into values.
    """
    if isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list):
        try:
            return _Converter(workflow, info).convert()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
            raise WorkflowError(
                f"This workflow is damaged ({type(error).__name__}: {error}): open it in the editor and save it again."
            ) from error
    if (
        isinstance(workflow, dict)
        and workflow
        and all(isinstance(n, dict) and "class_type" in n for n in workflow.values())
    ):
        _require_known(sorted({str(node["class_type"]) for node in workflow.values()} - set(info)))
        return Prompt(copy.deepcopy(workflow))
    raise WorkflowError(
        "This is not a ComfyUI workflow: it has neither 'nodes' as the editor saves them nor nodes with a 'class_type'."
    )


def _require_known(missing: list[str]) -> None:
    if missing:
        raise WorkflowError(
            f"The server does not know {', '.join(missing)}: install the pack that has it, or update ComfyUI."
        )


def input_specs(info: Json) -> Iterator[tuple[str, Any, Json]]:
    """(name, type, options) of a node's inputs, in the order of the editor. The type of a choice is ``"COMBO"``, with
    ``options["options"]`` its values, however the node declares it."""
    for kind in ("required", "optional"):
        declared = info["input"].get(kind) or {}
        order = (info.get("input_order") or {}).get(kind) or declared
        for name in order:
            spec = declared[name]
            options = dict(spec[1]) if len(spec) > 1 and isinstance(spec[1], dict) else {}
            if isinstance(spec[0], list):
                yield name, "COMBO", {**options, "options": spec[0]}
            else:
                yield name, options.get("widgetType", spec[0]), options


def _widget_slots(info: Json, node: Json) -> Iterator[tuple[str | None, Json]]:
    """Name and options of each value in ``widgets_values``; the name is None for those that only the editor uses."""
    declared = {i["widget"]["name"] for i in node.get("inputs") or [] if isinstance(i.get("widget"), dict)}
    required = set(info["input"].get("required") or {})
    specs = list(input_specs(info))
    uploads = [options for name, _, options in specs if name in required]
    extra = [None] * (any(o.get("audio_upload") for o in uploads) * 2 + any(o.get(u) for o in uploads for u in UPLOADS))
    pending = bool(extra)
    for name, kind, options in specs:
        if pending and name not in required:  # the upload button is the last of the required widgets
            yield from ((None, {}) for _ in extra)
            pending = False
        if kind == "COMFY_DYNAMICCOMBO_V3":
            raise WorkflowError(
                f"Input '{name}' of {node['type']} changes with its own value, which only the editor can convert: "
                "save the workflow with 'Export (API)' and run that file."
            )
        if options.get("forceInput") or (kind not in WIDGET_TYPES and name not in declared):
            continue
        yield name, options
        if kind == "INT" and options.get("control_after_generate", name in SEEDS):
            yield None, {}
        elif kind == "COMBO" and options.get("control_after_generate"):
            yield from ((None, {}), (None, {}))


def widget_values(info: Json, node: Json) -> Json:
    """Values of a node's widgets by input name: from ``widgets_values``, a list by position or a dictionary, else
    defaults."""
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        slots = [name for name, _ in _widget_slots(info, node) if name is not None and name in saved]
        return {name: saved[name] for name in slots}
    values: Json = {}
    for position, (name, options) in enumerate(_widget_slots(info, node)):
        if name is None:
            continue
        if position < len(saved):
            values[name] = saved[position]
        elif (default := _default(options)) is not None:
            values[name] = default
    return values


def _default(options: Json) -> Any:
    choices = options.get("options") or [None]
    return options.get("default", choices[0])


def expand_dynamic(text: str, choose: random.Random) -> str:
    """The editor's dynamic prompts: comments go, and one alternative of each ``{a|b}`` stays; ``\\{`` keeps a brace."""
    text = re.sub(r"/\*[\s\S]*?\*/|//[^\n]*", "", text)
    innermost = re.compile(r"(?<!\\)\{([^{}]*)(?<!\\)\}")
    while found := innermost.search(text):
        text = text[: found.start()] + choose.choice(found[1].split("|")) + text[found.end() :]
    return text.replace("\\{", "{").replace("\\}", "}")


# -------------------------------------------------------------------------------------------------------- UI format


@dataclass(frozen=True)
class _Value:
    """A link that turned out to be a constant; ``source`` is the PrimitiveNode (id, title) that holds it, if one
    does."""

    value: Any
    source: tuple[str, str] | None = None


@dataclass
class _Scope:
    """One level of the graph: the whole of it, or the inside of one subgraph node."""

    prefix: str
    nodes: dict[int, Json]
    links: dict[int, tuple[int, int, int, int]]  # id -> origin node, its output, target node, its input
    definition: Json | None = None
    parent: _Scope | None = None
    instance: Json = field(default_factory=dict)
    values: Json = field(default_factory=dict)  # set on the subgraph node itself, by the name of the subgraph's input

    def node_id(self, node: Json) -> str:
        return f"{self.prefix}{node['id']}"


class _Converter:
    def __init__(self, workflow: Json, info: ObjectInfo) -> None:
        self.info = info
        self.random = random.Random()
        self.subgraphs = {s["id"]: s for s in (workflow.get("definitions") or {}).get("subgraphs") or []}
        self.root = _scope("", workflow)
        self.inner: dict[str, _Scope] = {}

    def convert(self) -> Prompt:
        self._check_types()
        nodes: dict[str, Json] = {}
        shared: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for scope, node in self._executed(self.root):
            node_id = scope.node_id(node)
            nodes[node_id] = self._api_node(scope, node, shared)
        for entry in nodes.values():  # links to nodes that are not executed
            entry["inputs"] = {k: v for k, v in entry["inputs"].items() if not _is_link(v) or v[0] in nodes}
        return Prompt(nodes, tuple((source[1], tuple(targets)) for source, targets in shared.items()))

    def _check_types(self) -> None:
        """Refuse nodes the server does not know, except decoration that nothing is connected to."""
        missing = set()
        for graph in (self.root, *(_scope("", s) for s in self.subgraphs.values())):
            for node in graph.nodes.values():
                kind = node["type"]
                if kind in self.info or kind in self.subgraphs or kind in (*NOTES, REROUTE, PRIMITIVE):
                    continue
                linked = any(node["id"] in (link[0], link[2]) for link in graph.links.values())
                if linked and node.get("mode") not in (MUTED, BYPASSED):
                    missing.add(str(kind))
        _require_known(sorted(missing))

    def _executed(self, scope: _Scope) -> Iterator[tuple[_Scope, Json]]:
        """The nodes that run, level by level into subgraphs."""
        for node in scope.nodes.values():
            if node.get("mode") in (MUTED, BYPASSED):
                continue
            if node["type"] in self.subgraphs:
                yield from self._executed(self._inside(scope, node))
            elif node["type"] in self.info:
                yield scope, node

    def _inside(self, scope: _Scope, node: Json) -> _Scope:
        key = scope.node_id(node)
        if key not in self.inner:
            definition = self.subgraphs[node["type"]]
            if any(s.definition is definition for s in _chain(scope)):
                raise WorkflowError(
                    f"Subgraph '{definition.get('name')}' contains itself: take it out of itself in the editor."
                )
            inner = _scope(f"{key}:", copy.deepcopy(definition))
            inner.definition, inner.parent, inner.instance = definition, scope, node
            self._set_promoted(inner, node)
            self.inner[key] = inner
        return self.inner[key]

    def _set_promoted(self, inner: _Scope, node: Json) -> None:
        """Values shown on the subgraph node itself: of the subgraph's inputs (``"-1"``), or of a node inside."""
        saved = node.get("widgets_values")
        if not isinstance(saved, list):
            return
        promoted = (node.get("properties") or {}).get("proxyWidgets")
        if not promoted:
            promoted = [["-1", name] for name in self._promoted_inputs(inner)]
        for (owner, name, *_), value in zip(promoted, saved, strict=False):
            if str(owner) == "-1":
                inner.values[name] = value
            elif (
                (target := inner.nodes.get(int(owner))) is not None
                and target["type"] in self.info
                and value is not None
            ):
                target["widgets_values"] = _replaced(self.info[target["type"]], target, name, value)

    def _promoted_inputs(self, inner: _Scope) -> list[str]:
        assert inner.definition is not None
        names = []
        for slot, declared in enumerate(inner.definition.get("inputs") or []):
            for origin, origin_slot, target, target_slot in inner.links.values():
                if (origin, origin_slot) == (SUBGRAPH_INPUT, slot) and target in inner.nodes:
                    inputs = inner.nodes[target].get("inputs") or []
                    if target_slot < len(inputs) and inputs[target_slot].get("widget"):
                        names.append(declared["name"])
                        break
        return names

    def _api_node(self, scope: _Scope, node: Json, shared: dict[tuple[str, str], list[tuple[str, str]]]) -> Json:
        info = self.info[node["type"]]
        inputs: Json = {}
        dynamic = {name for name, _, options in input_specs(info) if options.get("dynamicPrompts")}
        for name, value in widget_values(info, node).items():
            if name in dynamic and isinstance(value, str):
                value = expand_dynamic(value, self.random)
            inputs[name] = {"__value__": value} if isinstance(value, list) else value
        for slot in node.get("inputs") or []:
            origin = self._resolve(scope, slot.get("link"), slot.get("type"))
            if isinstance(origin, _Value):
                inputs[slot["name"]] = origin.value
                if origin.source is not None:
                    shared.setdefault(origin.source, []).append((scope.node_id(node), slot["name"]))
            elif origin is not None:
                inputs[slot["name"]] = origin
        title = node.get("title") or info.get("display_name") or node["type"]
        return {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}

    def _resolve(self, scope: _Scope, link: int | None, wanted: Any) -> list[Any] | _Value | None:
        """What a link really leads to: ``[node id, output]``, a constant, or nothing."""
        if link is None or link not in scope.links:
            return None
        origin, slot, _, _ = scope.links[link]
        if origin == SUBGRAPH_INPUT:
            return self._resolve_outside(scope, slot, wanted)
        node = scope.nodes.get(origin)
        if node is None or node.get("mode") == MUTED:
            return None
        if node.get("mode") == BYPASSED:
            return self._resolve(scope, _bypass(node, slot, wanted), wanted)
        if node["type"] == REROUTE:
            return self._resolve(scope, (node.get("inputs") or [{}])[0].get("link"), wanted)
        if node["type"] == PRIMITIVE:
            values = node.get("widgets_values") or []
            name = node.get("title") or PRIMITIVE
            return _Value(values[0], (scope.node_id(node), name)) if values else None
        if node["type"] in self.subgraphs:
            inner = self._inside(scope, node)
            ends = (i for i, (_, _, t, s) in inner.links.items() if (t, s) == (SUBGRAPH_OUTPUT, slot))
            return self._resolve(inner, next(ends, None), wanted)
        return [scope.node_id(node), slot]

    def _resolve_outside(self, scope: _Scope, slot: int, wanted: Any) -> list[Any] | _Value | None:
        assert scope.definition is not None and scope.parent is not None
        name = scope.definition["inputs"][slot]["name"]
        outer: Json = next((i for i in scope.instance.get("inputs") or [] if i["name"] == name), {})
        found = self._resolve(scope.parent, outer.get("link"), wanted)
        if found is None and name in scope.values:
            return _Value(scope.values[name])
        return found


def _chain(scope: _Scope | None) -> Iterator[_Scope]:
    while scope is not None:
        yield scope
        scope = scope.parent


def _scope(prefix: str, graph: Json) -> _Scope:
    links: dict[int, tuple[int, int, int, int]] = {}
    for link in graph.get("links") or []:
        if isinstance(link, dict):
            links[link["id"]] = (link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"])
        elif link:
            links[link[0]] = (link[1], link[2], link[3], link[4])
    return _Scope(prefix, {node["id"]: node for node in graph["nodes"]}, links)


def _bypass(node: Json, slot: int, wanted: Any) -> int | None:
    """The link that a bypassed node lets through to its output: of the input opposite to it if the type fits, else of
    the first input of that type."""
    inputs = node.get("inputs") or []
    if slot < len(inputs) and inputs[slot].get("type") == wanted:
        return inputs[slot].get("link")
    return next((i.get("link") for i in inputs if i.get("type") == wanted), None)


def _replaced(info: Json, node: Json, name: str, value: Any) -> Any:
    """A node's ``widgets_values`` with one of them, by input name, set to ``value``."""
    saved = copy.copy(node.get("widgets_values") or [])
    if isinstance(saved, dict):
        return {**saved, name: value}
    for position, (slot, _) in enumerate(_widget_slots(info, node)):
        if slot == name and position < len(saved):
            saved[position] = value
    return saved


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
