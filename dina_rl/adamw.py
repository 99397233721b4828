"""What torch's AdamW keeps of a parameter, by torch's names: checkpoints hold it, footprints count it."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Its two moments, each as large as the parameter."""
