"""ReFL's pretraining loss: what is drawn for it, its value, and what it does to the gradient."""

import numpy as np
import pytest
import torch

from dina_rl.alignment.algorithms.pretraining import PretrainingDraws
from dina_rl.alignment.inline import InlineExperience, InlineLearner
from dina_rl.alignment.loop import align, plan
from dina_rl.alignment.prompts import load_prompts
from dina_rl.alignment.record import Recorder
from dina_rl.data.stores.latents import LatentStore, StoredPair, StoreInfo
from dina_rl.flow.process import flow_matching_loss
from dina_rl.runtime import open_pipeline
from dina_rl.seeding import normal
from dina_rl.types import WorkItem
from jobs.align import exporter
from tests.rollouts import Rollouts
from tests.tiny_run import tiny_run

SHAPE = (16, 8, 8)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Six images in three pairs; the first of each is preferred and has a prompt of its own."""
    images = [f"{number}.png" for number in range(6)]
    info = StoreInfo(
        dataset="d", pipeline="p", buckets=((32, 32),), latent_shapes=(SHAPE,), rows=(6,), rows_per_shard=6
    )
    made = LatentStore.create(tmp_path_factory.mktemp("store") / "latents", info, images)
    made.write_shard(0, normal((6, *SHAPE), "store"), {})
    pairs = [
        StoredPair(pair_id=n, chosen=2 * n, rejected=2 * n + 1, prompt=f"a small red circle {n}") for n in range(3)
    ]
    for split in ("train", "test"):
        made.write_pairs(split, pairs)
    return made


@pytest.fixture
def make(tmp_path, tiny_pipeline, tiny_reward, store):
    def build(weight, **changes):
        refl = {"stop_range": [1, 3], "pretraining_weight": weight, "pretraining_latents": str(store.directory)}
        learner = {"updates_per_iteration": 1}
        return tiny_run(
            tmp_path / f"{weight}", tiny_pipeline, tiny_reward, algorithm="refl", refl=refl, learner=learner, **changes
        )

    return build


def test_preferred_images_are_drawn_with_their_prompts(make, store):
    run = make(1.0)
    encode = open_pipeline(run.pipeline).load_text_encoder()
    draws = PretrainingDraws(run, SHAPE)
    item = WorkItem(iteration=3, prompt_id=1, prompt="p", group_size=20)
    drawn, again = draws.draw(item, encode), draws.draw(item, encode)
    assert torch.equal(drawn.latents, again.latents)
    assert torch.equal(drawn.noise, again.noise)
    preferred = store.latents(torch.tensor([0, 2, 4]))
    numbers = [int((preferred == latent).flatten(1).all(1).nonzero()) for latent in drawn.latents]
    assert set(numbers) == {0, 1, 2}, "all of the preferred images, and no other"
    expected = encode([f"a small red circle {n}" for n in numbers])
    assert torch.equal(drawn.prompt.embeds, expected.embeds)
    assert 0 <= drawn.sigma.min() < 0.3 < 0.7 < drawn.sigma.max() < 1


def test_the_loss_is_that_of_flow_matching():
    draws = np.random.default_rng(0)
    velocity, clean, noise = (draws.normal(size=(3, 2, 4, 4)) for _ in range(3))
    expected = ((velocity - (noise - clean)) ** 2).mean((1, 2, 3))
    found = flow_matching_loss(*(torch.tensor(each) for each in (velocity, clean, noise)))
    assert np.allclose(found.numpy(), expected)


def test_the_learner_reports_the_base_models_loss_before_its_first_update(make):
    run = make(1.0, iterations=1)
    recorder = Recorder(run, run.run_dir, exporter(run))
    align(run, load_prompts(run.prompts), InlineExperience(run), InlineLearner(run), recorder)
    worker, backbone = Rollouts(run), open_pipeline(run.pipeline)
    transformer = backbone.load_transformer()
    losses = []
    for item in plan(run, load_prompts(run.prompts).train, 0):
        real = worker.rollout([item])[0].pretraining
        sigma = real.sigma.view(-1, 1, 1, 1)
        with torch.no_grad():
            noisy = (1 - sigma) * real.latents + sigma * real.noise
            velocity = backbone.velocity(transformer, noisy, real.sigma, real.prompt)
        losses += ((velocity - (real.noise - real.latents)) ** 2).flatten(1).mean(1).tolist()
    assert recorder.history.iterations()[0]["pretraining_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_under_a_large_weight_the_loss_falls(make):
    """On the same few images over and over, with the reward's gradient drowned."""
    run = make(1e4, iterations=8, golden={"every": 8}, checkpoint_every=8)
    recorder = Recorder(run, run.run_dir, exporter(run))
    align(run, load_prompts(run.prompts), InlineExperience(run), InlineLearner(run), recorder)
    losses = [entry["pretraining_loss"] for entry in recorder.history.iterations()]
    assert sum(losses[4:]) < sum(losses[:4])


def test_a_store_of_other_latents_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match=r"holds latents of shape \(16, 8, 8\), the policy's are \(16, 4, 4\)"):
        PretrainingDraws(make(1.0), (16, 4, 4))
