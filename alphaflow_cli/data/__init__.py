"""Pictures, the latent store, and the stream that training reads."""
