from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dina_rl.backbones.registry import open_backbone
from dina_rl.config import FitConfig, TimestepConfig
from dina_rl.data.stores.units import Unit, training_batch
from dina_rl.errors import RunStopped
from dina_rl.flow.process import add_noise
from dina_rl.reward.fit import RewardFit, StepReport, fit, micro_batches, rate_factor, training_noise
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.thurstone import comparison_variance, fidelity_loss
from tests.tensors import assert_same_tensors
from tests.tiny_reward import PROMPTS, TINY_REWARD, fit_batch, latents, stirred_model

CONFIG = FitConfig(steps=12, batch_size=8, learning_rate=3e-3, ema_decay=0.5)


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path):
    return open_backbone(tiny_pipeline, max_sequence_length=8)


@pytest.fixture(scope="module")
def encoder(backbone):
    return backbone.load_text_encoder()


def test_loss_falls_on_pairs_that_can_be_learned(backbone, encoder) -> None:
    progress = RewardFit(LatentRewardModel(backbone, TINY_REWARD, seed=0), CONFIG)
    reports = list(fit(progress, (fit_batch(8, step) for step in range(12)), encoder, seed=0))
    assert [report.step for report in reports] == list(range(1, 13))
    assert sum(r.loss for r in reports[-4:]) < sum(r.loss for r in reports[:4])
    assert all(report.grad_norm > 0 for report in reports)


def test_only_trainable_weights_move(backbone, encoder) -> None:
    model = LatentRewardModel(backbone, TINY_REWARD, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    list(fit(RewardFit(model, CONFIG), [fit_batch(8, 0), fit_batch(8, 1)], encoder, seed=0))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_a_latent_that_is_not_finite_stops_the_fit_and_changes_nothing(
    backbone, encoder, value: float, micro_batch_size: int | None
) -> None:
    config = CONFIG.model_copy(update={"micro_batch_size": micro_batch_size})
    progress = RewardFit(LatentRewardModel(backbone, TINY_REWARD, seed=0), config)
    spoilt = fit_batch(8, 1)
    spoilt.latents[int(spoilt.rejected[0]), 0, 0, 0] = value
    steps = fit(progress, [fit_batch(8, 0), spoilt, fit_batch(8, 2)], encoder, seed=0)
    next(steps)
    before = progress.state()
    with pytest.raises(RunStopped, match="gradient norm of step 2 is nan"):
        next(steps)
    after = progress.state()
    assert_same_tensors(after, before)


def test_averages_follow_the_recursion_and_are_swapped_in_and_out(backbone, encoder) -> None:
    progress = RewardFit(LatentRewardModel(backbone, TINY_REWARD, seed=0), CONFIG)
    name = "head.head.weight"
    expected = progress.parameters[name].detach().clone()
    for n, _ in enumerate(fit(progress, (fit_batch(8, step) for step in range(8)), encoder, seed=0)):
        decay = min((1 + n) / (10 + n), 0.5)  # 0.1, 0.18, ... until 0.5 is reached at n = 8
        expected = decay * expected + (1 - decay) * progress.parameters[name].detach()
    torch.testing.assert_close(progress.averages[name], expected)
    current = progress.parameters[name].detach().clone()
    assert not torch.allclose(current, expected)
    with progress.averaged_weights() as model:
        torch.testing.assert_close(model.get_parameter(name).detach(), expected)
    assert torch.equal(progress.parameters[name], current)


def test_a_pairs_noise_does_not_depend_on_its_neighbours() -> None:
    whole = fit_batch(4, 0)
    part = fit_batch(2, 0)
    t, noise = training_noise(whole, TimestepConfig(), seed=3, step=5)
    t_part, noise_part = training_noise(part, TimestepConfig(), seed=3, step=5)
    assert torch.equal(t[:2], t_part)
    assert torch.equal(noise[:2], noise_part)
    assert len(set(t.tolist())) == 4
    other = training_noise(whole, TimestepConfig(), seed=3, step=6)
    assert (other[0] != t).all()


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.1), (4, 0.5), (9, 1.0), (49, 1.0), (50, 1.0), (75, 0.525), (99, 0.069)]
)
def test_learning_rate_warms_up_and_decays(step: int, factor: float) -> None:
    config = FitConfig(steps=100, warmup_steps=10, decay_start=0.5)
    assert rate_factor(step, config) == pytest.approx(factor)


def test_learning_rate_is_constant_by_default() -> None:
    assert {rate_factor(step, FitConfig(steps=100)) for step in range(100)} == {1.0}


