"""FP8 recipes: what is scaled how, the linears that hold FP8 weights, and the scales that follow a history."""

from __future__ import annotations

from .calibrate import forget_scales, freeze_scales, load_scales, save_scales
from .convert import apply_recipe, recipe_of, remove_recipe
from .recipe import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "Recipe",
    "apply_recipe",
    "forget_scales",
    "freeze_scales",
    "load_scales",
    "recipe_of",
    "remove_recipe",
    "save_scales",
]
