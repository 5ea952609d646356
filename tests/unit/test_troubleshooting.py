"""docs/troubleshooting.md has every sentence with which the pack refuses something. The other direction, that each
quoted sentence is one of the code's, is held by ``test_docs.py``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

PACK = Path(__file__).resolve().parents[2]
FOLDERS = ("nodes", "wan_fp8", "scripts/headless")
HOLE = "…"
NODES_THAT_SAY_WHY = {"Missing"}
"""An output with nothing on it: its argument is the sentence that its user gets."""

SAID_BY = {
    "nodes/bridge/caching.py: reason": "refusal few_steps mismatch",
    "nodes/loaders.py: _no_part(chosen.folder, name, 'VAE', 'vae')": "_no_part",
    "nodes/loaders.py: _no_part(chosen.folder, name, 'text encoder', 'text_encoder')": "_no_part",
    "nodes/missing.py: part.__dict__['reason']": "",
    "nodes/missing.py: self.__dict__['reason']": "",
    "scripts/headless/client.py: _refusal(answer, prompt)": "_refusal",
    "scripts/headless/client.py: … failed: … (…)": "",
    "wan_fp8/caching/step_cache.py: reason": "refusal few_steps mismatch",
    "wan_fp8/checkpoint/header.py: … …": "refuse_format",
    "wan_fp8/models/wan.py: cores[0].sparse_refusal": "RING_AND_SPARSE",
    "wan_fp8/parallel/pools.py: why": "STOPPED DISPLACED UNUSED",
    "wan_fp8/parallel/remote.py: reason": "RING_AND_SPARSE",
    "wan_fp8/sampling/solvers.py: self._order_message(index)": "_order_message",
}
"""Errors whose sentence is made elsewhere: the functions and constants that make it. ``Missing`` is given its sentence
where it is made, and that is looked at there; what a node raised is quoted from the server's answer."""

INTERNAL = {
    "scripts/headless/client.py: Cancelled.": "by Ctrl-C of who reads it",
    "wan_fp8/parallel/wire.py": "messages between processes: a PoolError is made of them, and is what a user reads",
    "wan_fp8/parallel/plain.py": "the same",
    "wan_fp8/parallel/serving.py: another rank could not …": "said where nothing failed; who failed is heard",
    "wan_fp8/parallel/serving.py: sharded weights take no merge": "remote.py loads the model again in place of asking",
    "wan_fp8/parallel/serving_parts.py: a pool's Wan… VAE takes one clip": "parts.py asks for nothing else",
    "wan_fp8/parallel/serving_parts.py: a pool reads this from": "the same",
    "wan_fp8/parallel/serving_parts.py: the design of a VAE is one of": "the same",
    "nodes/bridge/stages.py: a run needs at least": "the sampler nodes ask for nothing else",
    "nodes/bridge/stages.py: the models of a run take their steps in order": "the same",
    "nodes/bridge/stages.py: noise must have the shape of the latents": "the same",
}
"""What nobody meets who uses the nodes, the commands or ``wan_fp8`` from Python: a file, or the beginning of a sentence
in it, and why."""


class Said(NamedTuple):
    file: str
    text: str
    """With a hole for every value put into it."""

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"


@cache
def _trees() -> dict[str, ast.Module]:
    files = [path for folder in FOLDERS for path in sorted((PACK / folder).rglob("*.py"))]
    return {str(path.relative_to(PACK)): ast.parse(path.read_text(encoding="utf-8")) for path in files}


@cache
def _errors() -> frozenset[str]:
    """Names of the classes of wan_fp8/errors.py and scripts/headless/errors.py, and of all that descend from them."""
    bases = {
        node.name: {_last_name(base) for base in node.bases}
        for tree in _trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"WanFP8Error", "RunError"}
    while more := {name for name, of in bases.items() if of & found} - found:
        found |= more
    return frozenset(found)


