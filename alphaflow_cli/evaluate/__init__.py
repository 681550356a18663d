"""`eval` and `reference`: pictures in, numbers with their protocol out."""
