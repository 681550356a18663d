"""`train`: from a recipe to a run folder, resumed by the same command."""
