"""Forwards are counted: nothing runs whose result is not used, and the gradient is that of the whole computation."""

import pytest
import torch

from dina_rl.alignment.engine import TorchEngine
from dina_rl.alignment.learner import PolicyLearner
from dina_rl.types import TrainingGroup, WorkItem
from tests.rollouts import Rollouts
from tests.tiny_run import tiny_run

ITEMS = [WorkItem(iteration=0, prompt_id=i, prompt=f"a small red circle {i}", group_size=3) for i in range(4)]
PLAIN = torch.tensor([[1.0, 0.0, -1.0]]).repeat(4, 1)
SKEWED = torch.tensor([[1.0, 0.25, -1.25], [0.5, 1.0, -1.5], [-2.0, 0.5, 1.5], [0.1, -0.2, 0.1]])
REFL = {"algorithm": "refl", "refl": {"stop_range": [1, 3], "reward_gradient": "service"}}
NFT = {"algorithm": "nft", "nft": {"levels": 3, "kl_weight": 0.0}}


class Forwards:
    """Rows of every forward of a transformer."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.rows: list[int] = []
        module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.rows.append(len(kwargs["hidden_states"]))


class Watched(TorchEngine):
    """A rank that counts its forwards and keeps the gradient of its last update, not averaged over ranks."""

    def __init__(self, module, config, rank=0, world_size=1):
        super().__init__(module, config)
        self.rank, self.world_size = rank, world_size
        self.forwards = Forwards(module)

    def step(self, learning_rate):
        self.gradient = torch.cat([parameter.grad.flatten() for parameter in self._parameters.values()])
        return super().step(learning_rate)


@pytest.fixture(scope="module")
def make(tmp_path_factory, tiny_pipeline, tiny_reward):
    """(metrics, engine) of one update of a run with some sections changed."""
    rolled = {}

    def roll_out(run, policy):
        key = run.algorithm, run.rollout.model_dump_json()
        if key not in rolled:
            worker = Rollouts(run)
            worker.load_weights(policy)
            rolled[key] = [worker.rollout([item])[0] for item in ITEMS]
        return rolled[key]

    def update(advantages=PLAIN, *, rank=0, world_size=1, updates=1, keep=None, micro=3, **changes):
        learner = {
            "updates_per_iteration": updates,
            "keep": keep,
            "micro_batch_size": micro,
            "max_grad_norm": 1e9,
        }
        run = tiny_run(tmp_path_factory.getbasetemp(), tiny_pipeline, tiny_reward, learner=learner, **changes)
        engines = []

        def engine(module):
            engines.append(Watched(module, run.learner, rank, world_size))
            return engines[0]

        ours = PolicyLearner(run, engine)
        groups = [
            TrainingGroup(rollout=rollout, advantages=row, reward_gradient=0.1 * rollout.latents)
            for rollout, row in zip(roll_out(run, ours.policy()), advantages, strict=True)
        ]
        return ours.update(0, groups), engines[0]

    return update


def assert_same_gradient(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, atol=1e-6 * float(theirs.abs().max()), rtol=0)


def test_without_a_kl_samples_of_advantage_zero_are_in_no_forward(make):
    """Before the first update the KL's own gradient is 0: with it, the whole computation is the same."""
    cheap, ours = make(grpo={"kl_weight": 0.0})
    whole, theirs = make(grpo={"kl_weight": 0.01})
    assert ours.forwards.rows == [3] * 3 * 2  # 8 of 12 samples and a padding row, at both steps of the window
    assert theirs.forwards.rows == [3] * 4 * 2 * 2  # all of them, and the base
    assert_same_gradient(ours.gradient, theirs.gradient)
    assert (cheap["trained_samples"], whole["trained_samples"]) == (8, 12)
    assert cheap["ratio_mean"] == whole["ratio_mean"] == 1
    assert cheap["first_ratio_gap"] == 0
    assert "kl" not in cheap


def test_where_no_advantage_is_zero_nothing_is_left_out(make):
    cheap, ours = make(SKEWED, grpo={"kl_weight": 0.0})
    whole, theirs = make(SKEWED, grpo={"kl_weight": 0.01})
    assert ours.forwards.rows == [3] * 4 * 2
    assert torch.equal(ours.gradient, theirs.gradient), "to the last bit"
    assert cheap["policy_loss"] == whole["policy_loss"]


def test_ranks_share_what_is_left(make):
    """Rows of advantage 0 are dealt to nobody; the mean over ranks is one process' gradient."""
    options = {"grpo": {"kl_weight": 0.0}}
    _, alone = make(**options)
    _, first = make(rank=0, world_size=2, **options)
    _, second = make(rank=1, world_size=2, **options)
    assert first.forwards.rows == second.forwards.rows == [3] * 2 * 2
    assert_same_gradient((first.gradient + second.gradient) / 2, alone.gradient)


def test_old_log_probs_are_recomputed_where_an_update_comes_before_them(make):
    options = {"grpo": {"kl_weight": 0.0, "old_log_probs": "recompute"}}
    _, once = make(SKEWED, **options)
    assert len(once.forwards.rows) == 4 * 2
    _, halves = make(SKEWED, updates=2, **options)
    assert len(halves.forwards.rows) == 4 * 2 + 2 * 2


def test_who_is_not_kept_is_in_no_forward_and_not_in_the_mean(make):
    metrics, ours = make(SKEWED, keep=2, micro=2)
    assert ours.forwards.rows == [2] * 4 * 2 * 2  # 2 of 3 samples of each group, and the base's
    assert metrics["trained_samples"] == 8
    # Of the last group the second of two equal ones is kept: it counts as the higher.
    extremes = torch.tensor([[1.0, 0, -1.25], [0, 1.0, -1.5], [-2.0, 0, 1.5], [0, -0.2, 0.1]])
    _, theirs = make(extremes)
    assert_same_gradient(ours.gradient, theirs.gradient * 12 / 8)


@pytest.mark.parametrize(("weight", "passes"), [(0.0, 1), (0.1, 2)])
def test_refl_asks_the_base_for_a_kl_alone(make, weight, passes):
    _, engine = make(torch.ones(4, 3), **{**REFL, "refl": {**REFL["refl"], "kl_weight": weight}})
    assert engine.forwards.rows == [3] * 4 * passes


def test_nft_asks_the_copy_that_samples_where_it_is_another(make):
    worth = torch.tensor([[0.9, 0.5, 0.2]]).repeat(4, 1)
    _, halves = make(worth, updates=2, **NFT)
    assert halves.forwards.rows == [3] * (4 + 2) * 3, "all: worth 1/2 pulls back to the copy"
    _, kept = make(worth, keep=2, micro=2, **NFT)
    assert kept.forwards.rows == [2] * 4 * 3, "before the first update the copy is the policy"


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 1), (2.0, 2)])
def test_without_guidance_the_sampler_makes_one_pass_a_step(tmp_path, tiny_pipeline, tiny_reward, scale, passes):
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, rollout={"guidance_scale": scale})
    worker = Rollouts(run)
    forwards = Forwards(worker._worker._sampler.transformer)
    (trajectory,) = worker.rollout(ITEMS[:1])
    assert forwards.rows == [3] * run.rollout.num_steps * passes
    assert trajectory.negative is None
