"""ReFL's gradient: from the scorers, from a reward model beside the learner, and by finite differences."""

import pytest
import torch

from dina_rl.alignment.algorithms.refl import reward_surrogate, stop_step
from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.engine import TorchEngine
from dina_rl.alignment.inline import InlineExperience, InlineLearner
from dina_rl.alignment.learner import PolicyLearner
from dina_rl.alignment.loop import align
from dina_rl.alignment.prompts import load_prompts
from dina_rl.alignment.record import Recorder
from dina_rl.alignment.result import finished
from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.backbones.guidance import guided_velocity
from dina_rl.flow.process import predict_clean, velocity_kl
from dina_rl.flow.sampler import denoise
from dina_rl.reward.checkpoint import load_reward
from dina_rl.runtime import open_pipeline
from dina_rl.seeding import normal
from dina_rl.types import TrainingGroup, WorkItem
from jobs.align import exporter
from tests.rollouts import Rollouts
from tests.tiny_clip import save_tiny_clip
from tests.tiny_run import tiny_run

REFL = {"algorithm": "refl", "refl": {"stop_range": [2, 3]}, "learner": {"updates_per_iteration": 1}}


@pytest.fixture
def make(tmp_path, tiny_pipeline, tiny_reward):
    def build(**changes):
        merged = {**REFL, **changes}
        for name, value in REFL.items():
            if isinstance(value, dict) and name in changes:
                merged[name] = {**value, **changes[name]}
        return tiny_run(tmp_path, tiny_pipeline, tiny_reward, **merged)

    return build


class Recording(TorchEngine):
    """Keeps the gradient of every parameter instead of stepping."""

    def step(self, rate):
        self.gradients = {name: each.grad.clone() for name, each in self._parameters.items()}
        self._optimizer.zero_grad()
        return 1.0


def stopped_groups(run):
    items = [WorkItem(iteration=0, prompt_id=i, prompt=f"a small red circle {i}", group_size=3) for i in range(4)]
    return Rollouts(run).rollout(items)


def gradients(run, groups):
    """The policy's gradient on these groups, with the reward's gradient from where the run says."""
    engines = []

    def keep(module):
        engines.append(Recording(module, run.learner))
        return engines[0]

    learner = PolicyLearner(run, keep)
    scorer = ScoringWorker(run)
    reward_gradients = [None] * len(groups)
    if open_algorithm(run).wants_reward_gradients:
        reward_gradients = [scorer.score_with_gradient([group])[1][0] for group in groups]
    metrics = learner.update(
        0,
        [
            TrainingGroup(rollout=group, advantages=torch.ones(3), reward_gradient=gradient)
            for group, gradient in zip(groups, reward_gradients, strict=True)
        ],
    )
    return engines[0].gradients, metrics


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory, tiny_reward):
    """Rewards by name: the latent one, and the same with one on decoded images."""
    clip = str(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))
    dina = {"dina": {"path": str(tiny_reward)}}
    return {"latent": dina, "mixed": {**dina, "pickscore": {"path": clip, "processor": clip, "weight": 3.0}}}


@pytest.mark.parametrize(("guided", "rewards"), [(False, "latent"), (True, "latent"), (False, "mixed")])
def test_scorers_and_learner_give_the_same_gradient(make, mixtures, guided, rewards):
    runs = [
        make(refl={"reward_gradient": source}, learner={"guidance_in_loss": guided}, rewards=mixtures[rewards])
        for source in ("service", "learner")
    ]
    groups = stopped_groups(runs[0])
    (service, metrics), (own, _) = (gradients(run, groups) for run in runs)
    largest = max(tensor.abs().max().item() for tensor in own.values())
    assert largest > 0
    for name in own:
        torch.testing.assert_close(service[name], own[name], atol=1e-6 * largest, rtol=1e-5)
    assert metrics["first_prediction_gap"] < 1e-5, "the learner predicts what the rollout predicted"


def test_a_scorer_of_images_adds_its_own_gradient(make, mixtures):
    """d(a + 3 b) = da + 3 db: the mixture's gradient at the latents, against each scorer alone."""
    groups = stopped_groups(make())
    pick = {"dina": None, "pickscore": {**mixtures["mixed"]["pickscore"], "weight": 1.0}}
    both, latent, image = (
        ScoringWorker(make(rewards=rewards)).score_with_gradient(groups)[1]
        for rewards in (mixtures["mixed"], mixtures["latent"], pick)
    )
    assert image.abs().max() > 0
    torch.testing.assert_close(both, latent + 3 * image, atol=1e-6, rtol=1e-4)


