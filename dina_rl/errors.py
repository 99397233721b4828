"""The error that ends a run with one line."""


class RunStopped(RuntimeError):
    """A run cannot go on, for a reason that its message says in full; a traceback would add nothing."""
