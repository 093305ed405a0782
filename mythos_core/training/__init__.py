"""How a model is trained: a recipe, its steps, and what is left of them on disk."""
from mythos_core.training.recipes import RECIPES, Recipe, doubling_recipe, get_recipe, recipe_for
from mythos_core.training.run import NotProved, Run
from mythos_core.training.together import train_together
from mythos_core.training.trainer import train, train_all

__all__ = ["RECIPES", "NotProved", "Recipe", "Run", "doubling_recipe", "get_recipe",
           "recipe_for", "train", "train_all", "train_together"]
