import pytest

from dina_rl.shapes.grammar import (
    Spec,
    all_prompts,
    caption,
    parse_caption,
    prompts,
    spec_tensor,
)


def test_every_caption_round_trips():
    assert len(set(all_prompts())) == 576
    for text in all_prompts():
        assert caption(parse_caption(text)) == text


def test_a_caption_names_its_spec():
    expected = Spec(size="small", colour="red", shape="ring", ground="cyan")
    assert parse_caption("a small red ring on cyan") == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle on blue",
        "a small red circle on red",
        "a small red square on blue",
        "a small pink circle on blue",
        "a tiny red circle on blue",
        "a small red circle in blue",
        "A small red circle on blue",
        "a small  red circle on blue",
        "a small red circle on blue and green",
    ],
)
def test_a_caption_outside_the_grammar_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="outside the shapes grammar") as error:
        parse_caption(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


def test_splits_are_disjoint_and_complete():
    splits = {name: prompts(name) for name in ("train", "dev", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 464, "dev": 48, "test": 64}
    assert sorted(p for split in splits.values() for p in split) == sorted(all_prompts())


def test_the_split_never_changes():
    # The shipped pipeline was trained on these training prompts: another split would leak test prompts into it.
    assert prompts("test")[:2] == ("a small orange cross on cyan", "a large red cross on white")


def test_every_word_occurs_in_every_split():
    for split in ("train", "dev", "test"):
        words = {word for prompt in prompts(split) for word in prompt.split()}
        assert len(words) == 17


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split 'held'"):
        prompts("held")


def test_spec_tensor_indexes_the_attributes():
    rows = spec_tensor(["a small red circle on green", "a large cyan ring on black"])
    assert rows.tolist() == [[0, 1, 0, 0], [8, 7, 3, 1]]
    assert spec_tensor([]).shape == (0, 4)
