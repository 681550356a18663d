"""`alphaflow ema`: averages of other half-lives, after training, from what a run kept."""
