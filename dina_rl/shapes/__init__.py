"""The miniature world: captions of coloured shapes, a renderer, a golden rule, and a tiny SD3.5.

Everything the system does to `stabilityai/stable-diffusion-3.5-medium` it can do to this world in minutes on
two CPU cores, and here the true quality of an image is known: `golden.golden_score`.
"""
