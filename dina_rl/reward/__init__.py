"""DiNa-LRM: the diffusion-native latent reward model, its likelihood, its training loop and its checkpoint."""
