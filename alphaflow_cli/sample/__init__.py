"""`sample`: from a checkpoint to pictures, streamed, written and laid out."""
