"""One reader of text files for the whole product."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from dina_rl.textfiles import parse_json, parse_yaml, read_text

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("place", ["dina_rl", "actors", "jobs"])
def test_nobody_reads_text_json_or_yaml_in_another_way(place: str) -> None:
    others = re.compile(r"\.read_text\(|safe_load\(|\.open\(encoding|\.open\(\)|json\.loads?\(")
    found = {file.name for file in (ROOT / place).rglob("*.py") if others.search(file.read_text())}
    assert found <= {"textfiles.py"}


def test_text_is_utf_8_whatever_the_ends_of_line_and_the_editors_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfgr\xc3\xbcn\r\nrot\rblau\n")
    assert read_text(file) == "gr\u00fcn\nrot\nblau\n"
    file.write_bytes("a".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text \(it looks like UTF-16\); save it as UTF-8$"):
        read_text(file)


def test_a_key_stands_once_however_deep_and_however_it_is_written() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, b: 2}\nd: [{b: 1}, {b: 2}]") == {
        "a": {"b": 1},
        "c": {"b": 2},
        "d": [{"b": 1}, {"b": 2}],
    }
    for text in ("a: 1\nb: 2\n'a': 3", "x: {a: 1,\n  b: 2, a: 1}", "- {a: 1}\n- {a: 1, \na: 1}"):
        with pytest.raises(yaml.YAMLError, match=r"^the key a is written twice, in lines \d and \d$"):
            parse_yaml(text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "", "[1,", "\0"])
def test_json_that_is_none_is_one_kind_of_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 3000, "nests too deeply"),
        ("- " * 3000 + "x", "nests too deeply"),
        ("seed: 2024-99-99", "ValueError"),
        ("seed: !!int abc", "ValueError"),
        ("seed: !!bool x", "KeyError"),
        ("seed: !!timestamp x", "AttributeError"),
        ("seed: " + "9" * 5000, "ValueError"),
        ("a: &a [*a]", "recursive"),
        ("--- &a\npipeline: *a", "recursive"),
        ("seed: !!python/name:os.system", "could not determine a constructor"),
        (
            "a: &a {x: 1}\n"
            + "".join(f"{n}: &{n} {{p: *{p}, q: *{p}}}\n" for p, n in pairwise("abcdefghijklmnopqrst")),
            "unfold",
        ),
    ],
)
def test_yaml_that_is_none_or_has_no_end_is_one_kind_of_error(text: str, why: str) -> None:
    with pytest.raises(yaml.YAMLError, match=why):
        parse_yaml(text)
