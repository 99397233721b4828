"""Readers of preference sets and the latent store that training reads."""
