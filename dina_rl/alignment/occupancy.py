"""How much memory every GPU of a layout needs, phase by phase, with everything that lives there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.footprint import LearnerFootprint, bytes_of
from dina_rl.alignment.layout import KINDS, Kind, Layout, Seat
from dina_rl.alignment.skeletons import Skeletons
from dina_rl.config import AlignRun
from dina_rl.runtime import image_size

PROCESS = (
    600 * 2**20
)  # what a process takes for its CUDA context and libraries before it holds a tensor; it never sleeps
DECODER_MAPS = 3  # feature maps at full resolution that the VAE's last block holds at once


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorFootprint:
    """Bytes of one actor."""

    held: int  # models and what trains them
    working: int  # on top of that while it works

    @property
    def total(self) -> int:
        return self.held + self.working


@dataclass(frozen=True, slots=True, kw_only=True)
class GPUMemory:
    """Bytes on one GPU."""

    kinds: tuple[Kind, ...]  # who sits there
    phases: Mapping[Kind, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values(), default=0)


def actor_footprints(run: AlignRun, models: Skeletons, learner: LearnerFootprint) -> dict[Kind, ActorFootprint]:
    """Of each kind of actor. Without a gradient a forward is taken to hold what one block of it would keep."""
    scoring = _scorer(run, models, learner, with_gradient=open_algorithm(run).wants_reward_gradients)
    rank = ActorFootprint(held=learner.weights + learner.optimizer, working=learner.activations)
    if run.algorithm == "refl" and run.refl.reward_gradient == "learner":
        beside = _scorer(run, models, learner, with_gradient=True, samples=run.learner.micro_batch_size)
        rank = ActorFootprint(held=rank.held + beside.held, working=rank.working + beside.working)
    text, rollout = _text(models), _rollout(run, models, learner)
    if run.workers.text_workers == 0:
        rollout = replace(rollout, held=rollout.held + text.held)
        return {"rollout": rollout, "scorer": scoring, "learner": rank}
    return {"text": text, "rollout": rollout, "scorer": scoring, "learner": rank}


def gpu_memory(layout: Layout, actors: Mapping[Kind, ActorFootprint], *, sleep: bool) -> list[GPUMemory]:
    """Of each GPU of the layout; with `sleep` only those at work hold anything."""
    return [_gpu(layout, actors, seats, sleep=sleep) for seats in layout.gpus()]


def _gpu(layout: Layout, actors: Mapping[Kind, ActorFootprint], seats: Sequence[Seat], *, sleep: bool) -> GPUMemory:
    kinds = tuple(seat.kind for seat in seats)

    def at(phase: Kind) -> int:
        # Encoding, sampling and scoring overlap where nobody takes turns.
        at_work = {phase} if layout.in_turns or phase == "learner" else {"text", "rollout", "scorer"}
        held = sum(actors[kind].held for kind in kinds if not sleep or kind in at_work)
        return held + len(kinds) * PROCESS + sum(actors[kind].working for kind in kinds if kind in at_work)

    return GPUMemory(kinds=kinds, phases={kind: at(kind) for kind in KINDS if kind in kinds})


def _text(models: Skeletons) -> ActorFootprint:
    """A few prompts at a time need next to nothing beside the encoders."""
    return ActorFootprint(held=sum(map(bytes_of, models.text_encoders.values())), working=0)


def _rollout(run: AlignRun, models: Skeletons, learner: LearnerFootprint) -> ActorFootprint:
    held = [models.sampler, models.vae]
    held += [each.model for each in (models.golden, models.probes) if each is not None]
    sampled = run.rollout.groups_per_call * run.rollout.group_size
    measured = run.golden.batch_size
    working = max(learner.block * max(sampled, measured), _decoded(run, models, measured))
    return ActorFootprint(held=sum(map(bytes_of, held)), working=working)


def _scorer(
    run: AlignRun, models: Skeletons, learner: LearnerFootprint, *, with_gradient: bool, samples: int | None = None
) -> ActorFootprint:
    """The rewards, on a call's samples, or on `samples`."""
    batch = samples or max(run.rollout.groups_per_call * run.rollout.group_size, run.golden.batch_size)
    held: list[nn.Module] = [each.model for each in models.pixel_rewards]
    working = 0
    if models.reward is not None and run.rewards.dina is not None:
        held += [models.reward.truncated, models.reward.head]
        blocks = models.reward.taps[-1] if with_gradient else 1
        working = blocks * learner.block * batch * len(run.rewards.dina.levels)
    if run.rewards.grid is not None:
        held.append(models.vae)  # its own; the crops that it decodes are small beside a picture
    if models.pixel_rewards:
        held.append(models.vae)
        # A backward keeps about as much of each of the decoder's four resolutions.
        working = max(working, _decoded(run, models, batch) * (4 if with_gradient else 1))
    return ActorFootprint(held=sum(map(bytes_of, held)), working=working)


def _decoded(run: AlignRun, models: Skeletons, samples: int) -> int:
    """Feature maps of the pictures that it decodes at once in the VAE's widest layers, at full resolution."""
    width: int = models.vae.config["block_out_channels"][1]
    height, breadth = image_size(run.pipeline, models.backbone)
    pixels = height * breadth
    return min(samples, run.pipeline.decode_batch) * DECODER_MAPS * width * pixels * models.backbone.dtype.itemsize
