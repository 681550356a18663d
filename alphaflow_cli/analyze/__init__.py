"""`analyze`: the conflict between the objective's two halves, measured on a checkpoint and drawn."""
