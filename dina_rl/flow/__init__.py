"""The mathematics of sampling: one SDE step for sampling and replay, and the denoising loop around it."""
