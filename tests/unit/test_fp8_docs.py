"""docs/fp8.md against the data and the code that it describes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from wan_fp8.gemm import GEMM, register_backends
from wan_fp8.gemm.capabilities import CAPABILITIES, Hardware
from wan_fp8.models.specs import T2V_A14B
from wan_fp8.quant.recipe import GRANULARITIES, NOT_OFFERED, RECIPES, Recipe

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "fp8.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    body = re.search(re.escape(heading) + r"\n\|[-| ]+\|\n((?:\|.*\|\n)+)", PAGE)
    assert body is not None, heading
    return [
        [cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|")] for line in body[1].splitlines()
    ]


def test_hardware_is_the_capability_table() -> None:
    columns = [column for column in Hardware if column is not Hardware.OTHER]
    shown = rows("| " + " | ".join(("recipe", "backend", *columns)) + " |")
    seen = set()
    for recipes, backend, *cells in shown:
        for recipe in GRANULARITIES if recipes == "every recipe" else recipes.split(", "):
            row = CAPABILITIES[backend, GRANULARITIES[recipe]]
            wanted = ["no" if isinstance(row[column], str) else str(row[column]) for column in columns]
            assert cells == wanted, (recipe, backend)
            assert (recipe, backend) not in seen
            seen.add((recipe, backend))
    register_backends()
    assert seen == {(recipe, backend) for recipe in GRANULARITIES for backend in set(GEMM.names) - {"auto"}}


def test_recipes_and_backends_are_all_there() -> None:
    described = {row[0] for row in rows("| recipe | scale of an activation | scale of a weight | use it |")}
    assert described == set(RECIPES)
    register_backends()
    shown = {row[0]: row[2] for row in rows("| backend | products | chosen by `auto` |")}
    assert set(shown) == set(GEMM.names) - {"auto"}
    order = [name for name in GEMM.names if name != "auto" and GEMM.backend(name).priority > 0]
    assert [shown[name] for name in order] == ["first", "second"]
    assert all(shown[name] == "never" for name in set(shown) - set(order))
    assert all(name in PAGE for name in NOT_OFFERED)


def test_measured_figures_are_those_of_the_scripts() -> None:
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    measured = json.loads((results / "dit_i2v-a14b_1280x720_h100.json").read_text())["rows"]
    wanted = [
        [row["recipe"], row["backend"], f"{row['layer_ms']:.1f}", f"{row['error']:.4f}"]
        for row in measured
        if row["attention"] == "fa3"
    ]
    assert rows("| recipe | backend | ms | error |") == wanted
    products = json.loads((results / "linear_h100.json").read_text())["rows"]
    errors = [row["error"] for row in products if "error" in row]
    assert min(errors) > 0.0365 and max(errors) < 0.0385 and "0.037 of the result" in PAGE


def test_what_keep_costs() -> None:
    """One byte a weight: the gigabytes that the page says, from the widths of A14B."""
    spec = T2V_A14B
    sizes = {
        **{f"{kind}.{name}": spec.dim**2 for kind in ("self_attn", "cross_attn") for name in "qkvo"},
        "ffn.0": spec.dim * spec.ffn_dim,
        "ffn.2": spec.dim * spec.ffn_dim,
    }

    def weights(recipe: Recipe) -> int:
        return sum(
            size for index in range(spec.num_layers) for name, size in sizes.items()
            if recipe.converts(f"blocks.{index}.{name}")
        )  # fmt: skip

    total = weights(Recipe("rowwise"))
    assert f"{2 * total / 1e9:.1f} GB | {total / 1e9:.1f} GB" in PAGE
    for prefixes, _, cost in rows("| keep | what stays | cost for one A14B expert |"):
        kept = total - weights(Recipe("rowwise", keep=tuple(prefix.strip() for prefix in prefixes.split(","))))
        assert cost == f"{kept / 1e9:.1f} GB", prefixes
