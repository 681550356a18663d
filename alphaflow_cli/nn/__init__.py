"""The networks of the generator with their derivatives, and the autoencoders: whatever has weights."""
