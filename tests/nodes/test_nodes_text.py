"""Prompts: what the transformer gets, what is kept, and what the user is told."""

from __future__ import annotations

import logging

import nodes_kit
import pytest
import torch
from nodes_kit import call

pytestmark = pytest.mark.usefixtures("comfy_core", "inference")

LONG = "a cat and a dog " * 400


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


class Counted:
    """A tiny text encoder behind a handle, with counts of what happened to it."""

    def __init__(self, folder, identity="tiny"):
        text_encoder, handle = nodes_kit.module("wan_fp8.models.text_encoder"), nodes_kit.module("nodes.encoder")
        self.loads, self.runs = 0, []
        self.encoder = text_encoder.load_text_encoder(folder, torch.float32)

        def load():
            self.loads += 1
            encode = self.encoder.encode_prompt

            def counted(prompt):
                self.runs.append(getattr(prompt, "text", prompt))
                return encode(prompt)

            self.encoder.encode_prompt = counted
            return self.encoder

        self.handle = handle.TextEncoderHandle(load, (identity, str(folder)), "tiny")


@pytest.fixture
def counted(checkpoints):
    nodes_kit.module("nodes.encoder").CACHE.clear()
    return Counted(checkpoints["t2v"])


def test_rows_are_the_encoders_padded_with_zeros(counted):
    positive, negative = call("WanFP8TextEncode", text_encoder=counted.handle, prompt="a cat", negative="a dog").args
    for conditioning, text in ((positive, "a cat"), (negative, "a dog")):
        ((rows, extras),) = conditioning
        expected = counted.encoder.encode(text)
        count = len(counted.encoder.tokenize(text).ids)
        assert rows.shape == (1, 512, counted.encoder.width) and rows.dtype is torch.float32 and extras == {}
        assert torch.equal(rows, expected) and rows[0, count:].abs().max() == 0 and rows[0, :count].abs().min() > 0


def test_the_default_negative_prompt_is_the_published_one():
    import hashlib

    schema = nodes_kit.load_pack()["WanFP8TextEncode"].GET_SCHEMA()
    default = next(i.default for i in schema.inputs if i.id == "negative")
    digest = "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    assert hashlib.sha256(default.encode()).hexdigest() == digest


def test_an_emptied_negative_prompt_stays_empty(counted):
    _, negative = call("WanFP8TextEncode", text_encoder=counted.handle, prompt="a cat", negative="").args
    assert torch.equal(negative[0][0], counted.encoder.encode(""))
    assert negative[0][0][0, 1:].abs().max() == 0, "only the row of the end-of-sequence token"


def test_prompts_are_cleaned_as_the_published_code_does(counted):
    messy, clean = (
        call("WanFP8TextEncode", text_encoder=counted.handle, prompt=p, negative="").args[0]
        for p in ("  a\n cat &amp;amp; a   dog ", "a cat & a dog")
    )
    assert torch.equal(messy[0][0], clean[0][0])


def test_a_prompt_is_encoded_once(counted):
    for prompt in ("one", "two", "one", "one"):
        call("WanFP8TextEncode", text_encoder=counted.handle, prompt=prompt, negative="bad")
    assert counted.loads == 1 and counted.runs == ["one", "bad", "two"]


def test_another_handle_on_the_same_file_needs_no_load(counted, checkpoints):
    first = counted.handle.encode("shared")
    again = Counted(checkpoints["t2v"])
    assert torch.equal(again.handle.encode("shared").rows, first.rows) and again.loads == 0
    other = Counted(checkpoints["t2v"], identity="the file has changed")
    other.handle.encode("shared")
    assert other.loads == 1


def test_what_was_handed_out_may_be_written_to(counted):
    first = counted.handle.encode("mine")
    kept = first.rows.clone()
    first.rows.zero_()
    assert torch.equal(counted.handle.encode("mine").rows, kept)


def test_the_cache_is_bounded_and_forgets_the_oldest():
    cache = nodes_kit.module("nodes.encoder").PromptCache(3)
    for index in range(3):
        cache.put(index, torch.zeros(1, 4), 0)
    cache.get(0)
    cache.put(3, torch.zeros(1, 4), 0)
    assert len(cache) == 3 and cache.get(1) is None and cache.get(0) is not None


def test_a_prompt_beyond_512_tokens_says_how_many_were_lost(counted, caplog):
    tokens = len(counted.encoder.tokenizer.ids(LONG.strip()))
    assert tokens > 600
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING, "wan_fp8"):
            output = call("WanFP8TextEncode", text_encoder=counted.handle, prompt=LONG, negative="")
        line = f"prompt: {tokens - 512} of {tokens} tokens lost; the model reads 512"
        assert line in output.ui.value and line in caplog.text and "negative" not in output.ui.value
    assert output.args[0][0][0].shape[1] == 512
    assert call("WanFP8TextEncode", text_encoder=counted.handle, prompt="short", negative="").ui is None


def test_the_encoder_is_under_cores_memory_management(counted):
    import comfy.model_management as management

    counted.handle.encode("where are you")
    patcher = counted.handle._patcher
    assert any(m.model is patcher for m in management.current_loaded_models)
    assert patcher.model_size() >= counted.encoder.num_bytes
    management.unload_all_models()
    assert not any(m.model is patcher for m in management.current_loaded_models)
    counted.handle.encode("and now")
    assert counted.loads == 1 and counted.runs == ["where are you", "and now"]


def test_other_things_in_place_of_the_encoder(counted):
    errors = nodes_kit.module("wan_fp8.errors")
    with pytest.raises(errors.CheckpointError, match="use core's CLIP Text Encode"):
        call("WanFP8TextEncode", text_encoder=object(), prompt="")
    counted.encoder.tokenizer = None
    with pytest.raises(errors.CheckpointError, match="no tokenizer"):
        counted.handle.encode("a prompt that nobody encoded before")


def test_a_notice_reaches_the_node_on_the_screen(monkeypatch):
    import sys
    import types

    sent = []
    instance = types.SimpleNamespace(send_progress_text=lambda text, node: sent.append((text, node)))
    server = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "server", server)
    notices = nodes_kit.module("nodes.notices")
    assert notices.notice("12", ["one", "two"]).value == "one\ntwo" and sent == [("one\ntwo", "12")]
    instance.send_progress_text = None
    assert notices.notice("12", ["three"]).value == "three", "an older host has no such thing"
    assert notices.notice("12", []) is None and len(sent) == 1
