"""The node that looks at the machine."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from . import bridge
from .notices import node_id, notice
from .schema import INSPECT, node_schema


class WanFP8Doctor(io.ComfyNode):
    """What this machine has, what of it is used, and what to choose."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8Doctor",
            display_name="Wan2.2 Doctor",
            category=INSPECT,
            is_output_node=True,
            description="Shows in one table what this machine has (GPU, memory, driver, torch), which attention "
            "kernels and FP8 recipes run on it and why the others do not, what each file in the model folders was "
            "recognised as, whether the chosen kernels compute correctly, and which preset to begin with. Needs no "
            "other node: queue it alone.",
            search_aliases=["doctor", "diagnose", "system info", "gpu info", "benchmark", "bug report", "environment"],
            inputs=[
                io.Boolean.Input(
                    "self_test",
                    default=True,
                    tooltip="Also compute an FP8 linear and the chosen attention on this GPU and compare them with "
                    "float32. Default on: takes a few seconds and under 1 GB of memory. Off: only look.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The table, as text."),
                io.String.Output(display_name="json", tooltip="The same as JSON for a bug report, without paths."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        """Never equal: what was true at the last run need not be."""
        return float("nan")  # a new one each time: equal to nothing, and not the same object either

    @classmethod
    def execute(cls, self_test: bool) -> io.NodeOutput:
        from ..wan_fp8 import doctor  # imports most of the engine, which ComfyUI's start need not wait for

        kinds = [kind for kind in doctor.KINDS if kind in folder_paths.folder_names_and_paths]
        folders = {kind: folder_paths.get_folder_paths(kind) for kind in kinds}
        report = doctor.examine(bridge.main_device(), folders=folders, self_test=self_test)
        text = report.text()
        return io.NodeOutput(text, report.json(), ui=notice(node_id(cls), text.splitlines()))
