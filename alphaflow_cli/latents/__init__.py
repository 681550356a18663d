"""`prep-latents`: pictures to a latent store."""
