"""From a preference set on disk (`sets/`) to the store of latents that training reads (`stores/`)."""
