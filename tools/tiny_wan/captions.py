"""What the drawn world can show, in words: colours, shapes, motions, backgrounds, and several phrasings of each.

The text encoder is small, so captions say what they mean by which words they hold, whatever their order: no colour
word belongs to a background, and no caption names two directions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 225, 60),
    "green": (50, 180, 75),
    "cyan": (70, 215, 235),
    "blue": (50, 90, 235),
    "purple": (140, 60, 200),
    "pink": (245, 130, 190),
}
"""RGB, 0..255."""

SHAPES: dict[str, tuple[str, ...]] = {
    "ball": ("ball", "circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}

MOTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "right": (
        ("rolls to the right", "rolling to the right"),
        ("moves to the right", "moving to the right"),
        ("slides right", "sliding right"),
    ),
    "left": (
        ("rolls to the left", "rolling to the left"),
        ("moves to the left", "moving to the left"),
        ("slides left", "sliding left"),
    ),
    "rise": (("rises", "rising"), ("moves upwards", "moving upwards"), ("floats upwards", "floating upwards")),
    "fall": (("falls", "falling"), ("drops downwards", "dropping downwards"), ("moves downwards", "moving downwards")),
    "spin": (("spins in place", "spinning in place"), ("rotates on the spot", "rotating on the spot")),
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger"), ("becomes larger", "becoming larger")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"), ("becomes tiny", "becoming tiny")),
    "bounce": (("bounces", "bouncing"), ("bounces up and down", "bouncing up and down"), ("hops", "hopping")),
    "orbit": (("orbits", "orbiting"), ("goes round and round", "going round and round"), ("loops", "looping")),
    "bump": (
        ("bumps into a wall", "bumping into a wall"),
        ("hits the wall and comes back", "hitting the wall and coming back"),
        ("collides with a wall", "colliding with a wall"),
    ),
}
"""By motion: how a caption says it, in the present and as a participle."""

BACKGROUNDS: dict[str, float] = {"black": 0.05, "grey": 0.45, "white": 0.92}
"""Brightness, 0..1."""

_SUBJECTS = ("a {colour} {shape}", "a {colour} {shape}", "the {colour} {shape}", "one {colour} {shape}")
_SENTENCES = ("{subject} {verb}", "{subject} {verb}", "{subject} {participle}", "a video of {subject} {participle}")
_PLACES = ("on a {background} background", "in front of a {background} background")


@dataclass(frozen=True, order=True, slots=True)
class Scene:
    """What a caption says, as indices into the tables above."""

    colour: int
    shape: int
    motion: int

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept out of training: a fifth, spread so that every pair is still seen."""
        return (self.colour + 2 * self.shape + 3 * self.motion) % 5 == 0

    @property
    def words(self) -> tuple[str, str, str]:
        """Colour, shape and motion by name."""
        return tuple(COLOURS)[self.colour], tuple(SHAPES)[self.shape], tuple(MOTIONS)[self.motion]


def scenes(*, held_out: bool | None = None) -> list[Scene]:
    """Every combination, or those of training (False), or those held out (True)."""
    every = [
        Scene(colour, shape, motion)
        for colour in range(len(COLOURS))
        for shape in range(len(SHAPES))
        for motion in range(len(MOTIONS))
    ]
    return [scene for scene in every if held_out is None or scene.held_out == held_out]


def caption(scene: Scene, background: int | None, rng: random.Random) -> str:
    """One phrasing.

    Args:
        scene: What happens.
        background: Index into BACKGROUNDS, or None to say nothing about it.
        rng: Chooses the phrasing.
    """
    colour, shape, motion = scene.words
    subject = rng.choice(_SUBJECTS).format(colour=colour, shape=rng.choice(SHAPES[shape]))
    verb, participle = rng.choice(MOTIONS[motion])
    text = rng.choice(_SENTENCES).format(subject=subject, verb=verb, participle=participle)
    if background is not None:
        text = f"{text} {rng.choice(_PLACES).format(background=tuple(BACKGROUNDS)[background])}"
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:] + "."
    return text


def phrasings(scene: Scene, background: int | None, count: int, seed: int = 0) -> list[str]:
    """``count`` different captions of a scene; the same ones every time."""
    rng = random.Random(f"{seed}/{scene}/{background}")
    found: dict[str, None] = {}
    while len(found) < count:
        found[caption(scene, background, rng)] = None
    return list(found)


def vocabulary() -> list[str]:
    """Captions that hold every word, for the tokenizer."""
    rng = random.Random(0)
    places: Sequence[int | None] = (None, *range(len(BACKGROUNDS)))
    return sorted({caption(scene, place, rng) for scene in scenes() for place in places for _ in range(4)})
