"""Small workflows in the editor's format, and what a server would say about their nodes, for tests without a server."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def _node(required: Json, optional: Json | None = None, display: str = "") -> Json:
    optional = optional or {}
    order = {"required": list(required), "optional": list(optional)}
    return {"input": {"required": required, "optional": optional}, "input_order": order, "display_name": display}


INFO: Json = {
    "Loader": _node({"name": [["a.safetensors", "b.safetensors"]], "strict": ["BOOLEAN", {"default": True}]}),
    "Encode": _node(
        {"text": ["STRING", {"multiline": True, "dynamicPrompts": True}], "clip": ["CLIP"]}, display="Encode Text"
    ),
    "Sample": _node(
        {
            "model": ["MODEL"],
            "seed": ["INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}],
            "steps": ["INT", {"default": 20, "min": 1, "max": 100}],
            "cfg": ["FLOAT", {"default": 3.5, "min": 0.0, "max": 10.0}],
            "solver": ["COMBO", {"options": ["unipc", "euler"], "default": "unipc"}],
        },
        {"positive": ["CONDITIONING"], "shift": ["FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0}]},
    ),
    "Lora": _node({"model": ["MODEL"], "strength": ["FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0}]}),
    "Picture": _node(
        {"image": [["old.png"], {"image_upload": True}]},
        {"alpha": ["BOOLEAN", {"default": False}]},
    ),
    "Pick": _node({"choice": ["COMBO", {"options": ["x", "y"], "control_after_generate": True}], "last": ["INT", {}]}),
    "Forced": _node({"amount": ["FLOAT", {"forceInput": True}], "label": ["STRING", {}]}),
    "Save": _node({"samples": ["LATENT"], "prefix": ["STRING", {"default": "out"}]}),
}


class Graph:
    """Builds a workflow as the editor saves it; inputs are given as (node id, output slot)."""

    def __init__(self) -> None:
        self.nodes: list[Json] = []
        self.links: list[list[Any]] = []

    def add(self, node_id: int, kind: str, inputs: Json | None = None, values: Any = None, **more: Any) -> Graph:
        """``inputs``: name -> (type, origin id, origin slot); a fourth item marks the input of a widget."""
        slots = []
        for position, (name, (wanted, origin, slot, *widget)) in enumerate((inputs or {}).items()):
            entry: Json = {"name": name, "type": wanted, "link": None}
            if widget:
                entry["widget"] = {"name": name}
            if origin is not None:
                entry["link"] = len(self.links) + 1
                self.links.append([entry["link"], origin, slot, node_id, position, wanted])
            slots.append(entry)
        node = {"id": node_id, "type": kind, "mode": 0, "inputs": slots, **more}
        self.nodes.append(node if values is None else {**node, "widgets_values": values})
        return self

    def json(self, **more: Any) -> Json:
        return {"nodes": self.nodes, "links": self.links, "version": 0.4, **more}

    def subgraph(
        self, name: str, inputs: list[tuple[str, str]], outputs: list[tuple[str, str]], ends: list[tuple[int, int]]
    ) -> Json:
        """This graph as the definition of a subgraph; a node's input from origin -10 is one of ``inputs``. ``ends`` are
        the (node id, slot) that feed its outputs."""
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        links = [dict(zip(keys, link, strict=True)) for link in self.links]
        for slot, (origin, origin_slot) in enumerate(ends):
            links.append(dict(zip(keys, (900 + slot, origin, origin_slot, -20, slot, outputs[slot][1]), strict=True)))
        return {
            "id": f"uuid-{name}",
            "name": name,
            "nodes": self.nodes,
            "links": links,
            "inputs": [{"name": n, "type": t} for n, t in inputs],
            "outputs": [{"name": n, "type": t} for n, t in outputs],
        }
