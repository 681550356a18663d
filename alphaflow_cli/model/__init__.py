"""A checkpoint and its network: built from a recipe, saved, opened and found."""
