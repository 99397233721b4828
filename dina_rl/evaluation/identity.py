"""What decides a scorer's numbers, as plain values to make cache keys of.

A hub id is known by the commit of its cached snapshot, a local directory or file by what it holds (`fingerprint.py`).
"""

import json
from hashlib import blake2b
from pathlib import Path

from dina_rl.config import PictureScorerConfig, PipelineConfig
from dina_rl.fingerprint import cached_commit, file_digest, files_digest
from dina_rl.reward.checkpoint import read_card
from dina_rl.scorers.registry import IMAGE_KINDS
from dina_rl.scoring import dina_pipeline


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
        content = self._content(pipeline.location, "model_index.json", pipeline.revision)
        return {**pipeline.model_dump(mode="json"), "content": content}

    def of_scorer(self, scorer: PictureScorerConfig) -> dict[str, object]:
        """Which weights score, and on what; raises like `pipeline`."""
        if scorer.of_images is None:
            weights = self._content(scorer.dina.path, "config.json")
            return {"kind": scorer.kind, "weights": weights, **self.of_pipeline(scorer)}
        of_weights, of_processor = IMAGE_KINDS[scorer.of_images.name].files
        weights = self._content(scorer.of_images.path, of_weights)
        processor = self._content(scorer.of_images.processor, of_processor)
        return {"kind": scorer.kind, "weights": weights, "processor": processor}

    def _content(self, path: str, known_file: str, revision: str | None = None) -> str:
        """What a directory, file or hub id holds; `known_file` is a file that every such repository has."""
        key = path if revision is None else f"{path}@{revision}"
        if key not in self._contents:
            place = Path(path).expanduser()
            if place.is_dir():
                self._contents[key] = files_digest(place)
            elif place.is_file():
                self._contents[key] = file_digest(place)
            else:  # nothing of it is cached where it was never opened: its name is all there is
                self._contents[key] = f"{path}@{cached_commit(path, known_file, revision)}"
        return self._contents[key]
