"""What α-Flow computes, and nothing else: torch in, torch out."""
