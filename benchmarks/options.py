"""What the benchmarks' options have in common."""


def one_or_several(value: object) -> object:
    """A single word of an option that takes several."""
    return [value] if isinstance(value, str) else value
