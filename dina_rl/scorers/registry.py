"""The configured scorers. One more of images is a file beside `clip.py`, a section of `RewardsConfig`, a line here."""

from dina_rl.backbones.base import Backbone
from dina_rl.checkpoint import Input
from dina_rl.config import ImageScorerConfig, ImageScorerName, PipelineConfig, RewardsConfig
from dina_rl.fingerprint import local_directory, repository_parts
from dina_rl.loading import on_disk
from dina_rl.scorers.aesthetic import AESTHETIC
from dina_rl.scorers.base import EmptyImageScorer, ImageKind, ImageScorer, Judge, Scorer
from dina_rl.scorers.clip import CLIP_SCORE, PICKSCORE
from dina_rl.scorers.dina import open_dina_beside
from dina_rl.scorers.grid import open_grid
from dina_rl.scorers.hpsv2 import HPSV2, HPSV2_1
from dina_rl.scorers.hpsv3 import HPSV3
from dina_rl.scorers.imagereward import IMAGEREWARD
from dina_rl.scorers.lrm import LRM_SD15, LRM_SDXL
from dina_rl.scorers.mps import MPS
from dina_rl.scorers.unified_reward import UNIFIED_REWARD
from dina_rl.scorers.unified_reward_think import UNIFIED_REWARD_THINK

CONFIG = "config.json"  # of transformers' models, whose weights lie beside it in files of several names

IMAGE_KINDS: dict[ImageScorerName, ImageKind] = {
    "pickscore": PICKSCORE,
    "clip_score": CLIP_SCORE,
    "hpsv2": HPSV2,
    "hpsv2_1": HPSV2_1,
    "aesthetic": AESTHETIC,
    "mps": MPS,
    "imagereward": IMAGEREWARD,
    "hpsv3": HPSV3,
    "unified_reward": UNIFIED_REWARD,
    "unified_reward_think": UNIFIED_REWARD_THINK,
    "lrm_sd15": LRM_SD15,
    "lrm_sdxl": LRM_SDXL,
}


def open_scorers(rewards: RewardsConfig, generator: PipelineConfig, backbone: Backbone) -> dict[str, Scorer]:
    """Scorer by name, those that have a weight and are no judges; models load onto the backbone's device.

    Args:
        generator: whose latents are scored.
        backbone: what it opens.

    Raises:
        ValueError: a model that cannot be read or does not fit the generator.
    """
    scorers: dict[str, Scorer] = {}
    if rewards.dina is not None:
        scorers["dina"] = open_dina_beside(rewards.dina, generator, backbone)
    if rewards.grid is not None:
        scorers["grid"] = open_grid(rewards.grid, backbone)
    for config in rewards.of_images:
        if not config.pairwise:
            scorers[config.name] = open_image_scorer(config, device=backbone.device)
    return scorers


def open_judges(rewards: RewardsConfig, *, device: str) -> dict[str, Judge]:
    """Judge by name, those that have a weight; raises like `open_judge`."""
    return {config.name: open_judge(config, device=device) for config in rewards.of_images if config.pairwise}


def open_image_scorer(config: ImageScorerConfig, *, device: str) -> ImageScorer:
    """A scorer of images, which needs no backbone.

    Raises:
        ValueError: a model that cannot be read, or one that compares.
    """
    kind = IMAGE_KINDS[config.name]
    if kind.open is None:
        raise ValueError(
            f"{config.name} compares two pictures and has no score of one: jobs.evaluate asks it about the pairs of a "
            "preference set, and jobs.align as a reward or as golden.scorer"
        )
    return kind.open(config, device)


def open_judge(config: ImageScorerConfig, *, device: str) -> Judge:
    """A judge of pairs of images.

    Raises:
        ValueError: a model that cannot be read.
    """
    kind = IMAGE_KINDS[config.name]
    assert kind.judge is not None, f"{config.name} scores pictures one by one"
    return kind.judge(config, device)


def check_image_scorer(config: ImageScorerConfig) -> None:
    """Raises ValueError where its model cannot be read."""
    IMAGE_KINDS[config.name].check(config)


def empty_image_scorer(config: ImageScorerConfig) -> EmptyImageScorer:
    """The scorer without weights.

    Raises:
        ValueError: a model that is neither known nor can be read.
    """
    return IMAGE_KINDS[config.name].empty(config)


def image_scorer_bytes(config: ImageScorerConfig) -> int | None:
    """Of its weights on disk; 0 where a server has them; None: a hub id that is not here."""
    kind = IMAGE_KINDS[config.name]
    if kind.files is None:
        return 0
    if kind.size is not None:
        return kind.size(config)
    name, _ = kind.files
    directory = None if name == CONFIG else local_directory(config.path, name)
    return on_disk(config.name, config.path if directory is None else directory / name)


def image_scorer_inputs(config: ImageScorerConfig) -> list[Input]:
    """What it is made from, by the keys of its section; nobody here knows what a server has."""
    files = IMAGE_KINDS[config.name].files
    if files is None:
        return []
    of_weights, of_processor = files
    return [
        Input(key="path", path=config.path, parts=repository_parts(config.path, of_weights)),
        Input(key="processor", path=config.processor, parts=repository_parts(config.processor, of_processor)),
    ]