def _texts(node: ast.expr) -> list[str] | None:
    """What an expression reads like, one text for each branch; None: it is no text that stands here."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in parts)
            return [re.sub(f"{HOLE}+", HOLE, text)]
        case ast.IfExp(body=one, orelse=other):
            branches = [_texts(one), _texts(other)]
            return None if None in branches else [text for branch in branches for text in branch or ()]
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            halves = [_texts(left) or [HOLE], _texts(right) or [HOLE]]
            return ["".join(pair) for pair in product(*halves)]
    return None


def _last_name(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


@cache
def _raised() -> tuple[Said, ...]:
    """Every sentence that is put into an error; in place of a text that is made elsewhere, the expression."""
    found: list[Said] = []
    classes = _errors() | NODES_THAT_SAY_WHY
    for file, tree in _trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and _last_name(node.func) in classes:
                found += [Said(file, text) for text in _texts(node.args[0]) or [ast.unparse(node.args[0])]]
    return tuple(found)


@cache
def _makers() -> dict[str, list[tuple[str, list[ast.AST]]]]:
    """Functions and constants by name: where they are, and the pieces of what they are made of."""
    found: dict[str, list[tuple[str, list[ast.AST]]]] = {}
    for file, tree in _trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append((file, [*node.body]))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found.setdefault(node.targets[0].id, []).append((file, [node.value]))
    return found


def _made_by(name: str) -> Iterator[Said]:
    """Sentences in the functions, or of the constant, of this name."""
    for file, pieces in _makers()[name]:
        parts = [*pieces]
        while parts:
            part = parts.pop()
            texts = _texts(part) if isinstance(part, ast.expr) else None
            is_docstring = isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
            if texts is None and not is_docstring and not isinstance(part, ast.Call):
                parts += ast.iter_child_nodes(part)
            yield from (Said(file, text) for text in texts or () if _words(text) >= 4)


def _words(text: str) -> int:
    return len(re.findall(r"[A-Za-z]{2,}", text.replace(HOLE, " ")))


def _is_internal(said: Said) -> bool:
    return any(str(said).startswith(f"{name}: " if name.endswith(".py") else name) for name in INTERNAL)


@cache
def _quoted() -> tuple[str, ...]:
    page = (PACK / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return tuple(re.findall(r"^> (.+)$", page, re.MULTILINE))


def covers(quoted: str, text: str) -> bool:
    """True if who has ``text`` before them finds ``quoted`` on the page: it reads the same from its first words on, but
    for holes. A quotation may leave off the end."""
    return _words(quoted) >= 2 and _reading(quoted).match(text.replace("\n", " ")) is not None


@cache
def _reading(quoted: str) -> re.Pattern[str]:
    fixed = (re.escape(part.strip(" ")) for part in quoted.split(HOLE))
    return re.compile(r".*?".join(fixed).replace(r"\ ", rf"[ {HOLE}]+"))


@cache
def _sentences() -> list[Said]:
    elsewhere = {said for name in {n for names in SAID_BY.values() for n in names.split()} for said in _made_by(name)}
    direct = {said for said in _raised() if str(said) not in SAID_BY and not _is_internal(said)}
    return sorted(direct | elsewhere)


def test_every_sentence_is_on_the_page() -> None:
    missing = [str(said) for said in _sentences() if not any(covers(quoted, said.text) for quoted in _quoted())]
    assert not missing, "not in docs/troubleshooting.md:\n" + "\n".join(missing)


def test_there_are_sentences_and_each_is_a_sentence() -> None:
    """What is put into an error is a text that can be looked for, or stands in SAID_BY."""
    assert len(_sentences()) > 350
    assert [str(said) for said in _sentences() if _words(said.text) < 2] == []


@pytest.mark.parametrize("name", [*SAID_BY, *INTERNAL])
def test_what_is_named_here_is_still_there(name: str) -> None:
    assert any(str(said).startswith(name) for said in _raised())
    assert all(list(_made_by(maker)) for maker in SAID_BY.get(name, "").split())


@pytest.mark.parametrize(
    ("quoted", "text", "expected"),
    [
        ("… is truncated: … bytes", "… is truncated: … promises … bytes and … are there", True),
        ("there is no file …", "there is no file …; check the name", True),
        ("no file …", "there is no file …; check the name", False),
        ("there is no folder …", "there is no file …; check the name", False),
        ("…", "there is no file …; check the name", False),
    ],
)
def test_covering(quoted: str, text: str, expected: bool) -> None:
    assert covers(quoted, text) is expected
