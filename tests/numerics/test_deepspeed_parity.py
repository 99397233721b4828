"""DeepSpeed in real Ray actors against plain torch AdamW, on a tiny SD3 transformer with LoRA."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from actors.gang import Gang, GangMember
from actors.placement import actor_options
from dina_rl.alignment.engine import Engine, TorchEngine
from dina_rl.alignment.learner import PolicyLearner
from dina_rl.alignment.rate import learning_rate
from dina_rl.backbones.lora import adapter_disabled, add_lora
from dina_rl.backbones.sd3 import SD3
from dina_rl.config import AlignRun, LearnerConfig, WorkersConfig
from dina_rl.types import TrainingGroup, WorkItem
from tests.rollouts import Rollouts
from tests.tensors import assert_same_tensors
from tests.tiny_run import tiny_run

pytestmark = pytest.mark.usefixtures("ray_local")
# Workers cannot import test modules by name.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

STEPS = 5
INTERRUPTED_AFTER = 3
MICRO_BATCHES = 4  # per step, over all ranks
STAGES = (0, 2, 3)
TOLERANCE = 1e-6

State = dict[str, torch.Tensor]


def config(stage: int) -> LearnerConfig:
    """Decay, clipping and schedule are all strong enough to show."""
    schedule = {"learning_rate": 1e-3, "warmup_updates": 2, "schedule": "cosine"}
    return LearnerConfig(zero_stage=stage, weight_decay=0.1, max_grad_norm=0.5, **schedule)


def policy(*, whole: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
    if not whole:
        add_lora(transformer, rank=4, alpha=8, targets=SD3.lora_targets, seed=3)
    return transformer


def micro_batch(step: int, number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + number)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=generator),
        "pooled_projections": torch.randn(2, 16, generator=generator),
        "timestep": 1000 * torch.rand(2, generator=generator),
    }


def train(engine: Engine, module: nn.Module, steps: range) -> list[float]:
    """As the learner does it: the adapter-off forward comes between a forward and its backward."""
    norms = []
    for step in steps:
        mine = range(engine.rank, MICRO_BATCHES, engine.world_size)
        for number in mine:
            inputs = micro_batch(step, number)
            output = engine.module(**inputs, return_dict=False)[0]
            with torch.no_grad(), adapter_disabled(module):
                reference = engine.module(**inputs, return_dict=False)[0]
            loss = (output - inputs["hidden_states"]).square().mean() + (output - reference).square().mean()
            engine.backward(30 * loss * engine.world_size / MICRO_BATCHES, last=number == mine[-1])
        norms.append(engine.step(learning_rate(config(0), step, STEPS)))
    return norms


def train_nft(learner: PolicyLearner, groups: Sequence[TrainingGroup]) -> State:
    """The learner's whole state after two iterations on the same groups; from the first update on, v_old is not v."""
    for iteration in range(2):
        mine = [replace(each, rollout=replace(each.rollout, policy_version=learner.version)) for each in groups]
        learner.update(iteration, mine)
    return learner.state()


def reference_output(engine: Engine, module: nn.Module) -> torch.Tensor:
    with torch.no_grad(), adapter_disabled(module):
        return engine.module(**micro_batch(99, 0), return_dict=False)[0]


