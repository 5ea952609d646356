"""Prompts to CONDITIONING."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..wan_fp8.models.tokenizer import MAX_TOKENS
from ..wan_fp8.sampling import NEGATIVE_PROMPT
from .encoder import check_text_encoder
from .missing import require
from .notices import node_id, notice
from .schema import CONDITIONING, TextEncoderSocket, node_schema


class WanFP8TextEncode(io.ComfyNode):
    """Prompt and negative prompt through UMT5."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8TextEncode",
            display_name="Encode Wan2.2 Prompt",
            category=CONDITIONING,
            description="Encodes a prompt and a negative prompt with the text encoder of Wan2.2 (UMT5), cleaned and "
            "cut as the published code does. The encoder is read from disk when first needed and makes room "
            "afterwards; prompts that were encoded before cost nothing.",
            search_aliases=["wan prompt", "umt5", "t5", "clip text encode"],
            inputs=[
                TextEncoderSocket.Input("text_encoder", tooltip="From Load Wan2.2 Checkpoint."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="What the video shows, in any language; long, concrete prompts work best. The model reads "
                    f"{MAX_TOKENS} tokens (about 350 English words); a longer prompt is cut there, and the node says "
                    "how many tokens were lost. No (weight:1.2) syntax.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default=NEGATIVE_PROMPT,
                    dynamic_prompts=True,
                    tooltip="What to steer away from. Default: the one that the models were tuned with "
                    "(wan/configs/shared_config.py). An emptied box is encoded as an empty prompt here; the published "
                    "code puts this default in its place. Not used at a guidance of 1.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip=f"Text rows, padded with zeros to {MAX_TOKENS}."
                ),
                io.Conditioning.Output(display_name="negative", tooltip="The same for the negative prompt."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, text_encoder: Any, prompt: str, negative: str) -> io.NodeOutput:
        encoder = check_text_encoder(require(text_encoder))
        outputs, lines = [], []
        for name, text in (("prompt", prompt), ("negative", negative)):
            encoded = encoder.encode(text)
            outputs.append([[encoded.rows, {}]])
            if encoded.lost_tokens:
                lines.append(
                    f"{name}: {encoded.lost_tokens} of {MAX_TOKENS + encoded.lost_tokens} tokens lost; the model reads "
                    f"{MAX_TOKENS}, shorten it"
                )
        return io.NodeOutput(*outputs, ui=notice(node_id(cls), lines, level=logging.WARNING))
