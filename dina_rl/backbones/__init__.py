"""Diffusion families behind one Protocol: see `base.Backbone` and `registry.open_backbone`."""