class Rank(GangMember):
    """Holds a policy under DeepSpeed and trains it on its share of the micro-batches."""

    def build(self, stage: int, whole: bool = False) -> None:
        from actors.engine import DeepSpeedEngine

        self.policy = policy(whole=whole)
        self.engine = DeepSpeedEngine(self.policy, config(stage), persistence_threshold=0)

    def train(self, steps: range) -> list[float]:
        return train(self.engine, self.policy, steps)

    def train_nft(self, run: AlignRun, groups: Sequence[TrainingGroup]) -> State:
        from actors.engine import DeepSpeedEngine

        learner = PolicyLearner(run, lambda module: DeepSpeedEngine(module, run.learner, persistence_threshold=0))
        return train_nft(learner, groups)

    def state(self) -> tuple[State, State]:
        return self.engine.weights(self.engine.mine), self.engine.optimizer_state()

    def whole_weights(self) -> State:
        return self.engine.weights()

    def load(self, adapter: State, optimizer: State) -> None:
        self.engine.load_weights(adapter)
        self.engine.load_optimizer_state(optimizer)

    def reference_output(self) -> torch.Tensor:
        return reference_output(self.engine, self.policy)

    def reduce(self) -> list[list[float]]:
        return [self.engine.reduce([self.rank + 1.0, -self.rank], operation) for operation in ("sum", "max")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What `STEPS` steps leave behind."""

    norms: list[float]
    adapter: State
    optimizer: State
    interrupted: tuple[State, State]  # adapter and optimizer after `INTERRUPTED_AFTER` steps


@pytest.fixture(scope="module")
def plain() -> Run:
    module = policy()
    engine = TorchEngine(module, config(0))
    norms = train(engine, module, range(INTERRUPTED_AFTER))
    interrupted = engine.weights(), engine.optimizer_state()
    norms += train(engine, module, range(INTERRUPTED_AFTER, STEPS))
    return Run(norms=norms, adapter=engine.weights(), optimizer=engine.optimizer_state(), interrupted=interrupted)


Call = Callable[..., list]


def together(shares: Sequence[State]) -> State:
    """What the ranks' shares are together. Nothing but a count is in two, and every rank has some."""
    names = [name for share in shares for name, tensor in share.items() if tensor.ndim]
    assert len(names) == len(set(names))
    assert all(any(tensor.ndim for tensor in share.values()) for share in shares)
    return {name: tensor for share in shares for name, tensor in share.items()}


def state_of(ranks: Call) -> tuple[State, State]:
    """All weights and moments."""
    weights, moments = zip(*ranks("state"), strict=True)
    return together(weights), together(moments)


@contextmanager
def open_gang(size: int) -> Iterator[Call]:
    """`call(method, *args)` calls all ranks of a gang and returns the value of each."""

    def spawn(rank: int) -> ray.actor.ActorHandle:
        options = actor_options(WorkersConfig(), num_gpus=0)
        return ray.remote(**options)(Rank).remote(rank, size, timeout_s=120)

    gang = Gang(spawn, size, name="learner", start_timeout_s=180, call_timeout_s=120)

    def call(method: str, *args: object) -> list:
        return ray.get(gang.call(lambda handle: getattr(handle, method).remote(*args)), timeout=60)

    yield call
    gang.shutdown()


@pytest.fixture(scope="module")
def ranks(ray_local) -> Iterator[Call]:
    """Two ranks, which all tests but one share: between two there is something to split and to sum."""
    with open_gang(2) as call:
        yield call


@pytest.fixture(scope="module")
def trained(ranks) -> Callable[[int], Run]:
    """The ranks' runs by ZeRO stage, made on first use."""
    runs: dict[int, Run] = {}

    def run(stage: int) -> Run:
        if stage not in runs:
            ranks("build", stage)
            norms, _ = ranks("train", range(INTERRUPTED_AFTER))
            interrupted = state_of(ranks)
            norms += ranks("train", range(INTERRUPTED_AFTER, STEPS))[0]
            adapter, optimizer = state_of(ranks)
            runs[stage] = Run(norms=norms, adapter=adapter, optimizer=optimizer, interrupted=interrupted)
        return runs[stage]

    return run


def assert_close(state: State, expected: State) -> None:
    assert set(state) == set(expected)
    for name, tensor in state.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=TOLERANCE, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("stage", STAGES)
def test_training_equals_plain_torch(stage, trained, plain):
    run = trained(stage)
    assert_close(run.adapter, plain.adapter)
    assert_close(run.optimizer, plain.optimizer)
    assert run.norms == pytest.approx(plain.norms, abs=1e-5)
    assert min(plain.norms) > config(stage).max_grad_norm  # clipping took part in every step
    moved = max((run.adapter[name] - run.interrupted[0][name]).abs().max().item() for name in run.adapter)
    assert moved > 1000 * TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_a_restored_run_continues_exactly(stage, trained, ranks):
    run = trained(stage)
    ranks("build", stage)
    ranks("load", *run.interrupted)
    ranks("train", range(INTERRUPTED_AFTER, STEPS))
    adapter, optimizer = state_of(ranks)
    assert_same_tensors(adapter, run.adapter)
    assert_same_tensors(optimizer, run.optimizer)


def test_a_checkpoint_of_plain_torch_continues_under_zero_3(plain, ranks):
    ranks("build", 3)
    ranks("load", *plain.interrupted)
    ranks("train", range(INTERRUPTED_AFTER, STEPS))
    adapter, optimizer = state_of(ranks)
    assert_close(adapter, plain.adapter)
    assert_close(optimizer, plain.optimizer)


@pytest.mark.parametrize("stage", STAGES)
def test_the_reference_is_the_base_model_after_training_too(stage, ranks):
    module = policy()
    expected = reference_output(TorchEngine(module, config(0)), module)
    ranks("build", stage)
    ranks("train", range(1))
    torch.testing.assert_close(ranks("reference_output")[0], expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def plain_whole() -> tuple[list[float], State, State]:
    module = policy(whole=True)
    engine = TorchEngine(module, config(0))
    return train(engine, module, range(2)), engine.weights(), engine.optimizer_state()


@pytest.mark.parametrize("stage", STAGES)
def test_training_all_weights_equals_plain_torch(stage, plain_whole, ranks):
    norms, weights, moments = plain_whole
    ranks("build", stage, True)
    for found in ranks("train", range(2)):
        assert found == pytest.approx(norms, abs=1e-5)
    ours, optimizer = state_of(ranks)
    for everything in ranks("whole_weights"):
        assert_same_tensors(everything, ours)
    assert_close(ours, weights)
    assert_close(optimizer, moments)
    assert len(ours) == sum(1 for _ in policy(whole=True).parameters())


@pytest.fixture(scope="module")
def nft(tiny_pipeline) -> tuple[AlignRun, list[TrainingGroup]]:
    settings = {"algorithm": "nft", "nft": {"levels": 2, "old_rate": 0.1}}
    learner = {"learning_rate": 1e-4, "schedule": "linear"}
    run = tiny_run(Path("unused"), tiny_pipeline, tiny_pipeline, learner=learner, **settings)
    items = [WorkItem(iteration=0, prompt_id=i, prompt=f"a small red circle {i}", group_size=3) for i in range(4)]
    worth = torch.tensor([0.9, 0.2, 0.4])
    return run, [TrainingGroup(rollout=each, advantages=worth) for each in Rollouts(run).rollout(items)]


@pytest.mark.parametrize(("stage", "whole"), [(0, False), (3, True)])
def test_nft_and_its_sampling_copy_equal_plain_torch(stage, whole, nft, ranks):
    run, groups = nft
    lora = None if whole else run.learner.lora
    run = run.model_copy(update={"learner": run.learner.model_copy(update={"zero_stage": stage, "lora": lora})})
    expected = train_nft(PolicyLearner(run, lambda module: TorchEngine(module, run.learner)), groups)
    assert_close(together(ranks("train_nft", run, groups)), expected)


def test_metrics_are_reduced_over_ranks(ranks):
    ranks("build", 0)
    assert ranks("reduce") == [[[1 + 2, 0 - 1], [2, 0]]] * 2


def test_a_rank_alone_equals_plain_torch_too(plain, ray_local):
    """The laptop's gang, at the default stage: nothing is split, and a sum over ranks has one term."""
    with open_gang(1) as alone:
        alone("build", LearnerConfig().zero_stage)
        assert alone("train", range(STEPS)) == [pytest.approx(plain.norms, abs=1e-5)]
        adapter, optimizer = state_of(alone)
        assert alone("reduce") == [[[1, 0], [1, 0]]]
    assert_close(adapter, plain.adapter)
    assert_close(optimizer, plain.optimizer)
