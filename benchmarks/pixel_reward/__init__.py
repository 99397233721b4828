"""A reward on pixels for the miniature world, beside DiNa-LRM on latents (docs/results/pixel_reward.md)."""
