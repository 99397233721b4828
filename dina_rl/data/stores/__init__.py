"""What encoding leaves behind and training reads: latents, prompt embeddings, pairs, and the order of the pairs."""
