"""Readers of preference sets in the layouts they are published in: records stream, malformed ones with a reason."""
