"""The table of optional libraries: which package is picked for which machine, and docs/libraries.md against it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import install_libraries
import pytest

from wan_fp8.libraries import LIBRARIES, Capabilities, Machine, Package, hint, pick, release, this_machine

PACK = Path(__file__).resolve().parents[2]
PAGE = (PACK / "docs" / "libraries.md").read_text(encoding="utf-8")
PACKAGES = [(name, package) for name, library in LIBRARIES.items() for package in library.packages]


def machine(torch: str = "2.11.0+cu130", cuda: str = "13.0", **other) -> Machine:
    given = {"python": (3, 12), "platform": "linux-x86_64", "torch": torch, "cuda": cuda, **other}
    return Machine(**given)


def picked(name: str, *args, **other) -> str:
    package = pick(name, machine(*args, **other))
    return package.requirements[0] if isinstance(package, Package) else f"none: {package}"


@pytest.mark.parametrize(
    "name, torch, cuda, requirement",
    [
        ("fa3", "2.11.0+cu130", "13.0", "fa3-fwd==0.0.3"),
        ("fa3", "2.14.1", "13.2", "fa3-fwd==0.0.3"),
        ("fa3", "2.10.0+cu130", "13.0", "tokenspeed-fa3==3.0.0.post20260810"),
        ("fa3", "2.9.1+cu130", "13.0", "tokenspeed-fa3==3.0.0.post20260810"),
        ("fa3", "2.10.0+cu128", "12.8", "none: no package of FlashAttention 3 fits"),
        ("fa3", "2.8.0+cu129", "12.9", "none: no package of FlashAttention 3 fits"),
        ("fa4", "2.11.0+cu130", "13.0", "flash-attn-4[cu13]==4.0.0b36"),
        ("fa4", "2.10.0+cu128", "12.8", "flash-attn-4==4.0.0b36"),
        ("transformer-engine", "2.11.0+cu130", "13.0", "transformer_engine[pytorch,core_cu13]==2.20.2"),
        ("transformer-engine", "2.9.1+cu128", "12.8", "transformer_engine[pytorch,core_cu12]==2.20.2"),
        ("transformer-engine", "2.9.1+cu118", "11.8", "none: no package of Transformer Engine fits"),
        ("sage", "2.11.0+cu130", "13.0", "sageattention==1.0.6"),
        ("triton", "2.9.1+cu128", "12.8", "triton==3.5.*"),
        ("triton", "2.10.0+cu128", "12.8", "triton==3.6.*"),
        ("triton", "2.12.0+cu130", "13.0", "triton==3.7.*"),
        ("triton", "2.6.0+cu124", "12.4", "none: no package of Triton fits"),
    ],
)
def test_what_is_picked(name: str, torch: str, cuda: str, requirement: str) -> None:
    assert picked(name, torch, cuda).startswith(requirement)


@pytest.mark.parametrize("name", LIBRARIES)
def test_where_nothing_fits_it_says_why(name: str) -> None:
    assert "on win32-AMD64" in picked(name, platform="win32-AMD64")
    assert "Python 3.8" in picked(name, python=(3, 8))
    assert "this one is 2.11.0+rocm6.4" in picked(name, "2.11.0+rocm6.4", None)
    assert "with the Python that runs ComfyUI" in picked(name, None, None)
    assert "compute capability" in picked(name, capabilities=((6, 1),)) and "6.1" in picked(
        name, capabilities=((6, 1),)
    )
    assert not picked(name, capabilities=((6, 1), (9, 0))).startswith("none"), "one GPU of two is enough"
    assert not picked(name).startswith("none"), "no GPU is at hand where images are built"


@pytest.mark.parametrize("name, package", PACKAGES, ids=lambda value: getattr(value, "requirements", [value])[0])
def test_packages(name: str, package: Package) -> None:
    """Versions are named, torch is never asked for, and what is said to have run is in a result file."""
    assert all("==" in requirement for requirement in package.requirements)
    names = {re.split(r"[\[=]", requirement)[0] for requirement in package.requirements}
    assert not names & (set(install_libraries.PINNED) - {name})
    assert package.command().startswith("pip install ") and package.command().count('"') == 2 * len(names)
    assert package.compiles is ("--no-build-isolation" in package.options)
    if package.seen:
        gpu, torch, cuda = package.seen.split(", ")
        distribution, version = re.match(r"([\w-]+)(?:\[.*\])?==([\d.]+\d)", package.requirements[0]).groups()  # type: ignore[union-attr]
        results = [json.loads(path.read_text()) for path in (PACK / "benchmarks" / "results").glob("*.json")]
        assert any(
            gpu in result.get("device", "")
            and result["versions"].get(distribution, "").startswith(version)
            and result["versions"]["torch"].startswith(torch.removeprefix("torch "))
            and result["versions"]["cuda"] == cuda.removeprefix("CUDA ")
            for result in results
        ), f"no result of {distribution} {version} on {package.seen}"


def rows(heading: str) -> list[list[str]]:
    body = re.search(re.escape(heading) + r"\n\|[-| ]+\|\n((?:\|.*\|\n)+)", PAGE)
    assert body is not None, heading
    return [
        [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split(" |")] for line in body[1].splitlines()
    ]


def test_the_page_has_the_packages() -> None:
    wanted = [
        [
            f"`{name}`",
            f"`{package.command()}`",
            package.needs(),
            "{}.{} or later".format(*package.python),
            ", ".join(package.platforms),
            package.seen,
        ]
        for name, package in PACKAGES
    ]
    assert rows("| name | command | torch and CUDA | Python | systems | has run on |") == wanted


def test_the_page_has_the_libraries() -> None:
    wanted = [[f"`{n}`", x.title, str(x.runs), x.brings] for n, x in LIBRARIES.items()]
    assert rows("| name | library | GPUs | brings |") == wanted


def test_the_page_names_what_is_held_and_the_exit_codes() -> None:
    held = re.search(r"holds (.+) at the versions", PAGE)
    assert held is not None and re.split(r", | and ", held[1]) == list(install_libraries.PINNED)
    codes = ("DONE", "FAILED", "REFUSED", "NOT_RESTORED")
    assert [row[0] for row in rows("| exit code | meaning |")] == [
        str(getattr(install_libraries, code)) for code in codes
    ]
    for part in install_libraries.BUILD_PACKAGES:
        assert f"`{part}`" in PAGE


def test_ranges_of_gpus() -> None:
    assert [str(Capabilities(*ends)) for ends in (((8, 9),), ((9, 0), (9, 0)), ((8, 0), (8, 9)))] == [
        "8.9 or later",
        "9.0",
        "8.0 to 8.9",
    ]
    assert Capabilities((8, 0), (8, 9)).has_one_of(((8, 6),)) and not Capabilities((8, 0), (8, 9)).has_one_of(((9, 0),))


def test_hints_for_the_sentences_of_backends() -> None:
    assert hint("fa3", "13.0") == hint("fa3", None) == 'pip install --no-deps "fa3-fwd==0.0.3"'
    assert "core_cu12" in hint("transformer-engine", "12.8")
    assert release("2.10.0+cu128") == (2, 10) and this_machine(None, None, ()).platform.count("-") >= 1
