"""Heads that keep different shares of the blocks: each rank gets as many heads, and about as much to do."""

from __future__ import annotations

import itertools
from statistics import fmean

import pytest
import torch

from wan_fp8.attention.sparse.share import HeadShare
from wan_fp8.parallel.balance import balanced, imbalance


def densities(kind: str, heads: int, seed: int = 0) -> list[float]:
    """Shares of the blocks that heads might keep; made up, as nobody has measured a real model's here."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(heads, generator=generator)
    if kind == "uniform":
        return (0.1 + 0.9 * spread).tolist()
    if kind == "one in eight dense":
        return torch.where(torch.rand(heads, generator=generator) < 0.125, 1.0, 0.1 + 0.4 * spread).tolist()
    return sorted((0.1 + 0.9 * spread**3).tolist())  # neighbours alike, the worst for equal parts of the given order


@pytest.mark.parametrize("kind", ["uniform", "one in eight dense", "sorted"])
@pytest.mark.parametrize(("heads", "ranks"), [(40, 2), (40, 4), (40, 8), (24, 8), (24, 3)])
def test_no_rank_has_much_more_to_do_than_the_mean(kind: str, heads: int, ranks: int) -> None:
    for seed in range(5):
        work = densities(kind, heads, seed)
        order = balanced(work, ranks)
        assert sorted(order) == list(range(heads)) and order == balanced(list(work), ranks)
        after = imbalance(work, order, ranks)
        # the rank of the fullest head holds as many heads as the others: it cannot have less to do than this
        least = max(1.0, (max(work) + sum(sorted(work)[: heads // ranks - 1])) * ranks / sum(work))
        assert after <= (1.01 if heads // ranks >= 8 else 1.1) * least, (seed, after, least)
        assert after <= imbalance(work, range(heads), ranks)


@pytest.mark.parametrize(
    ("heads", "ranks", "kind", "before", "after"),
    [
        (40, 4, "uniform", 1.156, 1.0004),
        (40, 8, "uniform", 1.324, 1.0039),
        (24, 8, "one in eight dense", 1.643, 1.169),
    ],
)
def test_figures_of_the_docs(heads: int, ranks: int, kind: str, before: float, after: float) -> None:
    """Means over 20 draws, as ``docs/sparse.md`` has them."""
    drawn = [densities(kind, heads, seed) for seed in range(20)]
    assert fmean(imbalance(w, range(heads), ranks) for w in drawn) == pytest.approx(before, abs=1e-3)
    assert fmean(imbalance(w, balanced(w, ranks), ranks) for w in drawn) == pytest.approx(after, abs=1e-3)


def test_few_heads_are_shared_as_well_as_they_can_be() -> None:
    """Against every way to share eight heads among two ranks."""
    for seed in range(10):
        work = densities("uniform", 8, seed)
        best = min(
            imbalance(work, [*part, *(head for head in range(8) if head not in part)], 2)
            for part in itertools.combinations(range(8), 4)
        )
        assert imbalance(work, balanced(work, 2), 2) <= best * 1.03


def test_heads_that_are_alike_and_one_rank() -> None:
    assert balanced([0.5] * 4, 1) == [0, 1, 2, 3]
    assert imbalance([0.5] * 12, balanced([0.5] * 12, 4), 4) == 1.0
    assert HeadShare.part([3, 0, 2, 1], 1, 2) == HeadShare((2, 1), 4)
    places, numbers = HeadShare((2, 1), 4).among([0, 1, 2], torch.device("cpu"))
    assert places.tolist() == [1, 0] and numbers.tolist() == [1, 2]