def test_the_gradient_is_that_of_minus_the_mean_reward_by_finite_differences(make):
    """Central differences of E[r(x0(theta))] in adapter space, along the gradient found, where fp32 sees the most."""
    run = make()
    groups = stopped_groups(run)
    found, _ = gradients(run, groups)
    norm = torch.cat([tensor.flatten() for tensor in found.values()]).norm().item()

    modules = []
    PolicyLearner(run, lambda module: modules.append(module) or TorchEngine(module, run.learner))
    backbone, scorer = open_pipeline(run.pipeline), ScoringWorker(run)
    reward = load_reward(run.rewards.dina.location, open_pipeline(run.pipeline))
    parameters = dict(modules[0].named_parameters())
    start = {name: parameters[name].detach().clone() for name in found}

    @torch.no_grad()
    def mean_reward(shift):
        for name, tensor in found.items():
            parameters[name].copy_(start[name] + shift / norm * tensor)
        total = 0.0
        for group in groups:
            _, conditions = scorer.inputs([group])
            prompt = conditions.embeds
            velocity = backbone.velocity(modules[0], group.stopped, torch.full((3,), group.sigma), prompt)
            clean = predict_clean(group.stopped, velocity, group.sigma)
            total += (
                reward.score_clean(clean, prompt, run.rewards.dina.levels, conditions.noise[:, 0]).double().sum().item()
            )
        return total / 12

    shift = 0.1
    slope = -(mean_reward(shift) - mean_reward(-shift)) / (2 * shift)
    assert slope == pytest.approx(norm, rel=0.01)


def test_the_surrogate_has_the_chain_rules_gradient():
    torch.manual_seed(0)
    theta = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    clean = theta.sin()
    reward = (clean**3).flatten(1).sum(1)
    (expected,) = torch.autograd.grad(-reward.sum(), theta, retain_graph=True)
    (outer,) = torch.autograd.grad(reward.sum(), clean, retain_graph=True)
    (found,) = torch.autograd.grad(reward_surrogate(clean, outer).sum(), theta)
    torch.testing.assert_close(found, expected)


def test_the_velocity_kl_is_that_of_unit_gaussians():
    torch.manual_seed(0)
    ours, reference = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    unit = torch.ones((), dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(ours, unit), torch.distributions.Normal(reference, unit)
    )
    torch.testing.assert_close(velocity_kl(ours, reference), expected.flatten(1).mean(1))


def test_a_rollout_stops_on_the_ode_and_predicts_its_end(make):
    """From the last step one-step prediction is the ODE's own end."""
    run = make(refl={"stop_range": [3, 3]}, rollout={"guidance_scale": 1.0})
    worker = Rollouts(run)
    group = worker.rollout([WorkItem(iteration=0, prompt_id=0, prompt="a small red circle", group_size=3)])[0]
    noise = torch.stack([normal((1, *group.latents.shape[1:]), run.seed, "rollout", 0, 0, i)[0] for i in range(3)])
    backbone = open_pipeline(run.pipeline)
    transformer = backbone.load_transformer()
    prompt = group.prompt.repeat(3)
    sigmas = backbone.sigmas(4, 32, 32)
    whole = denoise(noise, sigmas, guided_velocity(backbone, transformer, prompt, None, 1.0))
    torch.testing.assert_close(group.latents, whole.latents, atol=1e-5, rtol=1e-5)
    assert group.sigma == float(sigmas[3])


def test_stop_steps_are_drawn_from_the_whole_range(make):
    run = make(refl={"stop_range": [1, 3]})
    assert {stop_step(run, step) for step in range(40)} == {1, 2, 3}


def test_a_refl_run_goes_from_start_to_export(make):
    run = make(
        iterations=2,
        rollout={"group_size": 1, "prompts_per_iteration": 6, "groups_per_call": 3},
        refl={"kl_weight": 0.1},
    )
    recorder = Recorder(run, run.run_dir, exporter(run))
    align(run, load_prompts(run.prompts), InlineExperience(run), InlineLearner(run), recorder)
    assert finished(run, run.run_dir)
    first, second = recorder.history.iterations()
    assert first["kl"] == 0
    assert second["kl"] > 0
    assert first["first_prediction_gap"] == 0
