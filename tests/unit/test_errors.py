"""Values and messages in error lines: short, on one line, and nothing that a terminal obeys."""

import pytest

from dina_rl.errors import LONGEST, LONGEST_LINE, one_line, shown

ITSELF: list[object] = []
ITSELF.append(ITSELF)


def nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [None, 1, "\xe9\n", b"x", [1, [2, (3,)], {"a": (4, 5)}], {}, (), 1.5, float("nan"), "x" * 500, ["a"] * 100, {1, 2}],
)
def test_a_value_is_what_ascii_says_and_short(value: object) -> None:
    full = ascii(value)
    assert shown(value) == (full if len(full) <= LONGEST else f"{full[: LONGEST - 3]}...")


def test_of_a_value_without_end_no_more_is_read_than_is_shown() -> None:
    laughs: object = "x"
    for _ in range(100):
        laughs = [laughs] * 9
    for value in (ITSELF, nested(100_000), laughs, 10**100_000, {"a": ITSELF}):
        assert len(shown(value)) == LONGEST


def test_a_message_is_a_line_without_codes() -> None:
    assert one_line("a\nb\x1b[2J\u202e \ud800 \u00e9") == "a b\\x1b[2J\\u202e \\ud800 \u00e9"
    assert len(one_line("x" * 10**6)) == LONGEST_LINE
