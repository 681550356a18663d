"""The one error a user may cause: a recipe, file, checkpoint or run at fault."""


class AlphaflowError(Exception):
    """Says what is wrong, where, and what to do. The command line prints it as `error: …` and exits 1."""
