"""Which prompts an iteration trains on, and which samples an evaluation draws."""

import pytest
import torch

from dina_rl.alignment.algorithms.grpo import Trajectory, micro_batches
from dina_rl.alignment.loop import plan
from dina_rl.alignment.measurement import evaluation_items
from dina_rl.config import AlignRun, RolloutConfig
from dina_rl.types import PromptEmbeds, TrainingGroup, WorkItem

PROMPTS = [f"prompt {i}" for i in range(10)]


def run_with(prompts_per_iteration: int) -> AlignRun:
    return AlignRun(rollout=RolloutConfig(prompts_per_iteration=prompts_per_iteration, group_size=36))


def test_an_epoch_deals_every_prompt_once_and_then_reshuffles():
    run = run_with(5)
    dealt = [[item.prompt_id for item in plan(run, PROMPTS, step)] for step in range(4)]
    assert sorted(dealt[0] + dealt[1]) == list(range(10))
    assert sorted(dealt[2] + dealt[3]) == list(range(10))
    assert dealt[:2] != dealt[2:]
    assert dealt[3] == [item.prompt_id for item in plan(run, PROMPTS, 3)], "a plan depends on its step alone"


def test_more_prompts_per_iteration_than_prompts_is_refused():
    with pytest.raises(ValueError, match="only 10 training prompts"):
        plan(run_with(11), PROMPTS, 0)


def test_evaluation_takes_prompts_in_turn_and_numbers_repeats():
    items = evaluation_items("dev", ["a", "b", "c"], samples=5, guidance_scale=2.0, batch_size=4)
    assert [item.prompt_ids for item in items] == [(0, 1, 2, 0), (1,)]
    assert [item.sample_ids for item in items] == [(0, 0, 0, 1), (1,)]


def group(prompt_id: int, size: int) -> TrainingGroup:
    values = torch.arange(size) + 100.0 * prompt_id
    return TrainingGroup(
        rollout=Trajectory(
            item=WorkItem(iteration=0, prompt_id=prompt_id, prompt="p", group_size=size),
            policy_version=0,
            sigmas=torch.tensor([1.0, 0.5, 0.0]),
            window_start=0,
            dynamics="flow_sde",
            noise_level=0.7,
            states=values.view(1, size, 1, 1, 1).repeat(2, 1, 1, 1, 1),
            log_probs=values.view(1, size),
            latents=values.view(size, 1, 1, 1),
            latents_sigma=0.0,
            prompt=PromptEmbeds(embeds=torch.full((1, 2, 3), float(prompt_id)), pooled=torch.zeros(1, 3)),
            guidance_scale=1.0,
            negative=None,
        ),
        advantages=values,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_batches_cover_every_sample_once_in_equal_shapes(world_size):
    groups = [group(0, 5), group(1, 6)]
    ranks = [micro_batches(groups, torch.arange(11), 4, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "ranks must make equally many forwards"
    seen = []
    for batch in (b for batches in ranks for b in batches):
        assert len(batch.weights) == 4
        assert torch.equal(batch.states[0].flatten(), batch.advantages)
        assert torch.equal(batch.old_log_probs[0], batch.advantages)
        assert torch.equal(batch.prompt.embeds[:, 0, 0], (batch.advantages >= 100).float())
        seen += batch.advantages[batch.weights > 0].tolist()
    assert sorted(seen) == sorted(torch.cat([g.advantages for g in groups]).tolist())


@pytest.mark.parametrize("world_size", [1, 2])
def test_chosen_samples_are_dealt_alone(world_size):
    chosen = torch.tensor([0, 3, 4, 7, 10])
    ranks = [micro_batches([group(0, 5), group(1, 6)], chosen, 2, rank, world_size) for rank in range(world_size)]
    assert [len(batches) for batches in ranks] == ([3] if world_size == 1 else [2, 2])
    seen = [value for batches in ranks for b in batches for value in b.advantages[b.weights > 0].tolist()]
    assert sorted(seen) == [0, 3, 4, 102, 105]
