"""The policy's side of the loop: scored groups in, better weights out. It runs the same on every engine and rank."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import nn

from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.ema import WeightsEMA
from dina_rl.alignment.engine import Engine
from dina_rl.alignment.objective import Minibatch
from dina_rl.alignment.policy import Policy
from dina_rl.alignment.rate import learning_rate
from dina_rl.config import AlignRun
from dina_rl.errors import RunStopped
from dina_rl.seeding import generator
from dina_rl.types import PolicyWeights, Rollout, TrainingGroup


class PolicyLearner:
    """One rank. All ranks are built alike and get the same groups.

    Args:
        run: the run's configuration.
        make_engine: wraps the trainable policy, e.g. `lambda module: TorchEngine(module, run.learner)`.
    """

    def __init__(self, run: AlignRun, make_engine: Callable[[nn.Module], Engine]) -> None:
        self.run = run
        self._policy = Policy(run, make_engine)
        self._objective = open_algorithm(run).objective(self._policy)
        engine = self._policy.engine
        self._ema = WeightsEMA(engine.weights(engine.mine), run.learner.ema_decay)
        self.version = 0

    def update(
        self, iteration: int, groups: Sequence[TrainingGroup[Rollout]], kl_scale: float = 1.0
    ) -> dict[str, float]:
        """Train on one iteration's groups; returns metrics, the same on every rank: means over the samples trained on.

        The configured KL weight is multiplied by `kl_scale`.

        The groups are shuffled and split into `learner.updates_per_iteration` minibatches of whole groups, one
        optimizer update each, in fresh order in each of `learner.epochs`.

        Raises:
            ValueError: rollouts of another policy version (staleness is 0 here) or of unequal schedules.
            RunStopped: the gradient is not finite, or the ratio gate is strict and closed.
        """
        self._check_version(groups)
        learner, engine, objective = self.run.learner, self._policy.engine, self._objective
        draws = generator(self.run.seed, "minibatches", iteration)
        order = torch.randperm(len(groups), generator=draws).tolist()
        count = min(learner.updates_per_iteration, len(groups))
        parts = [
            [groups[i] for i in order[n * len(order) // count : (n + 1) * len(order) // count]] for n in range(count)
        ]
        prepared = objective.prepare(parts)
        before = prepared.maxima
        sums: dict[str, float] = defaultdict(float)
        first: dict[str, float] = {}
        largest: dict[str, float] = {}
        norms: list[float] = []
        for epoch in range(learner.epochs):
            visits = range(count) if epoch == 0 else torch.randperm(count, generator=draws).tolist()
            for number in visits:
                maxima = self._accumulate(prepared.minibatches[number], kl_scale, sums)
                largest = {name: max(value, largest.get(name, 0.0)) for name, value in maxima.items()}
                if not norms:
                    first = {name: max(value, before.get(name, 0.0)) for name, value in maxima.items()}
                    first = dict(zip(first, engine.reduce(list(first.values()), "max"), strict=True))
                    objective.before_first_step(first)
                norms.append(self._take_step())
        objective.after_updates(self.version)
        largest = dict(zip(largest, engine.reduce(list(largest.values()), "max"), strict=True))
        return {
            **self._averages(sums),
            **{f"first_{name}": value for name, value in first.items()},
            **{f"largest_{name}": value for name, value in largest.items() if name not in before},
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": self._rate(self.version - 1),  # of the last update
            "updates": len(norms),
            "trained_samples": sum(each.samples for each in prepared.minibatches),
        }

    def _check_version(self, groups: Sequence[TrainingGroup[Rollout]]) -> None:
        for group in groups:
            if group.rollout.policy_version != self.version:
                raise ValueError(
                    f"rollout of prompt {group.rollout.item.prompt_id} was sampled by policy version "
                    f"{group.rollout.policy_version}, the learner is at {self.version}"
                )

    def _accumulate(self, minibatch: Minibatch, kl_scale: float, sums: dict[str, float]) -> dict[str, float]:
        """Gradients of one minibatch; adds to `sums` and returns this rank's maxima."""
        engine = self._policy.engine
        maxima: dict[str, float] = {}
        for index, forward in enumerate(minibatch.passes):
            outcome = forward(kl_scale)
            last = index == len(minibatch.passes) - 1
            engine.backward(outcome.loss * engine.world_size / minibatch.terms, last=last)
            for name, value in outcome.sums.items():
                sums[name] += value
            maxima = {name: max(value, maxima.get(name, 0.0)) for name, value in outcome.maxima.items()}
        return maxima

    def _take_step(self) -> float:
        """One optimizer update; returns the gradient norm."""
        engine = self._policy.engine
        norm = engine.step(self._rate(self.version))
        if not torch.isfinite(torch.tensor(norm)):
            raise RunStopped(f"the gradient norm is {norm} at policy version {self.version}; the update is void")
        self.version += 1
        self._ema.update(engine.weights(engine.mine))
        return norm

    def _rate(self, update: int) -> float:
        return learning_rate(self.run.learner, update, self.run.updates)

    def _averages(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over the terms of all ranks."""
        names = sorted(sums)
        whole = dict(zip(names, self._policy.engine.reduce([sums[name] for name in names], "sum"), strict=True))
        means = {}
        for name in names:
            prefix, slash, statistic = name.rpartition("/")
            if statistic != "terms":
                means[name] = whole[name] / whole[f"{prefix}{slash}terms"]
        return means

    def policy(self) -> PolicyWeights:
        """This rank's share of the weights to sample with. All ranks must call it."""
        return PolicyWeights(version=self.version, tensors=self._objective.sampling_weights())

    def average(self) -> PolicyWeights:
        """This rank's share of the averaged weights, to evaluate and export."""
        return PolicyWeights(
            version=self.version, tensors={name: tensor.clone() for name, tensor in self._ema.state.items()}
        )

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's share of all that a resumed run needs. All ranks must call it.

        The shares together are whole plain tensors that fit any number of ranks; each is in one share, but for counts.
        """
        engine = self._policy.engine
        return {
            "version": torch.tensor(self.version),
            "ema_updates": torch.tensor(self._ema.updates),
            **{f"policy/{name}": tensor for name, tensor in engine.weights(engine.mine).items()},
            **{f"ema/{name}": tensor.clone() for name, tensor in self._ema.state.items()},
            **{f"optimizer/{name}": tensor for name, tensor in engine.optimizer_state().items()},
            **{f"objective/{name}": tensor for name, tensor in self._objective.state().items()},
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue exactly where `state()` was taken, on all ranks' shares together."""

        def under(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

        engine, average = self._policy.engine, under("ema/")
        self.version = int(state["version"])
        engine.load_weights(under("policy/"))
        engine.load_optimizer_state(under("optimizer/"))
        self._objective.load_state(under("objective/"))
        mine = {name: average[name] for name in average if name in engine.mine}
        self._ema = WeightsEMA(mine, self.run.learner.ema_decay, int(state["ema_updates"]))
