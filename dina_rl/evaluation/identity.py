"""What decides a scorer's numbers, as plain values to make cache keys of.

A hub id is known by the commit of its cached snapshot, a local directory by its files: those of reward and CLIP models
in full. A pipeline may be tens of gigabytes: of its files above 64 MiB the size and the first, middle and last MiB
stand for all. Any training changes those; an edit by hand of a few tensors elsewhere in such a file may go unnoticed.
"""

import json
from hashlib import blake2b
from pathlib import Path

from dina_rl.config import PictureScorerConfig, PipelineConfig
from dina_rl.reward.checkpoint import read_card
from dina_rl.reward.revision import cached_commit
from dina_rl.scoring import dina_pipeline

BLOCK = 2**20  # bytes of a file read at once
WHOLE_BYTES = 64 * BLOCK  # a pipeline's files up to this size are read in full


def digest(value: object) -> str:
    """A short digest of anything JSON can write."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


class Identities:
    """Answers are remembered: a model's files are read once."""

    def __init__(self) -> None:
        self._pipelines: dict[PictureScorerConfig, PipelineConfig] = {}
        self._contents: dict[str, str] = {}

    def pipeline(self, scorer: PictureScorerConfig) -> PipelineConfig:
        """The pipeline that a dina scorer runs on.

        Raises:
            ValueError: the reward model cannot be read, or nobody says at which size it scores.
        """
        if scorer not in self._pipelines:
            self._pipelines[scorer] = dina_pipeline(scorer, read_card(scorer.dina.location))
        return self._pipelines[scorer]

    def of_pipeline(self, scorer: PictureScorerConfig) -> dict[str, object]:
        """A dina scorer's pipeline and what its transformer, VAE and text encoders hold; raises like `pipeline`."""
        pipeline = self.pipeline(scorer)
        content = self._content(pipeline.location, "model_index.json", whole=WHOLE_BYTES, revision=pipeline.revision)
        return {**pipeline.model_dump(mode="json"), "content": content}

    def of_scorer(self, scorer: PictureScorerConfig) -> dict[str, object]:
        """Which weights score, and on what; raises like `pipeline`."""
        if scorer.kind == "dina":
            weights = self._content(scorer.dina.path, "config.json")
            return {"kind": scorer.kind, "weights": weights, **self.of_pipeline(scorer)}
        weights = self._content(scorer.clip.path, "config.json")
        processor = self._content(scorer.clip.processor, "preprocessor_config.json")
        return {"kind": scorer.kind, "weights": weights, "processor": processor}

    def _content(self, path: str, known_file: str, *, whole: int | None = None, revision: str | None = None) -> str:
        """What a directory or hub id holds; `known_file` is a file that every such repository has."""
        key = path if revision is None else f"{path}@{revision}"
        if key not in self._contents:
            directory = Path(path).expanduser()
            if directory.is_dir():
                self._contents[key] = files_digest(directory, whole=whole)
            else:  # nothing of it is cached where it was never opened: its name is all there is
                self._contents[key] = f"{path}@{cached_commit(path, known_file, revision)}"
        return self._contents[key]


def files_digest(directory: Path, *, whole: int | None = None) -> str:
    """Digest of the names and contents of all files of a directory but hidden ones.

    Args:
        whole: bytes above which a file's size and first, middle and last MiB stand for it; None: all are read in full.
    """
    content = blake2b(digest_size=16)
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory)
        if any(part.startswith(".") for part in name.parts) or not file.is_file():
            continue
        size = file.stat().st_size
        content.update(f"{name}\n{size}\n".encode())
        with file.open("rb") as stream:
            if whole is None or size <= whole:
                while block := stream.read(BLOCK):
                    content.update(block)
            else:
                for start in (0, (size - BLOCK) // 2, size - BLOCK):
                    stream.seek(start)
                    content.update(stream.read(BLOCK))
    return content.hexdigest()