def state_after(backbone, encoder, config: FitConfig, *, batches: int = 2, dtype: torch.dtype = torch.float32):
    """(losses, gradients of the last step before clipping, weights) of a short fit from a model stirred a little."""
    model = stirred_model(backbone)
    assert next(model.truncated.parameters()).dtype == dtype
    progress = RewardFit(model, config)
    losses = [report.loss for report in fit(progress, (fit_batch(8, n) for n in range(batches)), encoder, seed=0)]
    gradients = {name: parameter.grad.clone() for name, parameter in progress.parameters.items()}
    return losses, gradients, progress


@pytest.mark.parametrize("size", [1, 3, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(backbone, encoder, size: int) -> None:
    config = FitConfig(steps=4, batch_size=8, max_grad_norm=1e9)
    losses, gradients, _ = state_after(backbone, encoder, config, batches=1)
    config = config.model_copy(update={"micro_batch_size": size})
    accumulated, others, _ = state_after(backbone, encoder, config, batches=1)
    assert accumulated == pytest.approx(losses, abs=1e-6)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_travel_between_ranks_once_per_step(backbone, encoder) -> None:
    """All micro-batches but the last are inside `no_sync`."""
    entered = []

    @contextmanager
    def no_sync():
        entered.append(True)
        yield

    config = FitConfig(steps=4, batch_size=8, micro_batch_size=3)
    progress = RewardFit(LatentRewardModel(backbone, TINY_REWARD, seed=0), config)
    list(fit(progress, [fit_batch(8, 0)], encoder, seed=0, no_sync=no_sync))
    assert len(entered) == 2  # 3 + 3 inside, 2 outside


def test_micro_batches_grow_with_the_bucket_and_keep_the_order() -> None:
    config = FitConfig(steps=4, batch_size=4, num_workers=2, micro_batch_size=1)
    largest = micro_batches(fit_batch(2, 0), config, world_size=2)  # a rank's share of a step of the largest images
    assert [len(part) for part in largest] == [1, 1]
    smaller = micro_batches(fit_batch(6, 0), config, world_size=2)  # three times as many of a third of the area
    assert [len(part) for part in smaller] == [3, 3]
    assert sum((part.keys for part in smaller), ()) == fit_batch(6, 0).keys
    assert sum((part.prompts for part in smaller), ()) == fit_batch(6, 0).prompts
    whole = fit_batch(6, 0)
    assert micro_batches(whole, config.model_copy(update={"micro_batch_size": None}), world_size=2) == [whole]


def groups(count: int) -> list[Unit]:
    """Groups of 3 images and 3 pairs, of 2 and 1, and so on."""
    sides = [((0, 1), (1, 2), (0, 2)), ((0, 1),)]
    return [
        Unit(
            key=number,
            prompt=PROMPTS[number % 3],
            latents=latents(3 if number % 2 == 0 else 2, "group", number),
            chosen=tuple(chosen for chosen, _ in sides[number % 2]),
            rejected=tuple(rejected for _, rejected in sides[number % 2]),
        )
        for number in range(count)
    ]


def test_a_group_is_its_pairs_at_one_noise(backbone, encoder) -> None:
    """The gradient of a step of groups is that of the mean over all their pairs, each scored by itself (Eq. 9)."""
    batch = training_batch(groups(3), step_pairs=7)
    progress = RewardFit(stirred_model(backbone), CONFIG.model_copy(update={"max_grad_norm": 1e9}))
    report = next(fit(progress, [batch], encoder, seed=0))
    model = stirred_model(backbone)
    t, noise = training_noise(batch, TINY_REWARD.timestep, seed=0, step=0)
    prompt = encoder(batch.prompts)
    losses = []
    for chosen, rejected in zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True):
        number = int(batch.unit[chosen])
        assert number == int(batch.unit[rejected])
        one = slice(number, number + 1)
        sides = [
            model.score(add_noise(batch.latents[image : image + 1], noise[one], t[one]), t[one], prompt.select(one))
            for image in (chosen, rejected)
        ]
        margin = sides[0] - sides[1]
        losses.append(fidelity_loss(margin, comparison_variance(t[one], TINY_REWARD.thurstone), torch.ones(1)))
    loss = torch.cat(losses).mean()
    loss.backward()
    assert len(losses) == report.pairs == 7
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in progress.parameters.items():
        expected = model.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_shares_of_a_step_of_groups_average_to_the_whole(backbone, encoder) -> None:
    """Ranks have other numbers of pairs and of images; their gradients' mean is the whole step's, in parts too."""
    config = CONFIG.model_copy(update={"max_grad_norm": 1e9, "batch_size": 4})

    def gradients(units: list[Unit], world_size: int, **portions: int) -> tuple[StepReport, dict[str, torch.Tensor]]:
        progress = RewardFit(stirred_model(backbone), config.model_copy(update=portions))
        batch = training_batch(units, step_pairs=8)
        report = next(fit(progress, [batch], encoder, seed=0, world_size=world_size))
        return report, {name: parameter.grad for name, parameter in progress.parameters.items()}

    units = groups(4)
    units = [units[0], units[2], units[1], units[3]]  # 6 pairs on the first rank, 2 on the second
    whole, expected = gradients(units, 1)
    shares = [gradients(units[:2], 2), gradients(units[2:], 2, micro_batch_size=1)]
    assert {report.pairs for report, _ in shares} == {whole.pairs} == {8}
    for value in ("loss", "accuracy"):
        assert sum(getattr(report, value) for report, _ in shares) / 2 == pytest.approx(getattr(whole, value), rel=1e-5)
    for name, gradient in expected.items():
        mean = (shares[0][1][name] + shares[1][1][name]) / 2
        torch.testing.assert_close(mean, gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_micro_batches_are_bounded_by_their_images() -> None:
    config = FitConfig(steps=4, batch_size=4, micro_batch_size=2)
    parts = micro_batches(training_batch(groups(4), step_pairs=8), config, world_size=1)
    assert [part.keys for part in parts] == [(0,), (1,), (2,), (3,)]  # 3 + 2 images are more than 4
    config = config.model_copy(update={"micro_batch_size": 4})
    parts = micro_batches(training_batch(groups(4), step_pairs=8), config, world_size=1)
    assert [part.keys for part in parts] == [(0, 1, 2), (3,)]


def test_checkpointed_blocks_give_the_same_gradients(backbone, encoder) -> None:
    config = FitConfig(steps=4, batch_size=8)
    losses, gradients, progress = state_after(backbone, encoder, config)
    config = config.model_copy(update={"gradient_checkpointing": True})
    recomputed, others, checkpointed = state_after(backbone, encoder, config)
    assert recomputed == losses
    assert_same_tensors(others, gradients)  # and with the names saved files stay as they are


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_backbone_is_fitted_with_float32_weights_and_moments(tiny_pipeline: Path, autocast: bool) -> None:
    backbone = open_backbone(tiny_pipeline, dtype=torch.bfloat16, max_sequence_length=8)
    config = FitConfig(steps=4, batch_size=8, autocast=autocast)
    losses, gradients, progress = state_after(backbone, backbone.load_text_encoder(), config, dtype=torch.bfloat16)
    assert torch.tensor(losses).isfinite().tolist() == [True, True]
    trained = progress.parameters.values()
    frozen = [p for p in progress.model.parameters() if not p.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    floating = {t.dtype for name, t in progress.state().items() if name not in ("steps", "best_step", "best_accuracy")}
    assert floating == {torch.float32}


def test_autocast_computes_the_head_in_bfloat16_and_keeps_the_gradient(tiny_pipeline: Path) -> None:
    backbone = open_backbone(tiny_pipeline, dtype=torch.bfloat16, max_sequence_length=8)
    encoder = backbone.load_text_encoder()
    dtypes, gradients = {}, {}
    for autocast in (False, True):
        model = stirred_model(backbone)
        model.head.agg_visual.register_forward_hook(
            lambda module, inputs, output, autocast=autocast: dtypes.__setitem__(autocast, output.dtype)
        )
        progress = RewardFit(model, FitConfig(steps=4, batch_size=8, autocast=autocast))
        list(fit(progress, [fit_batch(8, 0)], encoder, seed=0))
        gradients[autocast] = torch.cat([parameter.grad.flatten() for parameter in progress.parameters.values()])
    assert (dtypes[False], dtypes[True]) == (torch.float32, torch.bfloat16)
    similarity = torch.cosine_similarity(gradients[False], gradients[True], dim=0)
    assert 0.98 < similarity < 1


def test_without_averaging_the_saved_weights_are_the_last_ones(backbone, encoder) -> None:
    progress = RewardFit(LatentRewardModel(backbone, TINY_REWARD, seed=0), CONFIG.model_copy(update={"ema_decay": 0.0}))
    list(fit(progress, (fit_batch(8, step) for step in range(3)), encoder, seed=0))
    assert_same_tensors(progress.averages, progress.parameters)


def test_certain_soft_labels_fit_as_hard_ones(backbone, encoder) -> None:
    """And doubtful ones do not: half the pairs at y = 1/2 change the step."""

    def fitted(labels: str, probability: torch.Tensor) -> dict[str, torch.Tensor]:
        config = CONFIG.model_copy(update={"labels": labels})
        progress = RewardFit(LatentRewardModel(backbone, TINY_REWARD, seed=0), config)
        list(fit(progress, [replace(fit_batch(2, 0), probability=probability)], encoder, seed=0))
        return progress.state()

    certain = torch.ones(2, dtype=torch.float64)
    hard = fitted("hard", certain * 0.5)
    for labels in ("soft", "soft_matched"):
        assert_same_tensors(fitted(labels, certain), hard)
    doubtful = fitted("soft", torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert any(not torch.equal(doubtful[name], value) for name, value in hard.items())
