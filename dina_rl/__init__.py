"""Align latent flow-matching models with human preference: DiNa-LRM rewards, Flow-GRPO, Ray and DeepSpeed.

This package is the library: pure torch, diffusers, transformers and peft. It never imports ray or deepspeed
(`dina_rl.local` aside), so it works where they are not installed. The Ray shells live in `actors/`, the entry
points in `jobs/`.
"""

__version__ = "0.2.0"
