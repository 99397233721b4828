"""What decides a scorer's numbers, as plain values to make cache keys of."""

import json
from hashlib import blake2b
from pathlib import Path

from dina_rl.config import PictureScorerConfig, PipelineConfig
from dina_rl.reward.checkpoint import read_card
from dina_rl.reward.revision import pipeline_revision
from dina_rl.scoring import dina_pipeline

BLOCK = 2**20  # bytes of a weight file read at once


def digest(value: object) -> str:
    """A short digest of anything JSON can write."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


class Identities:
    """Answers are remembered: a scorer's files are read once."""

    def __init__(self) -> None:
        self._pipelines: dict[PictureScorerConfig, PipelineConfig] = {}
        self._revisions: dict[str, str | None] = {}
        self._weights: dict[str, str] = {}

    def pipeline(self, scorer: PictureScorerConfig) -> PipelineConfig:
        """The pipeline that a dina scorer runs on.

        Raises:
            ValueError: the reward model cannot be read, or nobody says at which size it scores.
        """
        if scorer not in self._pipelines:
            self._pipelines[scorer] = dina_pipeline(scorer, read_card(scorer.reward.location))
        return self._pipelines[scorer]

    def of_pipeline(self, scorer: PictureScorerConfig) -> dict[str, object]:
        """A dina scorer's pipeline and which weights it has; raises like `pipeline`."""
        pipeline = self.pipeline(scorer)
        if pipeline.location not in self._revisions:
            self._revisions[pipeline.location] = pipeline_revision(pipeline.location)
        return {**pipeline.model_dump(mode="json"), "revision": self._revisions[pipeline.location]}

    def of_scorer(self, scorer: PictureScorerConfig) -> dict[str, object]:
        """Which weights score, and on what; raises like `pipeline`."""
        reward = scorer.reward
        if reward.path not in self._weights:
            self._weights[reward.path] = _weights_digest(reward.path)
        rest = self.of_pipeline(scorer) if scorer.kind == "dina" else {"processor": reward.processor}
        return {"kind": scorer.kind, "weights": self._weights[reward.path], **rest}


def _weights_digest(path: str) -> str:
    """Digest of all files of a model's directory; of a hub id its name."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return path
    content = blake2b(digest_size=16)
    for file in sorted(file for file in directory.rglob("*") if file.is_file()):
        content.update(f"{file.relative_to(directory)}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                content.update(block)
    return content.hexdigest()
