"""Prompts and images that two preference sets share: what a model was trained on is no test of it.

Prompts are compared after Unicode's compatibility normalisation, without regard to case and white space; images by the
bytes of their files, so that a copy is found and a re-encoded one is not.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from dina_rl.data.sets.records import PreferenceRecord, PreferenceSet

EXAMPLES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprints:
    """What a split holds, as digests of 16 bytes."""

    prompts: frozenset[bytes]
    images: frozenset[bytes]
    unreadable: int  # distinct image files that could not be read and are compared with nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """What of a tested split is in the training split too. Counts are of the tested split."""

    prompts: int  # distinct
    shared_prompts: int
    images: int  # distinct files
    shared_images: int
    records: int
    records_with_shared_prompt: int
    records_with_shared_image: int
    unreadable_images: int
    unreadable_training_images: int
    examples: tuple[str, ...]  # the first few shared prompts


def prompt_digest(prompt: str) -> bytes:
    """Digest of a prompt, equal for prompts that differ in case, white space or Unicode form alone."""
    plain = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return blake2b(plain.encode(), digest_size=16).digest()


def image_digest(content: bytes) -> bytes:
    """Digest of an encoded image."""
    return blake2b(content, digest_size=16).digest()


def fingerprints(source: PreferenceSet, records: Iterable[PreferenceRecord]) -> Fingerprints:
    """Digests of all prompts and image files of `records`; every file is read once."""
    prompts: set[bytes] = set()
    digests = _ImageDigests(source)
    for record in records:
        prompts.add(prompt_digest(record.prompt))
        for key in record.images:
            digests.of(key)
    return Fingerprints(prompts=frozenset(prompts), images=digests.distinct(), unreadable=digests.unreadable)


def find_leak(source: PreferenceSet, records: Iterable[PreferenceRecord], training: Fingerprints) -> Leak:
    """What `records` share with the training split."""
    prompts: dict[bytes, str] = {}
    digests = _ImageDigests(source)
    total, with_prompt, with_image = 0, 0, 0
    for record in records:
        digest = prompt_digest(record.prompt)
        prompts.setdefault(digest, record.prompt)
        total += 1
        with_prompt += digest in training.prompts
        with_image += any([digests.of(key) in training.images for key in record.images])  # a list: hash all of them
    images = digests.distinct()
    shared = [digest for digest in prompts if digest in training.prompts]
    return Leak(
        prompts=len(prompts),
        shared_prompts=len(shared),
        images=len(images),
        shared_images=len(images & training.images),
        records=total,
        records_with_shared_prompt=with_prompt,
        records_with_shared_image=with_image,
        unreadable_images=digests.unreadable,
        unreadable_training_images=training.unreadable,
        examples=tuple(prompts[digest] for digest in shared[:EXAMPLES]),
    )


class _ImageDigests:
    """Digest of every image of a set that is asked for; a file is read once."""

    def __init__(self, source: PreferenceSet) -> None:
        self._source = source
        self._known: dict[str, bytes | None] = {}

    def of(self, key: str) -> bytes | None:
        """The image's digest; None if it cannot be read."""
        if key not in self._known:
            try:
                self._known[key] = image_digest(self._source.image(key))
            except ValueError:
                self._known[key] = None
        return self._known[key]

    def distinct(self) -> frozenset[bytes]:
        return frozenset(digest for digest in self._known.values() if digest is not None)

    @property
    def unreadable(self) -> int:
        return sum(digest is None for digest in self._known.values())
