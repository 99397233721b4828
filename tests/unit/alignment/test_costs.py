"""Counted operations are those of a real forward, and attention's."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dina_rl.alignment.costs import count_costs, operations
from dina_rl.alignment.footprint import bytes_of, learner_footprint
from dina_rl.alignment.layout import layout_of
from dina_rl.alignment.occupancy import PROCESS, ActorFootprint, actor_footprints, gpu_memory
from dina_rl.alignment.skeletons import open_skeletons
from dina_rl.backbones.trained import make_trainable
from dina_rl.config import AlignRun, WorkersConfig
from dina_rl.types import PromptEmbeds


def run_of(pipeline, reward, **values) -> AlignRun:
    dina = {"path": str(reward)}
    return AlignRun.model_validate({"pipeline": {"path": str(pipeline)}, "rewards": {"dina": dina}, **values})


def test_attention_is_counted():
    query = torch.empty(2, 3, 5, 8, device="meta")
    with operations() as counter:
        functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 4 * 2 * 3 * 5 * 5 * 8


def test_a_forward_is_counted_like_a_real_one_with_its_attention(tiny_pipeline, tiny_reward):
    run = run_of(tiny_pipeline, tiny_reward)
    with open_skeletons(run) as (local, models):
        costs = count_costs(local, models)
        backbone = models.backbone
        module = backbone.load_transformer()
    make_trainable(module, run.learner.lora, targets=backbone.lora_targets, seed=0)
    tokens, width, pooled = backbone.prompt_shape
    prompt = PromptEmbeds(embeds=torch.randn(1, tokens, width), pooled=torch.randn(1, pooled))
    shape = backbone.latent_shape(32, 32)
    with FlopCounterMode(display=False) as real, torch.no_grad():
        backbone.velocity(module, torch.randn(1, *shape), torch.rand(1), prompt)
    visual = shape[1] * shape[2] // 4
    joint, alone = module.config.num_layers, len(module.config.dual_attention_layers)
    attention = 4 * backbone.width * (joint * (visual + tokens) ** 2 + alone * visual**2)
    counted = real.get_total_flops()  # on the CPU: without attention, but in torch versions that have learnt it
    assert costs.forward in (counted, counted + attention)
    assert 1.8 < costs.trained / costs.forward < 2.5  # a frozen weight has no gradient of its own
    assert 0 < costs.score < costs.forward
    assert costs.score_gradient == 0


def test_gradients_of_the_reward_and_checkpointing_cost_more(tiny_pipeline, tiny_reward):
    refl = {"algorithm": "refl", "refl": {"stop_range": [1, 3]}, "learner": {"gradient_checkpointing": True}}
    run = run_of(tiny_pipeline, tiny_reward, **refl)
    with open_skeletons(run) as (local, models):
        costs = count_costs(local, models)
    assert 1.5 * costs.score < costs.score_gradient < 3 * costs.score
    assert costs.trained > 2.8 * costs.forward


@pytest.mark.parametrize("pipeline", ["tiny_flux", "tiny_z_image"])
def test_every_family_is_counted(pipeline, tiny_reward, request):
    run = run_of(request.getfixturevalue(pipeline), "/nowhere/reward")
    run = run.model_copy(
        update={"pipeline": run.pipeline.model_copy(update={"height": 32, "width": 32, "max_sequence_length": 8})}
    )
    with open_skeletons(run) as (local, models):
        costs = count_costs(local, models)
        assert models.reward.assumed
    assert min(costs.forward, costs.trained, costs.score, costs.golden) > 0


def test_pixel_rewards_decode(tiny_pipeline):
    values = {"pipeline": {"path": str(tiny_pipeline)}, "rewards": {"dina": None, "pickscore": {}}}
    run = AlignRun.model_validate(values)
    with open_skeletons(run) as (local, models):
        costs = count_costs(local, models)
        scorer = actor_footprints(local, models, learner_footprint(local, models.backbone))["scorer"]
    assert scorer.held == 4 * 986_109_441 + 8 * (77 + 257) + bytes_of(models.vae)  # and the numbers of positions
    assert costs.score - costs.golden == pytest.approx(334.6e9, rel=0.01)  # PickScore's image tower


def test_memory_by_phase():
    rollout, scorer = ActorFootprint(held=100, working=7), ActorFootprint(held=20, working=5)
    learner, text = ActorFootprint(held=50, working=30), ActorFootprint(held=1000, working=1)
    actors = {"text": text, "rollout": rollout, "scorer": scorer, "learner": learner}

    def phases(workers: WorkersConfig, *, sleep: bool = False) -> list[dict]:
        return [dict(gpu.phases) for gpu in gpu_memory(layout_of(workers), actors, sleep=sleep)]

    base, more = 3 * PROCESS, 4 * PROCESS
    together = {"rollout": base + 177, "scorer": base + 175, "learner": base + 200}
    first = {"text": more + 1171, "rollout": more + 1177, "scorer": more + 1175, "learner": more + 1200}
    assert phases(WorkersConfig(gpus=2)) == [first, together]
    asleep = {"text": more + 1001, "rollout": more + 107, "scorer": more + 25, "learner": more + 80}
    assert phases(WorkersConfig(gpus=1, sleep=True), sleep=True) == [asleep]
    shared = WorkersConfig(
        rollout_workers=1, learner_ranks=1, gpus_per_rank=1, gpus_per_rollout=0.5, gpus_per_scorer=0.5
    )
    all_three = dict.fromkeys(("text", "rollout", "scorer"), 3 * PROCESS + 1133)  # they overlap
    assert phases(shared) == [{"learner": PROCESS + 80}, all_three]
