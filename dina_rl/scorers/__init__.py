"""Rewards, one file each behind one Protocol: see `base.Scorer` and `registry.open_scorers`."""
