"""Recipes: the schema with every default, and the strict loader. Standard library and yaml only."""

from alphaflow_cli.recipe.loader import diff_recipes, dump_recipe, load_recipe, recipe_from_text, shipped
from alphaflow_cli.recipe.schema import Recipe

__all__ = ["Recipe", "diff_recipes", "dump_recipe", "load_recipe", "recipe_from_text", "shipped"]
