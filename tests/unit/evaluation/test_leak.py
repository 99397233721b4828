from dina_rl.data.sets.records import PreferenceRecord
from dina_rl.evaluation.leak import find_leak, fingerprints, prompt_digest


class Files:
    """A preference set's images, in memory."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self._contents = contents
        self.reads: list[str] = []

    def records(self, split: str):
        raise AssertionError("not asked for here")

    def image(self, key: str) -> bytes:
        self.reads.append(key)
        if key not in self._contents:
            raise ValueError(f"no image {key}")
        return self._contents[key]


def record(index: int, prompt: str, *images: str) -> PreferenceRecord:
    return PreferenceRecord(index=index, prompt=prompt, images=images, ranks=tuple(range(len(images))))


def test_prompts_that_differ_in_case_space_or_unicode_form_are_the_same() -> None:
    same = ["A Caf\u00e9  at\tnight ", "a cafe\u0301 at night", "a caf\u00e9 at night\n", "\uff21 caf\u00e9 at night"]
    assert len({prompt_digest(prompt) for prompt in same}) == 1
    assert prompt_digest("a cafe at night") != prompt_digest(same[0])


def test_shared_prompts_and_images_are_found_and_counted() -> None:
    training = Files({"t1": b"one", "t2": b"two", "t3": b"three"})
    tested = Files({"a": b"one", "b": b"new", "c": b"two", "d": b"other"})
    known = fingerprints(training, [record(0, "A cat", "t1", "t2"), record(1, "a dog", "t1", "t3")])
    leak = find_leak(
        tested, [record(0, "a  CAT", "a", "b"), record(1, "a bird", "c", "a"), record(2, "a fish", "d", "gone")], known
    )
    assert (leak.prompts, leak.shared_prompts, leak.records_with_shared_prompt) == (3, 1, 1)
    assert (leak.images, leak.shared_images, leak.records_with_shared_image) == (4, 2, 2)
    assert (leak.records, leak.unreadable_images, leak.unreadable_training_images) == (3, 1, 0)
    assert leak.examples == ("a  CAT",)
    assert sorted(training.reads) == ["t1", "t2", "t3"]  # each once


def test_two_unreadable_images_are_not_the_same_image() -> None:
    known = fingerprints(Files({}), [record(0, "x", "gone", "lost")])
    leak = find_leak(Files({}), [record(0, "y", "missing", "gone")], known)
    assert (leak.shared_images, known.unreadable, leak.records_with_shared_image) == (0, 2, 0)
