"""Nodes for several GPUs: a MODEL, its text encoder and its VAE in a pool of worker processes, and the end of the
pools."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import torch
from comfy_api.latest import io

from ..wan_fp8.errors import InputError
from ..wan_fp8.parallel import pools
from ..wan_fp8.parallel.needs import TextNeeds
from ..wan_fp8.parallel.outside import TOKEN_VARIABLE, is_loopback, parse_address
from ..wan_fp8.parallel.pools import PoolSpec
from ..wan_fp8.parallel.remote import Topology
from . import bridge
from .encoder import check_text_encoder
from .missing import Missing
from .notices import node_id, notice
from .schema import SETTINGS, TextEncoderSocket, node_schema
from .settings import changed, low_input, model_input, outputs

ALL = "all"
AUTO = "auto"
WEIGHTS = ("auto", "replicate", "shard")
"""Saved in workflows: the order stays, new ones go last."""


class WanFP8MultiGPU(io.ComfyNode):
    """The transformer of a MODEL in one process for each GPU."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8MultiGPU",
            display_name="Wan2.2 Multi-GPU",
            category=SETTINGS,
            is_experimental=True,
            description="Runs the transformer of a Wan2.2 MODEL on several GPUs, one process each, which read the "
            "checkpoint themselves; text encoder and VAE too, where they are connected. Samplers, previews, "
            "cancelling, LoRAs, FP8 recipes, attention and MagCache work as on one GPU, before this node or after it. "
            "The processes stay between prompts and end with ComfyUI, with Stop Wan2.2 Pools, or when no MODEL uses "
            "them any more.",
            search_aliases=["multi gpu", "parallel", "ulysses", "xdit", "fsdp", "distributed"],
            inputs=[
                model_input("Two-expert checkpoints: the high-noise expert here, the other at 'model_low'."),
                io.String.Input(
                    "gpus",
                    default=ALL,
                    tooltip="Default all: every GPU that ComfyUI sees. Or their numbers with commas between: '0,1'. "
                    "'cpu:2' runs two processes on the CPU, to try a graph. Each GPU's process takes about 0.5 GiB "
                    "beside the weights.",
                ),
                io.String.Input(
                    "topology",
                    default=AUTO,
                    tooltip="How a forward is split: 'cfg x ulysses x ring', such as '2x2x1'. cfg 2 gives each half of "
                    "guidance its GPUs, ulysses trades tokens for heads and must divide them (40 in A14B, 24 in 5B), "
                    "ring takes what is left. Default auto: the split that sends least, chosen from the number of "
                    "GPUs, guidance and heads; it is shown with its reason when the run begins.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHTS),
                    default=AUTO,
                    tooltip="replicate: every GPU holds all weights (FP8: 14.5 GB for each 14B expert), nothing is "
                    "sent "
                    "for them. shard: each holds a part and gathers a block's while the one before runs (FSDP2); LoRAs "
                    "then load the model again. Default auto: replicated where both experts fit, beside the text "
                    "encoder and the VAE that are connected.",
                ),
                io.String.Input(
                    "address",
                    default="",
                    tooltip="host:port of a pool that was started with torchrun, on this host or others; 'gpus' is "
                    f"then not used. Its token comes from the environment variable {TOKEN_VARIABLE} of "
                    "ComfyUI, so that it is not saved with the workflow. Default empty: a pool of this ComfyUI's own. "
                    "docs/multi_host.md.",
                ),
                low_input(),
                TextEncoderSocket.Input(
                    "text_encoder",
                    optional=True,
                    tooltip="From Load Wan2.2 Checkpoint, to run on the pool's first GPU, which reads it itself (bf16: "
                    "11.4 GB), or on all, each with a part, where it does not fit there beside the models. The rows "
                    "are the same. Default: not connected, "
                    "it runs in ComfyUI.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="A Wan2.1 or Wan2.2 VAE, to decode and encode on all GPUs of the pool, each some rows of "
                    "every frame. Core's VAE Decode and all samplers take it. Another model's goes through unchanged, "
                    "and the node says so. Default: not connected, it runs in ComfyUI.",
                ),
            ],
            outputs=[
                *outputs("in the pool"),
                TextEncoderSocket.Output(
                    display_name="text_encoder",
                    tooltip="'text_encoder' in the pool, for Encode Wan2.2 Prompt.",
                ),
                io.Vae.Output(
                    display_name="vae", tooltip="'vae' over all GPUs of the pool, for VAE Decode and our samplers."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        gpus: str,
        topology: str,
        weights: str,
        address: str,
        model_low: Any = None,
        text_encoder: Any = None,
        vae: Any = None,
    ) -> io.NodeOutput:
        pair = model_low is not None and model_low is not model
        spec = _pool(gpus, address)
        encoder = (
            None if text_encoder is None or isinstance(text_encoder, Missing) else check_text_encoder(text_encoder)
        )
        decoder, stays = (vae, None) if vae is None or isinstance(vae, Missing) else bridge.vae_in_pool(vae, spec)
        chosen = dataclasses.replace(
            _topology(topology, weights, experts=1 + pair),
            text=None if encoder is None or encoder.source is None else TextNeeds.of(encoder.source),
            vae=bridge.vae_needs(decoder),
        )
        results = changed(cls, model, model_low, lambda given: bridge.in_pool(given, spec, chosen))
        remote = bridge.remote_of(results[0])
        pool = remote.pool()
        dims, made = remote.layout(pool)
        if pair:
            bridge.remote_of(results[1]).pool()
        lines = [f"pool of {pool.world}: {_places(pool)}", str(dims if made is None else made)]
        if encoder is not None:
            place = remote.text_place(pool, dims)
            shared = place is not None and place.shared
            text_encoder = encoder.in_pool(spec, sharded=shared)
            first = _places(pool).split(", ")[0]
            lines.append("text encoder: " + (f"shared by {pool.world} ranks" if shared else f"on {first}"))
        if decoder is not None and not isinstance(decoder, Missing):
            lines.append(stays or f"VAE: rows of every frame over {pool.world} ranks, {_name(decoder.vae_dtype)}")
        return io.NodeOutput(
            *results,
            _not_connected("text_encoder", "the text encoder") if text_encoder is None else text_encoder,
            _not_connected("vae", "the VAE") if decoder is None else decoder,
            ui=notice(node_id(cls), lines),
        )


class WanFP8StopPool(io.ComfyNode):
    """Ends the worker processes and frees their GPUs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WanFP8StopPool",
            display_name="Stop Wan2.2 Pools",
            category=SETTINGS,
            is_output_node=True,
            not_idempotent=True,
            is_experimental=True,
            description="Ends the worker processes of Wan2.2 Multi-GPU and frees their GPUs; pools that were started "
            "with "
            "torchrun are left, with nothing loaded. Connect the latents of the sampler that shall be done first. The "
            "next prompt that needs a pool starts one.",
            search_aliases=["stop pool", "free gpu"],
            inputs=[
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Handed through: the pools end when it is there. Default: not connected, they end at once.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="What came in.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, latent: Any = None) -> io.NodeOutput:
        count = pools.stop_pools()
        return io.NodeOutput(
            latent, ui=notice(node_id(cls), [f"{count} pools ended" if count != 1 else "1 pool ended"])
        )


def _not_connected(box: str, what: str) -> Missing:
    return Missing(
        f"Wan2.2 Multi-GPU returns '{box}' only when '{box}' is connected to it: connect {what} there, or take it from "
        "its loader"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _places(pool: pools.Pool) -> str:
    return ", ".join(entry["device"] for entry in pool.connection.ranks) or ", ".join(pool.spec.devices)


def _pool(gpus: str, address: str) -> PoolSpec:
    """
    Raises:
        InputError: what was typed is no list of GPUs, or no address.
    """
    if address.strip():
        host, _ = parse_address(address)
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token and not is_loopback(host):
            raise InputError(
                f"a pool at an address wants a token: set the environment variable {TOKEN_VARIABLE} to the one that "
                "it was "
                "started with, and start ComfyUI again"
            )
        return PoolSpec(address=address.strip(), token=token)
    wanted = gpus.strip().lower()
    if (processes := re.fullmatch(r"cpu:(\d+)", wanted)) and 1 <= int(processes[1]) <= 64:
        return PoolSpec(devices=("cpu",) * int(processes[1]))
    if wanted == ALL:
        count = torch.cuda.device_count()
        if count == 0:
            raise InputError(
                "there is no NVIDIA GPU here for a pool: 'cpu:2' runs two processes on the CPU, to try a graph"
            )
        return PoolSpec(devices=tuple(f"cuda:{number}" for number in range(count)))
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", wanted):
        raise InputError(f"gpus is '{ALL}' or numbers with commas between, such as '0,1'; got {gpus!r}")
    return PoolSpec(devices=tuple(f"cuda:{int(number)}" for number in wanted.split(",")))


def _topology(text: str, weights: str, experts: int) -> Topology:
    if weights not in WEIGHTS:
        raise InputError(f"weights is one of {', '.join(WEIGHTS)}; got {weights!r}")
    if text.strip().lower() == AUTO:
        return Topology(weights=weights, experts=experts)
    numbers = re.fullmatch(r"\s*(\d+)\s*[x*]\s*(\d+)\s*[x*]\s*(\d+)\s*", text.lower())
    if numbers is None:
        raise InputError(f"topology is '{AUTO}' or cfg x ulysses x ring, such as '2x2x1'; got {text!r}")
    cfg, ulysses, ring = (int(number) for number in numbers.groups())
    return Topology(cfg=cfg, ulysses=ulysses, ring=ring, weights=weights, experts=experts)
