"""DiffusionNFT in one process: what samples, what is trained, what a checkpoint holds."""

import pytest
import torch

from dina_rl.alignment.engine import TorchEngine
from dina_rl.alignment.inline import InlineExperience, InlineLearner
from dina_rl.alignment.learner import PolicyLearner
from dina_rl.alignment.loop import align
from dina_rl.alignment.prompts import load_prompts
from dina_rl.alignment.record import Recorder
from dina_rl.backbones.guidance import guided_velocity
from dina_rl.checkpoint import load_tensors
from dina_rl.flow.sampler import denoise
from dina_rl.runtime import open_pipeline
from dina_rl.seeding import normal
from dina_rl.types import TrainingGroup, WorkItem
from jobs.align import exporter
from tests.rollouts import Rollouts
from tests.tiny_run import tiny_run

NFT = {"algorithm": "nft", "nft": {"levels": 3, "old_rate": 0.1, "old_most": 0.5}}
WORTH = torch.tensor([0.9, 0.2, 0.4])
ITEMS = [WorkItem(iteration=0, prompt_id=i, prompt=f"a small red circle {i}", group_size=3) for i in range(4)]


@pytest.fixture
def make(tmp_path, tiny_pipeline, tiny_reward):
    return lambda name="run", **changes: tiny_run(tmp_path / name, tiny_pipeline, tiny_reward, **{**NFT, **changes})


def perform(run):
    recorder = Recorder(run, run.run_dir, exporter(run))
    align(run, load_prompts(run.prompts), InlineExperience(run), InlineLearner(run), recorder)
    return recorder


def new_learner(run):
    return PolicyLearner(run, lambda module: TorchEngine(module, run.learner))


def groups_of(run, learner):
    worker = Rollouts(run)
    worker.load_weights(learner.policy())
    return [TrainingGroup(rollout=rollout, advantages=WORTH) for rollout in worker.rollout(ITEMS)]


def test_a_resumed_run_equals_the_uninterrupted_one(make):
    short = {"iterations": 2, "golden": {"every": 1, "guidances": [2.0]}}
    whole = make("whole", **short)
    expected = perform(whole)
    run = make("resumed", **short)
    perform(run.model_copy(update={"iterations": 1}))
    assert perform(run).history.entries == expected.history.entries
    ours, theirs = (
        load_tensors(each.run_dir / "checkpoints" / "iteration_000002" / "state.safetensors") for each in (run, whole)
    )
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    copied = [name for name in theirs if name.startswith("objective/")]
    assert len(copied) == len(expected.checkpoints.best_weights().tensors)


def test_a_copy_that_follows_samples_and_the_policys_own_average_is_evaluated(make):
    learner = new_learner(make(learner={"ema_decay": 0.0}))
    copy = learner.policy().tensors
    for updates, kept in ((2, 0.2), (4, 0.4), (6, 0.5)):
        learner.update(0, groups_of(learner.run, learner))
        trained = learner.average().tensors
        copy = {name: kept * tensor + (1 - kept) * trained[name] for name, tensor in copy.items()}
        published = learner.policy()
        assert published.version == updates
        for name, tensor in copy.items():
            torch.testing.assert_close(published.tensors[name], tensor)
    assert max((copy[name] - trained[name]).abs().max() for name in copy) > 1e-4


def test_before_the_first_update_the_policy_is_its_copy(make):
    learner = new_learner(make(learner={"updates_per_iteration": 1}))
    first = learner.update(0, groups_of(learner.run, learner))
    second = learner.update(0, groups_of(learner.run, learner))
    assert first["first_distance_from_old"] == first["kl"] == 0
    assert second["first_distance_from_old"] > 0
    assert second["kl"] > 0


def test_the_update_has_the_same_loss_and_weights_in_other_forwards(make):
    outcomes = []
    for size in (3, 4):  # the second leaves padding
        # Set on the learner alone: a run whose minibatches do not split evenly is refused.
        run = make(learner={"learning_rate": 1e-4})
        run = run.model_copy(update={"learner": run.learner.model_copy(update={"micro_batch_size": size})})
        learner = new_learner(run)
        metrics = [learner.update(0, groups_of(run, learner)) for _ in range(2)]
        outcomes.append((metrics[-1], learner.state()))
    (expected, weights), (metrics, state) = outcomes
    assert metrics == pytest.approx(expected, rel=1e-4)
    for name, tensor in weights.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-4)


def test_a_rollout_is_the_end_of_the_ode(make):
    run = make()
    first, second = Rollouts(run).rollout(ITEMS[:2])
    backbone = open_pipeline(run.pipeline)
    noise = torch.stack([normal((1, *second.latents.shape[1:]), run.seed, "rollout", 0, 1, i)[0] for i in range(3)])
    prompt, negative = second.prompt.repeat(3), backbone.load_text_encoder()([""])
    velocity = guided_velocity(backbone, backbone.load_transformer(), prompt, negative, run.rollout.guidance_scale)
    expected = denoise(noise, second.sigmas, velocity).latents
    torch.testing.assert_close(second.latents, expected, atol=1e-5, rtol=1e-5)
    assert second.latents.untyped_storage().nbytes() == second.latents.nbytes, "its own, not its batch's"
    assert torch.equal(first.sigmas, second.sigmas)
