"""Where a reward model scores a generator's latents: inside the backbone that it was fitted on, and in no other.

A transformer of the same widths would take its adapter and head without a word and rank the samples of a prompt
otherwise. What it was fitted on is known by the card's fingerprint. Only the VAE must be the generator's own: the
latents are what the two have in common. A card without a fingerprint, of version 2 or of the published layout, is
believed in what it says of its pipeline, or the user is in what `rewards.dina.pipeline` names.
"""

from dataclasses import dataclass

from dina_rl.backbones.base import Backbone
from dina_rl.config import DiNaScorerConfig, PipelineConfig
from dina_rl.fingerprint import Fingerprint, pipeline_fingerprint
from dina_rl.reward.card import RewardCard
from dina_rl.reward.checkpoint import read_card
from dina_rl.reward.revision import pipeline_revision
from dina_rl.runtime import image_size, open_pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """A reward model's backbone beside a generator."""

    pipeline: PipelineConfig  # the generator's own, if that holds the same weights
    reads_prompts: bool  # by its own text encoders, which are not the generator's
    notes: tuple[str, ...]  # to be told


def find_home(dina: DiNaScorerConfig, generator: PipelineConfig) -> Home:
    """The pipeline inside which a reward model scores what `generator` makes. Loads nothing.

    Raises:
        ValueError: no such reward model, a VAE other than the generator's, or a pipeline that holds other weights than
            those that the reward model was fitted on.
    """
    card, theirs = read_card(dina.location), pipeline_fingerprint(*generator.place)
    _check_vae(dina, card.fingerprint, generator, theirs)
    if dina.pipeline is None and _is_home(card, generator, theirs):
        return Home(pipeline=generator, reads_prompts=False, notes=_unknown(dina, card, generator))
    path = dina.pipeline or card.pipeline
    files: dict[str, str | None] = {"revision": None, "variant": None}
    if dina.pipeline is None:
        files = {"revision": card.pipeline_revision, "variant": card.variant}
    pipeline = generator.model_copy(update={"path": path, "max_sequence_length": card.max_sequence_length, **files})
    ours = pipeline_fingerprint(*pipeline.place)
    check_fingerprint(str(dina.path), card, pipeline, "rewards.dina.pipeline", found=ours)
    _check_vae(dina, ours, generator, theirs)
    if pipeline.place == generator.place or _same(ours, theirs):
        return Home(pipeline=generator, reads_prompts=False, notes=())
    notes = [f"reward model {dina.path} scores inside its own backbone, {path}"]
    reads_prompts = not (
        ours.text is not None
        and ours.text == theirs.text
        and pipeline.max_sequence_length == generator.max_sequence_length
    )
    notes += [f"  and reads prompts by its own text encoders, to {card.max_sequence_length} tokens"] * reads_prompts
    notes += [f"  whose VAE is taken to be that of {generator.path}"] * (None in (ours.vae, theirs.vae))
    return Home(pipeline=pipeline, reads_prompts=reads_prompts, notes=tuple(notes))


def check_home(dina: DiNaScorerConfig, generator: PipelineConfig, backbone: Backbone) -> tuple[str, ...]:
    """Whether a reward model can score what `generator`, opened as `backbone`, makes; returns what is to be told.

    Raises:
        ValueError: as `find_home`, or the reward model does not fit its backbone or the generator's latents.
    """
    home, card = find_home(dina, generator), read_card(dina.location)
    own = backbone
    if home.pipeline != generator:
        try:
            own = open_pipeline(home.pipeline)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{' '.join(str(error).split())} (reward model {dina.path} was fitted on it; name a copy as "
                "rewards.dina.pipeline)"
            ) from error
    if (card.width, card.max_sequence_length) != (own.width, own.max_sequence_length):
        raise ValueError(
            f"reward model {dina.path} was fitted on {card.pipeline} with width {card.width} and "
            f"{card.max_sequence_length} text tokens; {home.pipeline.path} has {own.width} "
            f"and {own.max_sequence_length}; pipeline.max_sequence_length {card.max_sequence_length} is the fit's"
        )
    size = image_size(generator, backbone)
    if own.latent_shape(*size) != backbone.latent_shape(*size):
        raise ValueError(
            f"reward model {dina.path} takes latents of shape {own.latent_shape(*size)}, {generator.path} makes "
            f"{backbone.latent_shape(*size)}"
        )
    return home.notes


def check_fingerprint(
    reward: str, card: RewardCard, pipeline: PipelineConfig, key: str, *, found: Fingerprint | None = None
) -> None:
    """Whether a pipeline holds what a reward model was fitted on, as far as its card knows.

    Args:
        key: of the setting that may name another pipeline.
        found: the pipeline's fingerprint, where it is known already.

    Raises:
        ValueError: it does not.
    """
    found = found or pipeline_fingerprint(*pipeline.place)
    others = [] if card.fingerprint is None else card.fingerprint.other_parts(found)
    if others:
        raise ValueError(
            f"reward model {reward} was fitted on another {' and '.join(others)} than {pipeline.path} holds "
            f"(it was called {card.pipeline} then); name a pipeline that holds what it was fitted on as {key}"
        )


def _is_home(card: RewardCard, generator: PipelineConfig, theirs: Fingerprint) -> bool:
    """Whether the generator's pipeline is the one that the card means."""
    if card.fingerprint is not None:
        called_alike = card.pipeline == generator.path and not card.fingerprint.other_parts(theirs)
        return called_alike or _same(card.fingerprint, theirs)
    revision = pipeline_revision(generator.location, generator.revision)
    if None not in (card.revision, revision):
        return card.revision == revision
    return card.pipeline == generator.path


def _same(ours: Fingerprint, theirs: Fingerprint) -> bool:
    return ours == theirs and None not in (ours.transformer, ours.vae, ours.text)


def _unknown(dina: DiNaScorerConfig, card: RewardCard, generator: PipelineConfig) -> tuple[str, ...]:
    if card.fingerprint is not None:
        return ()
    return (f"reward model {dina.path} has no fingerprint; it is taken to be fitted on what {generator.path} holds",)


def _check_vae(
    dina: DiNaScorerConfig, ours: Fingerprint | None, generator: PipelineConfig, theirs: Fingerprint
) -> None:
    if ours is not None and None not in (ours.vae, theirs.vae) and ours.vae != theirs.vae:
        raise ValueError(
            f"reward model {dina.path} scores latents of another VAE than that of {generator.path}: fit one on latents "
            "of this generator"
        )
